"""Python entry points: compose a configuration, run it, get the record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filtrun.catalogue import conf_dir
from filtrun.errors import UserError

if TYPE_CHECKING:
    from filtrun.record import Record


def cell_name(*, _root_: Any) -> str:
    """The folder of a sweep's cell: a digest of what it computes, so that the same cell is found again."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from filtrun.cells import cell_digest

    keys = [str(key) for key in _root_ if key != "hydra"]
    try:
        values = OmegaConf.to_container(OmegaConf.masked_copy(_root_, keys), resolve=True)
    except OmegaConfBaseException:  # told in full when the cell is composed
        values = OmegaConf.to_container(OmegaConf.masked_copy(_root_, keys))
    return cell_digest(values)  # type: ignore[arg-type]


def register_resolvers() -> None:
    """Make the names the configuration uses in ``${...}`` known to OmegaConf."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("filtrun_cell", cell_name, replace=True)


def with_default_model(overrides: Sequence[str]) -> list[str]:
    """Add the choices that go without saying.

    A task named without a model gets its usual one (``task=classify`` means ``model=resnet20``), unless a method picks
    one; a model that starts
    from nothing and is named without a method is trained in full (``model=espcn`` means ``method=full``). Training
    options of the base may be set (``pretrain.steps=600``) whether or not a recipe has set them before. A recipe that
    is named brings the model, task and method of its defaults list (Hydra would read its list too late for that).
    """
    from filtrun.catalogue import conf_dir, entries

    if any(o.startswith("pretrain.") for o in overrides):
        from filtrun.config_file import read_yaml

        known = read_yaml(conf_dir() / "trainer" / "default.yaml")
        overrides = [
            f"++{o}" if o.startswith("pretrain.") and o.partition("=")[0][len("pretrain.") :] in known else o
            for o in overrides
        ]
    chosen = {name for name, sign, _ in (o.partition("=") for o in overrides) if sign}
    recipes = [o.partition("=")[2] for o in overrides if o.startswith("recipe=")]
    for group, name in next((e.picks for e in entries("recipes") if e.name in recipes[-1:]), {}).items():
        if group not in chosen:
            overrides = [*overrides, f"{group}={name}"]
            chosen.add(group)
    tasks = [o.partition("=")[2] for o in overrides if o.startswith("task=")]
    methods = [o.partition("=")[2] for o in overrides if o.startswith("method=")]
    if tasks and "model" not in chosen and not any(map(_picks_model, methods)):
        fits = {e.name: e.tasks for e in entries("models")}
        for default in ("unet", "resnet20", "espcn", *fits):
            if tasks[-1] in fits.get(default, ()):
                overrides = [*overrides, f"model={default}"]
                break
    models = [o.partition("=")[2] for o in overrides if o.startswith("model=")]
    if models and "method" not in chosen and not any(o.startswith("model.base=") for o in overrides):
        bases = {e.name: e.node.get("base") for e in entries("models")}
        if all(bases.get(name) == "scratch" for name in models[-1].split(",")):
            return [*overrides, "method=full"]
    return list(overrides)


def _picks_model(methods: str) -> bool:
    """Whether one of ``sara`` or ``[sara,apg]`` says in its config which model it is for, or is not filtrun's own."""
    from filtrun.catalogue import conf_dir, read_entry

    for name in methods.strip("[]").split(","):
        path = conf_dir() / "method" / f"{name.strip()}.yaml"
        if not path.is_file() or "model" in read_entry("methods", name, path).picks:
            return True
    return False


def plain(config: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """A composed Hydra configuration as (plain dictionary without ``hydra``, option chosen for each group)."""
    own, choices = without_hydra(config.copy())
    return resolved(own), choices


def without_hydra(config: Any) -> tuple[Any, dict[str, str]]:
    """(the configuration, which loses its ``hydra`` node; the option chosen for each group)."""
    from omegaconf import open_dict

    choices = {k: v for k, v in dict(config.hydra.runtime.choices).items() if v and not k.startswith("hydra/")}
    with open_dict(config):
        del config["hydra"]
    return config, choices


def resolved(config: Any) -> dict[str, Any]:
    """A configuration without ``hydra`` as a plain dictionary. Raises UserError for what is missing in it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error


def compose(*overrides: str, config_dir: str | Path | None = None) -> tuple[dict[str, Any], dict[str, str], Path]:
    """Compose a configuration as the command line does.

    Returns (configuration, option of each group, run folder). Raises UserError for a key or option that does not exist.
    """
    composed = composed_by_hydra(overrides, [] if config_dir is None else [config_dir])
    folder = Path(str(composed.hydra.run.dir))
    return *plain(composed), folder


def composed_by_hydra(overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> Any:
    """The configuration with its interpolations and its ``hydra`` node. Raises UserError as `compose` does."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from filtrun.hydra_errors import translated

    register_resolvers()
    expanded = with_default_model(overrides)
    if config_dirs:
        places = ",".join(f"file://{Path(folder).absolute()}" for folder in config_dirs)
        expanded.append(f"hydra.searchpath=[{places}]")
    GlobalHydra.instance().clear()
    with translated(expanded), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra_compose("config", expanded, return_hydra_config=True)


def run(*overrides: str, config_dir: str | Path | None = None, quiet: bool = True) -> Record:
    """Do one run and return its record; what ``filtrun OVERRIDES`` does, without its printing.

    Raises:
        UserError: a mistake in the overrides or the data.
        RunFailure: the run could not finish; the record in its folder says why.
    """
    from filtrun.launch import execute

    config, choices, folder = compose(*overrides, config_dir=config_dir)
    return execute(config, choices, folder, list(overrides), quiet=quiet)
