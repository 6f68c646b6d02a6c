"""The record: its schema, its one-piece replacement, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from filtrun.errors import RunFailure, UserError
from filtrun.record import FILE, Record, validate


def full(folder: Path) -> Record:
    return Record(
        folder=folder, status="finished", key="0123456789abcdef", name="sara", overrides=["seed=1"],
        config={"seed": 1, "path": Path("x")}, seed=1, task="diffuse", data="digits", model="unet", methods=["sara"],
        metrics={"test/fid": 1.5, "tuned/top5@1": 0.25}, report={"sara": {"rank": 3}}, evaluation={"samples": 16},
        cost={"trainable_params": 3, "total_params": 9, "flops": None, "train_seconds": 0.5, "steps": 4},
        stages=[{"name": "judge", "key": "ab", "cached": True}], environment={"torch": "2"},
        artifacts=[{"path": "model.safetensors", "kind": "model", "sha256": "0" * 64}],
    )  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    record = full(tmp_path)
    record.write()
    again = Record.read(tmp_path)
    assert again.to_dict() == record.to_dict() and again.config == {"seed": 1, "path": "x"}
    assert Record.read(tmp_path / FILE).folder == tmp_path
    assert os.listdir(tmp_path) == [FILE]


def test_a_new_record_is_valid() -> None:
    validate(Record(folder=Path()).to_dict())


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    record = full(tmp_path)
    record.metrics = {"test/fid": math.nan, "test/kid": math.inf, "test/recall": -math.inf, "test/precision": 0.0}
    record.report = {"sara": {"list": [math.nan, (1.0, math.inf)]}}
    record.write()
    text = (tmp_path / FILE).read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["metrics"] == {
        "test/fid": None, "test/kid": None, "test/recall": None, "test/precision": 0.0,
    }  # fmt: skip
    assert Record.read(tmp_path).report == {"sara": {"list": [None, [1.0, None]]}}


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "schema": lambda r: r.update(schema=2),
    "status": lambda r: r.update(status="done"),
    "key": lambda r: r.update(key="xyz"),
    "seed": lambda r: r.update(seed=1.5),
    "name": lambda r: r.update(name=None),
    "overrides": lambda r: r.update(overrides="seed=1"),
    "overrides/0": lambda r: r.update(overrides=[1]),
    "config": lambda r: r.update(config=[]),
    "methods": lambda r: r.update(methods={}),
    "metrics": lambda r: r["metrics"].update({"fid": 1.0}),
    "metrics/test/fid": lambda r: r["metrics"].update({"test/fid": "low"}),
    "cost": lambda r: r["cost"].update(time=1.0),
    "cost/steps": lambda r: r["cost"].update(steps=-1),
    "cost/total_params": lambda r: r["cost"].update(total_params=1.5),
    "stages/0": lambda r: r["stages"][0].pop("cached"),
    "stages/0/cached": lambda r: r["stages"][0].update(cached="yes"),
    "artifacts/0/sha256": lambda r: r["artifacts"][0].update(sha256="short"),
    "error": lambda r: r.update(error=3),
    "record": lambda r: r.pop("seed"),
    "more": lambda r: r.update(more=1),
}


@pytest.mark.parametrize("place", DAMAGE)
def test_each_kind_of_damage_is_refused_and_its_place_named(tmp_path: Path, place: str) -> None:
    values = full(tmp_path).to_dict()
    validate(copy.deepcopy(values))
    DAMAGE[place](values)
    (tmp_path / FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError) as error:
        validate(values)
    assert str(error.value).startswith("record: " if place == "more" else f"{place}: ")
    with pytest.raises(UserError, match="record.json is no record of filtrun"):
        Record.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_a_broken_file(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="is no record of filtrun"):
        Record.read(tmp_path)


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder: there is no record.json in it"):
        Record.read(tmp_path)
    with pytest.raises(UserError, match="is no run folder"):
        Record.read(tmp_path / "none")


@pytest.mark.parametrize("where", ["json.dump", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_record_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    record = full(tmp_path)
    record.write()
    before = (tmp_path / FILE).read_bytes()

    def no_room(*arguments: Any, **_: Any) -> None:
        if where == "json.dump":
            arguments[1].write('{"half":')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"filtrun.record.{where}", no_room)
    record.status = "failed"
    with pytest.raises(RunFailure, match="record.json could not be written: No space left on device"):
        record.write()
    monkeypatch.undo()
    assert (tmp_path / FILE).read_bytes() == before and os.listdir(tmp_path) == [FILE]


def test_an_invalid_record_is_never_written(tmp_path: Path) -> None:
    record = full(tmp_path)
    record.metrics["no split"] = 1.0
    with pytest.raises(ValueError, match="no split"):
        record.write()
    assert os.listdir(tmp_path) == []
