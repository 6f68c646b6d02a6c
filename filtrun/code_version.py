"""A fingerprint of the code an object comes from, so that a changed algorithm is not served from the cache."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
from typing import Any


@functools.cache
def module_version(module_name: str) -> str:
    """Digest of a module's code without comments, docstrings and layout; empty when it has no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except (OSError, TypeError, KeyError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


def code_version(*objects: Any) -> dict[str, str]:
    """Module name -> version for the classes (own and inherited, within their package) of the given objects."""
    versions = {}
    for obj in objects:
        cls = obj if inspect.isclass(obj) or inspect.isfunction(obj) else type(obj)
        for base in getattr(cls, "__mro__", (cls,)):
            top = base.__module__.split(".")[0]
            if top not in {"builtins", "torch", "timm", "diffusers", "abc", "typing"}:
                versions[base.__module__] = module_version(base.__module__)
    return versions
