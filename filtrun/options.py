"""Fields that explain and check themselves: default, meaning, allowed values and where the default is from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from filtrun.errors import UserError, closest


def opt(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    source: str = "",
) -> Any:
    """A dataclass field for one option of a method, task, data set or trainer.

    Args:
        default: value when the config says nothing; a list or dict is copied for each instance.
        help: what it means, in one line (shown by ``filtrun info``).
        choices: the allowed values, if there are few.
        low, high: the closed interval a number must lie in.
        source: where the default is from, e.g. ``"paper, Table 5"``.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "source": source}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any, where: str) -> None:
    """Raise UserError when a field of the dataclass instance `options` is outside what it allows.

    None passes: a field that must be set says so in its own ``__post_init__``.
    """
    for field in dataclasses.fields(options):
        value, allowed = getattr(options, field.name), field.metadata
        if value is None or not allowed:
            continue
        key = f"{where}.{field.name}"
        choices = allowed.get("choices")
        if choices is not None and value not in choices:
            names = ", ".join(map(str, choices))
            raise UserError(f"{key}={value} is not allowed; choose from {names}{closest(value, choices)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = allowed.get("low"), allowed.get("high")
            if math.isnan(value) or (low is not None and value < low) or (high is not None and value > high):
                bounds = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
                raise UserError(f"{key}={value} is out of range; allowed is {bounds}")
