"""A fingerprint of the code an object comes from, so that a changed algorithm is not served from the cache."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

INFRASTRUCTURE = frozenset(
    f"filtrun.{name}"
    for name in (
        "api", "bits", "build", "catalogue", "cli", "code_version", "compat", "console", "cost", "delta", "errors",
        "experiment", "hydra_errors", "images", "launch", "loggers", "options", "pack", "plan", "record", "reload",
        "stages",
    )
)  # fmt: skip
"""Modules that carry results about and compute none: a change in them leaves keys as they are."""


def code_version(*objects: Any) -> dict[str, str]:
    """Module name -> version of every module the given objects' classes are made of.

    That is where the classes and their bases are defined and what those modules import of the same package, whole
    chains of them, without filtrun's infrastructure and without other packages.
    """
    versions: dict[str, str] = {}
    todo = []
    for obj in objects:
        cls = obj if inspect.isclass(obj) or inspect.isfunction(obj) else type(obj)
        todo += [base.__module__ for base in getattr(cls, "__mro__", (cls,))]
    own = {name.split(".")[0] for name in todo} - {"builtins", "torch", "timm", "diffusers", "abc", "typing"}
    while todo:
        name = todo.pop()
        if name in versions or name.split(".")[0] not in own or name in INFRASTRUCTURE:
            continue
        versions[name], imported = _module(name)
        todo += imported
    return {name: version for name, version in sorted(versions.items()) if version}


def module_version(name: str) -> str:
    """Digest of a module's code without comments, docstrings and layout; empty when it has no source."""
    return _module(name)[0]


@functools.cache
def _module(name: str) -> tuple[str, tuple[str, ...]]:
    """(version, modules it imports) of a module, from its source."""
    path = _source(name)
    if path is None:
        return "", ()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: list[str] = []
    _strip(tree, imported)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12], tuple(imported)


def _source(name: str) -> Path | None:
    """The file of a module, found without importing it; None for what is no module (a class in one, say)."""
    package, _, rest = name.partition(".")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    if not rest:
        return Path(spec.origin)
    path = Path(spec.origin).parent.joinpath(*rest.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _strip(node: ast.AST, imported: list[str]) -> None:
    """Take docstrings out of a syntax tree and note what it imports, but for type checkers only."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body[0] = ast.Pass()
    if isinstance(node, ast.Import):
        imported += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            _strip(child, imported)
