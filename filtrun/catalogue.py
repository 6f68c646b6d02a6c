"""What there is to run: the configs of every group, with the paper, options and meaning behind each.

Everything comes from the YAML files under ``conf`` (and a user's own folders) and from the source text of the classes
they name; neither torch nor Hydra nor the classes' modules are imported.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filtrun.citation import Paper, cited, parse_paper
from filtrun.config_file import comments, parse_yaml, read_text
from filtrun.errors import UserError, unknown
from filtrun.listed import IMPLEMENTED, PLANNED, Listed, read_listed
from filtrun.source import Source, describe, quick_fact

if TYPE_CHECKING:
    from filtrun.report.card import Card

GROUPS = {
    "methods": "method", "models": "model", "data": "data", "tasks": "task", "papers": "paper",
    "loggers": "logger", "recipes": "recipe", "scales": "scale", "sweeps": "sweep", "trainer": "trainer",
}  # fmt: skip
"""Kind of entry -> folder of ``conf``."""

TRAINER = "filtrun.trainer.Trainer"
CATALOGUE = "catalogue.jsonl"


def conf_dir() -> Path:
    """The folder of configs: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).absolute().parent
    for path in (package / "conf", package.parent / "conf"):
        if (path / "config.yaml").is_file():
            return path
    raise UserError(f"filtrun's configs are missing: there is no conf folder in {package} or beside it")


@dataclass
class Entry:
    """One config: `method=sara`, `data=digits`, a paper's card.

    `nodes` are its options by their place in the configuration (``method.sara``, ``data``), `picks` the choices it
    makes for other groups, `sets` the options it sets outside its own, `notes` the comments at
    the end of option lines, `header` the comment at the top. `listed` is what the catalogue says of a paper; one that
    is planned has nothing else.
    """

    kind: str
    name: str
    path: Path
    header: str = ""
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    picks: dict[str, str] = field(default_factory=dict)
    sets: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    content: Any = None
    problem: str = ""
    listed: Listed | None = None

    @property
    def status(self) -> str:
        """``implemented``, or ``planned`` for a paper that only the catalogue knows."""
        return PLANNED if self.listed and self.content is None and not self.problem else IMPLEMENTED

    @property
    def group(self) -> str:
        """The folder of ``conf`` it lies in; ``group=name`` chooses it."""
        return GROUPS[self.kind]

    @property
    def node(self) -> dict[str, Any]:
        """The options of its first (mostly only) part."""
        return next(iter(self.nodes.values()), {})

    @property
    def target(self) -> str:
        """Dotted path of the class or function it builds; empty for papers, scales and recipes."""
        if self.kind == "trainer":
            return TRAINER
        return str(self.node.get("_target_") or "")

    @property
    def source(self) -> Source | None:
        """What the source text says of `target`; None when there is none."""
        return describe(self.target) if self.target else None

    @functools.cached_property
    def summary(self) -> str:
        """The first line of its comment, cut back to whole clauses where the sentence goes on below it."""
        if self.problem:
            return self.problem
        if self.card:
            return self.card.abstract.partition(". ")[0].rstrip(".") + "."
        if self.listed:
            return self.listed.about
        first, _, rest = self.header.partition("\n")
        if rest and not first.endswith((".", "!", "?", ":")):
            ends = [m.start() for m in re.finditer(r"(?<!al)\. |; ", first)]
            first = first[: ends[-1]] + "." if ends else re.split(r"(?<!al)(?<=\.) ", " ".join(self.header.split()))[0]
        return first

    @functools.cached_property
    def paper(self) -> Paper | None:
        """The publication behind it: from its card, its class, or the citation in its comment."""
        if self.card:
            return Paper(self.card.title, self.card.link, self.card.year)
        if self.listed:
            return Paper(self.listed.title, self.listed.link, self.listed.year)
        said = quick_fact(self.target, "paper") if self.kind == "methods" and self.target else None
        if isinstance(said, str) and said:
            return parse_paper(said)
        return cited(self.header) if self.kind in ("models", "data", "tasks") else None

    @functools.cached_property
    def card(self) -> Card | None:
        """The paper card, of a paper."""
        if self.kind != "papers" or self.problem or self.status == PLANNED:
            return None
        from filtrun.report.card import make_card

        return make_card(self.path.stem, self.content)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The kinds of task it works with; empty for any, and for what has nothing to do with tasks."""
        if self.kind == "tasks":
            source = self.source
            return (str(source.facts.get("kind") or self.name),) if source else (self.name,)
        needs = self.node.get("needs")
        named = self.node.get("tasks") or (needs.get("tasks") if isinstance(needs, Mapping) else None)
        if not named and self.kind == "methods" and self.target:
            named = quick_fact(self.target, "tasks")
        return tuple(map(str, named)) if isinstance(named, (list, tuple)) else ()

    @property
    def family(self) -> str:
        """The package its class lies in (``peft`` for filtrun.methods.peft.sara.SaRA), or what a paper's card says."""
        if self.card:
            return self.card.family
        if self.listed:
            return self.listed.family
        parts = self.target.split(".")
        if parts[0] != "filtrun":
            return parts[0]
        return parts[2].removesuffix("_models") if len(parts) > 3 else ""


def entries(kind: str, config_dirs: Sequence[str | Path] = ()) -> list[Entry]:
    """All entries of a kind by name: filtrun's own, then those only the folders `config_dirs` have (as Hydra looks).

    A file that cannot be read is an entry with a `problem`; papers without a file are those that are planned. Raises
    UserError for an unknown kind or a missing folder.
    """
    if kind not in GROUPS:
        raise unknown("kind", kind, GROUPS)
    found: dict[str, Entry] = {}
    folders = list(_folders(config_dirs))
    for folder in folders:
        for name, path in _files(folder / GROUPS[kind]):
            name = "trainer" if kind == "trainer" and name == "default" else name
            if name not in found:
                found[name] = read_entry(kind, name, path)
    for catalogue in [folder / CATALOGUE for folder in folders if kind == "papers"]:
        for name, listed in read_listed(catalogue).items():
            entry = found.setdefault(name, Entry(kind, name, catalogue))
            entry.listed = entry.listed or listed
    return [found[name] for name in sorted(found)]


def find(name: str, config_dirs: Sequence[str | Path] = ()) -> list[Entry]:
    """The entries called `name` in every group; raise UserError with the closest name when there is none."""
    everything = [entry for kind in GROUPS for entry in entries(kind, config_dirs)]
    plain = name.casefold().replace("-", "_")
    found = [e for e in everything if e.name == name] or [e for e in everything if e.name.casefold() == plain]
    if not found:
        from filtrun.errors import closest

        raise UserError(
            f"nothing is called {name!r}{closest(name, (e.name for e in everything))}\n"
            "`filtrun list` shows every method, model, data set, task and paper"
        )
    return found


def _folders(config_dirs: Sequence[str | Path]) -> Iterator[Path]:
    yield conf_dir()
    for given in config_dirs:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UserError(f"--config-dir {given}: there is no such folder")
        yield folder


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of each YAML below a group's folder; in a sub-folder ``a`` the name is ``a/b``."""
    for parent, _, names in os.walk(folder):
        for file in names:
            if file.endswith(".yaml"):
                path = Path(parent, file)
                yield path.relative_to(folder).with_suffix("").as_posix(), path


def read_entry(kind: str, name: str, path: Path) -> Entry:
    """Read one config file; what is wrong with it becomes the entry's `problem`."""
    entry = Entry(kind, name, path)
    try:
        text = read_text(path)
        entry.header, entry.notes = comments(text)
        entry.content = parse_yaml(text, path)
        if entry.content is not None and not isinstance(entry.content, dict):
            raise UserError(f"{path} is no mapping of keys")
        if kind == "papers":
            _ = entry.card
        elif kind != "sweeps":
            whole = bool(re.search(r"^# *@package +_global_", text, re.M))
            _fill(entry, entry.content or {}, whole)
    except UserError as error:
        entry.problem = str(error).partition("\n")[0]
    return entry


def _fill(entry: Entry, content: dict[str, Any], whole: bool) -> None:
    """Sort a config's contents into nodes and picks; a config named in its defaults list lends its nodes first."""
    defaults = content.get("defaults")
    for item in defaults if isinstance(defaults, list) else ():
        if isinstance(item, str) and item != "_self_":
            parent = entry.path.with_name(f"{item}.yaml")
            if parent.is_file() and parent != entry.path:
                entry.nodes |= read_entry(entry.kind, item, parent).nodes
        elif isinstance(item, dict):
            for key, value in item.items():
                entry.picks[str(key).replace("override", "").strip().lstrip("/")] = str(value)
    content = {key: value for key, value in content.items() if key != "defaults"}
    own = content.get(entry.group) if whole else content
    if whole and entry.kind not in ("recipes", "scales"):
        entry.sets = {key: value for key, value in content.items() if key != entry.group}
    if entry.kind in ("methods", "loggers"):
        parts = {f"{entry.group}.{key}": value for key, value in (own or {}).items()}
    elif entry.kind in ("recipes", "scales"):
        parts = {str(key): value for key, value in content.items() if isinstance(value, dict)}
    else:
        parts = {entry.group: own or {}}
    for place, node in parts.items():
        if not isinstance(node, dict):
            raise UserError(f"{entry.path}: {place} must hold the options of one {entry.group}, not {node!r}")
        entry.nodes[place] = entry.nodes.get(place, {}) | node
