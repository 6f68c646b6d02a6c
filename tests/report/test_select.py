from __future__ import annotations

import itertools

import pytest

from filtrun.errors import UserError
from filtrun.report.select import ABSENT, Condition, check_keys, keys_of, matches, parse_where, told, value_of


@pytest.fixture
def record(records):
    made = records.make_record(methods=["ema", "sara"], folder="/x/r0")
    made["config"] |= {"trainer": {"lr": 1e-3, "epochs": None, "compile": False}, "data": {"target": [7, 8, 9]}}
    made["config"]["method"] = {"sara": {"threshold": 0.005}}
    return made


def test_a_key_names_one_value(record):
    want = {
        "methods": "ema+sara", "method": "ema+sara", "seed": 1, "data": "digits", "data.target": [7, 8, 9],
        "trainer.lr": 1e-3, "trainer.epochs": None, "trainer": ABSENT, "trainer.lr.x": ABSENT, "scale": "laptop",
        "method.sara.threshold": 0.005, "test/fid": 12.41, "test/nll": ABSENT, "cost/steps": 300,
        "report/selected_weights": 20480, "report/none": ABSENT, "evaluation/samples": 512, "environment/git": None,
    }  # fmt: skip
    assert {key: value_of(record, key) for key in want} == want
    assert set(want) - {k for k, v in want.items() if v is ABSENT} - {"method"} <= set(keys_of([record]))


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("task=diffuse,method.sara.threshold<0.01", True), ("method.sara.threshold<0.005", False),
        ("method.sara.threshold<=5e-3", True), ("trainer.lr=1e-3", True), ("trainer.lr=0.0010", True),
        ("trainer.lr!=0.001", False), ("trainer.epochs=null", True), ("trainer.epochs<3", False),
        ("trainer.compile=false", True), ("trainer.compile=0", False), ("test/nll=null", True),
        ("test/nll!=0.5", True), ("test/nll>0", False), ("data.target=[7,8,9]", True), ("data.target=[7, 8, 9]", True),
        ("data.target=[7,8]", False), ("methods~sara", True), ("methods~SA?A", False), ("methods~*SA?A", True),
        ("seed>=1,seed<=1,seed==1", True), ("name='sara-digits-unet'", True), ("name=Sara-digits-unet", False),
        ("test/fid>12.4,test/fid<12.42", True), ("task<3", False), ("environment/torch=2.13.0", True),
    ],
)  # fmt: skip
def test_conditions(record, text, holds):
    assert matches(record, parse_where([text])) is holds


def test_signs_against_a_slow_reference(records):
    import operator

    signs = {
        "=": operator.eq,
        "!=": operator.ne,
        "<": operator.lt,
        "<=": operator.le,
        ">": operator.gt,
        ">=": operator.ge,
    }
    values = [-2, 0, 0.5, 1, 1e6]
    for (sign, compare), a, b in itertools.product(signs.items(), values, values):
        held = records.make_record(metrics={"test/x": a})
        assert matches(held, parse_where([f"test/x{sign}{b}"])) is compare(a, b), (a, sign, b)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "--where 'seed' must read KEY SIGN VALUE"), ("a=1,,b=2", "--where '' must read"),
        ("=3", "must read"), ("seed<many", "--where seed<many: < compares numbers, and 'many' is none"),
        ("seed>nan", "compares numbers"),
    ],
)  # fmt: skip
def test_what_is_no_condition(text, message):
    with pytest.raises(UserError, match="--where") as error:
        parse_where([text])
    assert message in str(error.value)


def test_unknown_keys_are_named_with_the_closest(record):
    check_keys("--by", ["seed", "folder", "trainer.epochs", "test/fid"], [record])
    for key, near in {"trainer.lrr": "did you mean 'trainer.lr'", "test/fdi": "did you mean 'test/fid'",
                      "trainer": "it holds trainer.lr, trainer.epochs"}.items():  # fmt: skip
        with pytest.raises(UserError, match=near):
            check_keys("--by", [key], [record])


def test_values_and_conditions_are_told_as_they_are_given():
    assert [told(v) for v in (True, None, ABSENT, 1e-5, 0.1, 3, [7, None], "x")] == [
        "true", "null", "-", "1e-05", "0.1", "3", "[7,null]", "x",
    ]  # fmt: skip
    assert parse_where(["a.b <= 3 , c/d~[x,y]"]) == [Condition("a.b", "<=", "3"), Condition("c/d", "~", "[x,y]")]
    assert str(Condition("a.b", "<=", "3")) == "a.b<=3"
