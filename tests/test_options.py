"""Option fields: defaults are copied, choices and bounds are checked and named."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from filtrun.errors import UserError
from filtrun.options import check_options, opt


@dataclass
class Some:
    rate: float = opt(0.5, "a rate", low=0, high=1, source="paper, Table 1")
    count: int | None = opt(None, "a count", low=1)
    mode: str = opt("fast", "how", choices=("fast", "slow"))
    flag: bool = opt(True, "on or off", low=5)
    items: list[int] = opt([1, 2], "some")
    plain: int = 3


def test_metadata_says_what_info_shows() -> None:
    rate = next(f for f in fields(Some) if f.name == "rate")
    assert dict(rate.metadata) == {"help": "a rate", "choices": None, "low": 0, "high": 1, "source": "paper, Table 1"}


def test_lists_are_not_shared_between_instances() -> None:
    one, two = Some(), Some()
    one.items.append(3)
    assert (one.items, two.items) == ([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    "good", [{}, {"rate": 0}, {"rate": 1.0}, {"count": 1}, {"count": None}, {"mode": "slow"}, {"flag": False}]
)
def test_allowed_values_pass(good: dict[str, Any]) -> None:
    check_options(Some(**good), "here")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rate": 1.1}, "here.rate=1.1 is out of range; allowed is [0, 1]"),
        ({"rate": -1e-9}, "here.rate=-1e-09 is out of range; allowed is [0, 1]"),
        ({"rate": float("nan")}, "here.rate=nan is out of range; allowed is [0, 1]"),
        ({"count": 0}, "here.count=0 is out of range; allowed is [1, inf]"),
        ({"mode": "slw"}, "here.mode=slw is not allowed; choose from fast, slow; did you mean 'slow'?"),
    ],
)
def test_others_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_options(Some(**bad), "here")
    assert str(error.value) == message
