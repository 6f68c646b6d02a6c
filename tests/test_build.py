"""Objects from config nodes: whose code may run, which kind it must be, and how its options are typed."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from filtrun.build import RESERVED, build, kind_of_value, resolve, schema, typed
from filtrun.errors import UserError
from filtrun.options import opt

CALLED: list[Any] = []


class Base:
    pass


@dataclass
class Part(Base):
    rate: float = opt(0.5, "a rate", low=0, high=1)
    count: int = 2
    name: str | None = None
    ids: list[int] = field(default_factory=list)
    on: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    limit: int | float | None = None


@dataclass
class Needs(Base):
    size: int


class Plain(Base):
    def __init__(self, width: int, depth: int = 2, betas: tuple[float, ...] = (0.1, 0.2)) -> None:
        self.values = width, depth, list(betas)


class Wrapper(Base):
    def __init__(self, name: str, num_classes: int, **rest: Any) -> None:
        self.values = name, num_classes, rest


class Sub(Part):
    pass


def make_part(rate: float = 0.1, num_classes: int = 0) -> Part:
    CALLED.append((rate, num_classes))
    return Part(rate=rate, count=num_classes)


def says_nothing(rate: float = 0.1):
    CALLED.append(rate)
    return Part()


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of somebody else, made of this module's classes."""
    package = types.ModuleType("outside")
    for item in (Part, Needs, Plain, Wrapper, Sub, make_part, says_nothing):
        setattr(package, item.__name__, item)
    monkeypatch.setitem(sys.modules, "outside", package)
    CALLED.clear()
    yield


def make(target: str, where: str = "part", /, *, kind: type = Base, given: Any = None, **node: Any) -> Any:
    return build({"_target_": f"outside.{target}", **node}, kind, where, trust=("outside",), **(given or {}))


# -- whose code may run


def test_code_of_a_package_that_is_not_trusted_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("os.system", lambda command: calls.append(command))
    with pytest.raises(UserError) as error:
        build({"_target_": "os.system", "command": "true"}, Base, "method.evil")
    assert str(error.value) == (
        "_target_=os.system is code of the package 'os', which is not trusted\nadd trust=[os] if you know what it does"
    )
    assert calls == []


def test_a_package_that_is_not_trusted_is_not_even_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="'stranger', which is not trusted"):
        resolve("stranger.Thing")
    assert "stranger" not in sys.modules


def test_trust_is_by_whole_name() -> None:
    with pytest.raises(UserError, match="not trusted; did you mean 'filtrun'"):
        resolve("filtrunn.methods.Thing", ["outside"])
    assert resolve("outside.Part", ["outside"]) is Part


def test_what_a_trusted_module_imported_is_no_way_around() -> None:
    for target in (
        "filtrun.launch.os",
        "filtrun.launch.make_fabric",
        "filtrun.pack.save_tree",
        "filtrun.record.Record",
    ):
        with pytest.raises(UserError, match="does not make a Method"):
            from filtrun.method import Method

            build({"_target_": target}, Method, "method.x")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("sara", "'sara' is not a dotted path"),
        (3, "3 is not a dotted path"),
        ("filtrun.nothere.Thing", "there is no module 'filtrun.nothere'"),
        ("filtrun.methods.peft.lora.Lora", "has no 'Lora'; did you mean 'LoRA'?"),
    ],
)
def test_a_target_that_is_not_there(target: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(target)
    assert message in str(error.value)


def test_a_missing_dependency_is_told_apart_from_a_missing_module(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halfway.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="needs the package 'not_installed_anywhere': pip install"):
        resolve("halfway.Thing", ["halfway"])


# -- which kind


@pytest.mark.parametrize("name", ["says_nothing", "Part"])
def test_the_kind_is_checked_before_anything_is_called(name: str) -> None:
    from filtrun.method import Method

    with pytest.raises(UserError, match=f"_target_=outside.{name} does not make a Method"):
        make(name, kind=Method)
    assert CALLED == []


def test_a_node_without_target() -> None:
    with pytest.raises(UserError, match="data has no _target_"):
        build({"root": "x"}, Base, "data")


# -- dataclasses, classes, functions


def test_a_dataclass_is_filled_and_numbers_take_the_declared_type() -> None:
    part = make("Part", rate=1, ids=[1, 2], weights={"a": 1}, name="x", limit=3)
    assert part == Part(rate=1.0, ids=[1, 2], weights={"a": 1.0}, name="x", limit=3)
    assert isinstance(part.rate, float) and isinstance(part.weights["a"], float) and isinstance(part.limit, int)


def test_a_class_is_filled_from_its_signature_and_tuples_are_lists_in_yaml() -> None:
    assert make("Plain", width=3).values == (3, 2, [0.1, 0.2])
    assert make("Plain", width=3, depth=5, betas=[1, 2]).values == (3, 5, [1.0, 2.0])


def test_a_function_gets_what_the_data_says() -> None:
    assert make("make_part", rate=0.2, given={"num_classes": 7, "image_size": 8}).count == 7
    assert CALLED == [(0.2, 7)]


def test_keys_a_wrapper_does_not_name_go_through() -> None:
    made = make("Wrapper", name="net", patch=2, given={"num_classes": 3})
    assert made.values == ("net", 3, {"patch": 2})


def test_reserved_keys_are_the_runners() -> None:
    node = {key: "x" for key in RESERVED - {"_target_"}}
    assert make("Part", **node) == Part()
    assert {"needs", "claims", "tasks", "base", "checkpoint", "normalize"} < RESERVED


def test_built_options_are_checked() -> None:
    with pytest.raises(UserError, match=r"part.rate=2.0 is out of range; allowed is \[0, 1\]"):
        make("Part", rate=2)
    with pytest.raises(UserError, match="part.rate=2.0 is out of range"):
        make("make_part", rate=2)


def test_an_option_without_default() -> None:
    with pytest.raises(UserError, match="part.size has no default and must be set"):
        make("Needs")
    with pytest.raises(UserError, match="part.width has no default and must be set"):
        make("Plain")


# -- wrong keys and types


def test_an_unknown_key_comes_with_the_closest_and_all() -> None:
    with pytest.raises(UserError) as error:
        make("Part", "method.x", rat=1)
    assert str(error.value) == (
        "unknown key method.x.rat; did you mean 'rate'?\nallowed: count, ids, limit, name, on, rate, weights"
    )
    with pytest.raises(UserError, match="unknown key part.num_classes"):  # what the data says is not for the config
        make("make_part", num_classes=3, given={"num_classes": 7})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("rate", "much", "a number"),
        ("rate", [1], "a number"),
        ("rate", None, "a number"),
        ("count", 2.5, "a whole number"),
        ("count", True, "a whole number"),
        ("count", "two", "a whole number"),
        ("count", {"a": 1}, "a whole number"),
        ("name", [1], "text or null"),
        ("ids", 3, "a list, each item a whole number"),
        ("ids", ["a"], "a list, each item a whole number"),
        ("ids", [1.5], "a list, each item a whole number"),
        ("on", "perhaps", "true or false"),
        ("on", 7.5, "true or false"),
        ("weights", 3, "a mapping"),
        ("weights", {"a": "x"}, "a mapping"),
        ("limit", "far", "a whole number or a number or null"),
    ],
)
def test_each_wrong_type_is_told_in_words(key: str, value: Any, kind: str) -> None:
    with pytest.raises(UserError) as error:
        make("Part", **{key: value})
    assert str(error.value) == f"part.{key}={value!r} must be {kind}"


def test_typed_returns_every_option() -> None:
    assert typed(Part, {"count": 5}, "part") == {
        "rate": 0.5, "count": 5, "name": None, "ids": [], "on": False, "weights": {}, "limit": None,
    }  # fmt: skip


def test_schema_leaves_out_what_is_given() -> None:
    names = [f.name for f in schema(make_part, skip=("num_classes",)).__dataclass_fields__.values()]
    assert names == ["rate"]
    assert schema(Sub) is Sub


def test_kinds_in_words() -> None:
    hints = {int | None: "a whole number or null", list[str]: "a list, each item text", list: "list", Base: "Base"}
    assert {kind_of_value(h) for h in hints} == set(hints.values())
