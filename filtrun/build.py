"""Build an object from a config node: a dotted path in a trusted package, its kind checked, its options typed.

Hydra's own ``instantiate`` runs any callable a config names. Here a config from a stranger can only name classes of
filtrun, or of packages the user trusts by name (``trust=[their_pkg]``), and only of the kind that is asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from filtrun.errors import UserError, closest
from filtrun.options import check_options

RESERVED = frozenset({"_target_", "needs", "claims", "tasks", "base", "checkpoint", "normalize"})
"""Keys of a node that the runner reads itself and that are not options of the object."""


def resolve(target: str, trust: Sequence[str] = ()) -> Any:
    """Import the object at the dotted path `target`. Raises UserError when it is absent or its package not trusted."""
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"_target_={target!r} is not a dotted path such as filtrun.methods.peft.sara.SaRA")
    package = target.split(".")[0]
    trusted = {"filtrun", *trust}
    if package not in trusted:
        raise UserError(
            f"_target_={target} is code of the package {package!r}, which is not trusted{closest(package, trusted)}\n"
            f"add trust=[{package}] if you know what it does"
        )
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if not target.startswith(missing):  # a dependency of that module
            raise UserError(f"_target_={target} needs the package {missing!r}: pip install {missing}") from error
        raise UserError(f"_target_={target}: there is no module {missing!r}") from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"_target_={target}: {module_name} has no {name!r}{closest(name, public)}")
    return getattr(module, name)


def check_kind(found: Any, kind: type, target: str) -> None:
    """Raise UserError unless `found` is a subclass of `kind` or a function annotated to return one."""
    produced = found
    if inspect.isfunction(found):
        produced = typing.get_type_hints(found).get("return")
    if not (inspect.isclass(produced) and issubclass(produced, kind)):
        raise UserError(f"_target_={target} does not make a {kind.__name__}")


@functools.lru_cache(maxsize=256)
def schema(target: Callable[..., Any], skip: tuple[str, ...] = ()) -> type:
    """The typed options of a dataclass, or of a callable by its annotated signature, without the names in `skip`."""
    if dataclasses.is_dataclass(target):
        return typing.cast(type, target)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    fields: list[Any] = []
    for name, parameter in inspect.signature(target).parameters.items():
        if name in skip or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default: Any = dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
        if isinstance(default, (list, tuple, dict)):
            values = list(default) if isinstance(default, tuple) else default
            field = dataclasses.field(default_factory=functools.partial(copy.copy, values))
        else:
            field = dataclasses.field(default=default)
        fields.append((name, hints.get(name, Any), field))
    fields.sort(
        key=lambda f: f[2].default is not dataclasses.MISSING or f[2].default_factory is not dataclasses.MISSING
    )
    return dataclasses.make_dataclass(f"{target.__name__}Options", fields)


def typed(options: type, node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check `node` against the fields of the dataclass `options` and return the values with their types made right.

    Raises UserError for an unknown key (with the closest match), a wrong type or a missing value.
    """
    names = [field.name for field in dataclasses.fields(options) if field.init]
    for key in node:
        if key not in names:
            raise UserError(
                f"unknown key {where}.{key}{closest(key, names)}\nallowed: {', '.join(sorted(names)) or '(no options)'}"
            )
    try:
        text = json.dumps(dict(node))
        same = json.loads(text) == node
    except (TypeError, ValueError):
        same = False
    values = copy.deepcopy(_known(options, text, where)) if same else _checked(options, node, where)
    missing = [name for name in names if values.get(name) == "???"]
    if missing:
        raise UserError(f"{where}.{missing[0]} has no default and must be set")
    return {name: values[name] for name in names}


@functools.lru_cache(maxsize=256)
def _known(options: type, text: str, where: str) -> dict[str, Any]:
    """The checked values of a node written as JSON: most cells of a sweep hold the same nodes."""
    return _checked(options, json.loads(text), where)


def _checked(options: type, node: Mapping[str, Any], where: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(options)
    hints = typing.get_type_hints(options)
    for key, value in node.items():
        try:
            OmegaConf.update(config, key, value, merge=False)
        except (OmegaConfBaseException, ValueError) as error:
            raise UserError(f"{where}.{key}={value!r} must be {kind_of_value(hints[key])}") from error
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, throw_on_missing=False))


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def kind_of_value(hint: Any) -> str:
    """A type annotation in words: ``int | None`` is "a whole number or null"."""
    if hint in _KINDS:
        return _KINDS[hint]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"a list, each item {kind_of_value(inner[0])}" if inner else "a list"
    if origin is dict:
        return "a mapping"
    if inner:
        return " or ".join(kind_of_value(part) for part in inner)
    return getattr(hint, "__name__", str(hint))


def build(node: Mapping[str, Any], kind: type, where: str, *, trust: Sequence[str] = (), **given: Any) -> Any:
    """Build the object a config node names.

    Args:
        node: ``_target_`` and options; reserved keys are left out.
        kind: base class the object must have.
        where: the node's place in the config, for messages (``method.sara``).
        trust: packages beside filtrun whose code may run.
        given: values from elsewhere (``num_classes``), passed where the target takes them.
    """
    if "_target_" not in node:
        raise UserError(f"{where} has no _target_: it must name the class to build")
    target = resolve(node["_target_"], trust)
    check_kind(target, kind, node["_target_"])
    accepts = inspect.signature(target).parameters
    extra = {name: value for name, value in given.items() if name in accepts}
    plain = {key: value for key, value in node.items() if key not in RESERVED}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepts.values())
    options = schema(target, skip=tuple(extra))
    loose = {}
    if takes_any:  # a wrapper such as timm's: keys it does not name go through to the library
        known = {field.name for field in dataclasses.fields(options)}
        loose = {key: plain.pop(key) for key in list(plain) if key not in known}
    values = typed(options, plain, where)
    built = target(**values, **loose, **extra)
    if dataclasses.is_dataclass(built):
        check_options(built, where)
    return built
