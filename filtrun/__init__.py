"""filtrun: one runner that trains, evaluates and compares vision methods.

>>> import filtrun
>>> record = filtrun.run("method=sara", "data=digits")  # doctest: +SKIP

Importing this package imports neither torch nor Hydra: both load when a run starts.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["compose", "run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from filtrun import api

        return getattr(api, name)
    raise AttributeError(f"module 'filtrun' has no attribute {name!r}")
