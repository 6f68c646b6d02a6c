"""What the source text of a class says of it: docstring, options, facts, hooks. Nothing is imported or run.

Listing and explaining must not cost an import of torch, and must not run code of a package nobody has trusted yet, so
classes are read with ``ast``, with the classes they inherit from.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass, field, replace
from typing import Any

from filtrun.syntax import Module, module, module_path

GIVEN = frozenset({"num_classes", "in_channels", "image_size", "scale", "pretrained"})
"""Arguments the runner fills in (sizes from the data, where a model starts); they are no options."""


@dataclass(frozen=True)
class Option:
    """One option: `default` is None for null; `required` when there is no default; `choices` and bounds may be None."""

    name: str
    type: str = ""
    default: Any = None
    help: str = ""
    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    source: str = ""
    required: bool = False


@dataclass
class Source:
    """A class or function as its text describes it.

    `options` by name, inherited ones first; `facts` the values assigned in the class body;
    `origin` says for each name defined in a body which class (dotted path) defines it.
    """

    target: str
    doc: str = ""
    module_doc: str = ""
    options: dict[str, Option] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)


def _definition(target: str, depth: int = 8) -> tuple[Module, ast.ClassDef | ast.FunctionDef] | None:
    """Where a dotted path is defined, names imported from elsewhere followed."""
    home, _, name = target.rpartition(".")
    found = module(home) if home else None
    if found is None:
        return None
    if name in found.made:
        return found, found.made[name]
    return _definition(found.imports[name], depth - 1) if depth and name in found.imports else None


@functools.cache
def describe(target: str) -> Source | None:
    """Read the class or function at a dotted path with all it inherits; None when its source cannot be found."""
    found = _definition(target)
    if found is None:
        return None
    home, node = found
    try:
        return _class(home, node) if isinstance(node, ast.ClassDef) else _function(home, node)
    except (RecursionError, TypeError, ValueError):  # defined in a circle, or stranger than what is read here
        return None


def _class(home: Module, node: ast.ClassDef) -> Source:
    name = f"{home.name}.{node.name}"
    made = Source(name, ast.get_docstring(node) or "", home.doc)
    for base in reversed(node.bases):
        parent = describe(home.dotted(base.id)) if isinstance(base, ast.Name) else None
        if parent is not None:
            made.options |= parent.options
            made.facts |= parent.facts
            made.origin |= parent.origin
            made.doc = made.doc or parent.doc
    fields = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    help_of = _arguments(made.doc)
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            made.origin[item.name] = name
            if item.name == "__init__" and not fields:
                made.options = _parameters(home, item, help_of)
        elif isinstance(item, ast.Assign):
            for target in (t for t in item.targets if isinstance(t, ast.Name)):
                made.origin[target.id], made.facts[target.id] = name, home.value(item.value)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            _annotated(home, item, item.target.id, made, fields, help_of)
    return made


def _annotated(
    home: Module, item: ast.AnnAssign, name: str, made: Source, fields: bool, help_of: dict[str, str]
) -> None:
    kind = ast.unparse(item.annotation)
    if "ClassVar" in kind or not fields:
        made.options.pop(name, None)  # a subclass may fix what its base lets one choose
        if item.value is not None:
            made.origin[name], made.facts[name] = made.target, home.value(item.value)
        return
    option = _option(home, name, kind, item.value)
    if option is not None:
        made.options[name] = option if option.help else replace(option, help=help_of.get(name, ""))


def _option(home: Module, name: str, kind: str, value: ast.expr | None) -> Option | None:
    if value is None:
        return Option(name, kind, required=True)
    called = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    if not isinstance(value, ast.Call) or called.rpartition(".")[2] not in ("opt", "field"):
        return Option(name, kind, home.value(value))
    given = {k.arg: home.value(k.value) for k in value.keywords if k.arg}
    given |= dict(zip(("default", "help"), map(home.value, value.args), strict=False))
    if given.get("init") is False:
        return None
    if "default_factory" in given:
        empty: dict[str, Any] = {"list": [], "dict": {}}
        given["default"] = empty.get(str(given["default_factory"]), given["default_factory"])
    choices = given.get("choices")
    if isinstance(choices, dict):
        choices = tuple(choices)
    return Option(
        name, kind, given.get("default"), str(given.get("help", "")),
        tuple(choices) if isinstance(choices, (tuple, list, set)) else None,
        given.get("low"), given.get("high"), str(given.get("source", "")), required="default" not in given,
    )  # fmt: skip


def _function(home: Module, node: ast.FunctionDef) -> Source:
    doc = ast.get_docstring(node) or ""
    return Source(f"{home.name}.{node.name}", doc, home.doc, _parameters(home, node, _arguments(doc)))


def _parameters(home: Module, node: ast.FunctionDef, help_of: dict[str, str]) -> dict[str, Option]:
    plain = [*node.args.posonlyargs, *node.args.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(node.args.defaults)) + list(node.args.defaults)
    pairs = [*zip(plain, defaults, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    made = {}
    for argument, default in pairs:
        if argument.arg in GIVEN or argument.arg == "self":
            continue
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        help = help_of.get(argument.arg, "")
        if default is None:
            made[argument.arg] = Option(argument.arg, kind, help=help, required=True)
        else:
            made[argument.arg] = Option(argument.arg, kind, home.value(default), help)
    return made


_SECTION = re.compile(r"^(Args|Arguments|Attributes|Returns|Raises|Yields|Example|Examples|Note):\s*$", re.M)


def prose(doc: str) -> str:
    """A docstring up to its first section (Args, Raises, ...)."""
    found = _SECTION.search(doc)
    return (doc[: found.start()] if found else doc).strip()


def _arguments(doc: str) -> dict[str, str]:
    """Name -> meaning from a docstring's Args section (``a, b: text``, continued on deeper lines)."""
    found = re.search(r"^Args:\s*\n((?:[ \t]+.*\n?|\n)+)", doc, re.M)
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in found.group(1).splitlines() if found else []:
        start = re.match(r" {4}([\w*]+(?:, [\w*]+)*): *(.*)", line)
        if start:
            names = start.group(1).split(", ")
            meanings |= dict.fromkeys(names, start.group(2))
        else:
            for name in names if line.strip() else ():
                meanings[name] += " " + line.strip()
    return meanings


def quick_fact(target: str, name: str) -> Any:
    """A fact of a class whose body assigns it literally, read without parsing the whole file; else by `describe`.

    Parsing costs milliseconds a file, too much for a list of a hundred classes.
    """
    home, _, cls = target.rpartition(".")
    path = module_path(home) if home else None
    try:
        text = path.read_text(encoding="utf-8") if path is not None else ""
    except (OSError, ValueError):
        text = ""
    body = re.search(rf"^class {re.escape(cls)}\b.*\n(?:[ \t)].*\n|\n)*", text + "\n", re.M)
    if body:
        annotation, value = r"(?:: *[\w\[\], .|\"']+)?", r"((?:\(\n(?:.*\n)*?    \)|.*)$)"
        found = re.search(rf"^    {re.escape(name)}{annotation} = {value}", body[0], re.M)
        if found:
            try:
                return ast.literal_eval(found[1])
            except (ValueError, SyntaxError, TypeError):
                pass
    source = describe(target)
    return source.facts.get(name) if source else None
