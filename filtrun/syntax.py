"""Modules read as syntax trees: what they define, and the plain values of their constants. Nothing is run."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple


class Code(str):
    """An expression that is no plain value, as it is written."""


class MetricFacts(NamedTuple):
    """A task's metric as its source declares it (see `filtrun.task.Metric`)."""

    title: str
    better: str = ""
    meaning: str = ""
    format: str = ".3f"


class Module:
    """A parsed module: its top-level classes, functions, constants and imported names."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.tree = name, ast.parse(path.read_text(encoding="utf-8"))
        self.doc = ast.get_docstring(self.tree) or ""
        self.made: dict[str, ast.ClassDef | ast.FunctionDef] = {}
        self.constants: dict[str, ast.expr] = {}
        self.imports: dict[str, str] = {}
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in self.tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                self.made[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.constants |= {t.id: node.value for t in targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                origin = ".".join([*parts, *([node.module] if node.module else [])])
                self.imports |= {a.asname or a.name: f"{origin}.{a.name}" for a in node.names}

    def value(self, node: ast.expr) -> Any:
        """The plain value of an expression as far as it can be told without running it, else `Code`."""
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, MemoryError):
            pass
        if isinstance(node, ast.Name):
            return self._named(node)
        if isinstance(node, (ast.Tuple, ast.List)):
            items = [self.value(item) for item in node.elts]
            return tuple(items) if isinstance(node, ast.Tuple) else items
        if isinstance(node, ast.Dict):
            return self._mapping(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.Add)):
            left, right = self.value(node.left), self.value(node.right)
            if isinstance(left, dict) and isinstance(right, dict):
                return left | right
            if type(left) is type(right) and isinstance(left, (tuple, list)):
                return left + right
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            from filtrun.source import describe

            owner = describe(self.dotted(node.value.id))
            if owner is not None and node.attr in owner.facts:
                return owner.facts[node.attr]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._called(node, node.func.id)
        return Code(ast.unparse(node))

    def dotted(self, name: str) -> str:
        """The dotted path a name of this module stands for."""
        return self.imports.get(name) or f"{self.name}.{name}"

    def _named(self, node: ast.Name) -> Any:
        if node.id in self.constants:
            return self.value(self.constants[node.id])
        home, _, name = self.imports.get(node.id, "").rpartition(".")
        other = module(home) if home else None
        if other is not None and name in other.constants:
            return other.value(other.constants[name])
        return Code(node.id)

    def _mapping(self, node: ast.Dict) -> Any:
        values: dict[Any, Any] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            inner = self.value(item)
            if key is not None:
                values[self.value(key)] = inner
            elif isinstance(inner, dict):  # {**Base.metrics, ...}
                values |= inner
        return values

    def _called(self, node: ast.Call, name: str) -> Any:
        arguments = [self.value(a) for a in node.args]
        if name == "Metric":
            keywords = {k.arg: self.value(k.value) for k in node.keywords if k.arg in MetricFacts._fields}
            if arguments or "title" in keywords:
                return MetricFacts(*arguments[:4], **{k: v for k, v in keywords.items() if k})
        if name == "range" and all(isinstance(a, int) for a in arguments):
            return list(range(*arguments))
        if name in ("list", "tuple") and len(arguments) == 1 and isinstance(arguments[0], (list, tuple)):
            return list(arguments[0]) if name == "list" else tuple(arguments[0])
        return Code(ast.unparse(node))


def module_path(name: str) -> Path | None:
    """The file of a module by its dotted name, found without importing it (nor the packages it lies in)."""
    top, *rest = name.split(".")
    if top == "filtrun":
        places = [str(Path(__file__).parent)]
    else:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
        if not rest and not places:
            return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for place in places:
        base = Path(place, *rest)
        for path in (base / "__init__.py", base.with_suffix(".py") if rest else base / "__init__.py"):
            if path.is_file():
                return path
    return None


@functools.cache
def module(name: str) -> Module | None:
    """The parsed module, or None when there is no such file or it is no valid Python."""
    path = module_path(name)
    try:
        return Module(name, path) if path is not None else None
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
