from __future__ import annotations

import json
import subprocess
import sys

import pytest

from filtrun.errors import UserError
from filtrun.report.difference import difference
from filtrun.verbs import diff


@pytest.fixture
def pair(records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    first = records.make_record()
    config = first["config"] | {"seed": 2, "device": "cuda", "trainer": {"lr": 0.1}, "data": {"few_shot": 5}}
    metrics = first["metrics"] | {"test/fid": 6.205, "test/target_accuracy": 0.917 + 1e-15}
    second = {
        "config": config, "seed": 2, "metrics": metrics, "cost": first["cost"] | {"steps": 600},
        "environment": first["environment"] | {"git": "abc", "device": "cuda"}, "name": "b[red]",
    }  # fmt: skip
    records.write_record(tmp_path / "outputs" / "runs" / "a")
    records.write_record(tmp_path / "outputs" / "runs" / "b", **second)
    return first, first | second


def test_what_differs(pair):
    found = difference(*pair)
    assert found["config"] == {"trainer.lr": {"b": 0.1}} and found["data"] == {"data.few_shot": {"b": 5}}
    assert found["machine"] == {"device": {"b": "cuda"}} and not found["same_cell"]
    assert found["code"] == {"git": {"a": None, "b": "abc"}} and set(found["environment"]) == {"device"}
    assert set(found["run"]) == {"name", "seed"} and found["evaluation"] == found["report"] == {}
    assert found["metrics"] == {"test/fid": {"a": 12.41, "b": 6.205, "difference": -6.205, "relative": -0.5}}
    assert found["cost"] == {"steps": {"a": 300, "b": 600, "difference": 300, "relative": 1.0}}
    assert found["equal"]["metrics"] == 8 and found["equal"]["evaluation"] == 3


def test_a_run_and_itself(pair):
    found = difference(pair[0], pair[0])
    assert found["same_cell"] and not any(found[part] for part in diff.TITLES)


def test_missing_and_zero_values_have_no_ratio(pair):
    first, second = pair
    second = second | {"metrics": {"test/fid": None, "test/new": 1.0}, "cost": {"steps": 4}}
    found = difference(first | {"metrics": {"test/fid": 2.0}, "cost": {"steps": 0}}, second)
    assert found["metrics"]["test/fid"] == {"a": 2.0, "b": None, "difference": None, "relative": None}
    assert found["metrics"]["test/new"] == {"b": 1.0, "difference": None, "relative": None}
    assert found["cost"]["steps"] == {"a": 0, "b": 4, "difference": 4, "relative": None}


def test_it_is_printed_and_in_json(pair, capsys):
    assert diff.main(["a", "outputs/runs/b"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "b: b[red], finished, outputs/runs/b" in lines and "They compute different things." in lines
    assert "trainer.lr - 0.1" in lines and "steps 300 600 +300 +100.00%" in lines
    assert "test/fid 12.41 6.21 -6.21 -50.00%" in lines or "test/fid 12.41 6.20 -6.21 -50.00%" in lines
    assert diff.main(["a", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["test/fid"]["relative"] == -0.5
    assert diff.main(["a", "a"]) == 0 and "They compute the same." in capsys.readouterr().out


def test_mistakes_are_one_line(pair):
    for words, message in ((["a", "bb"], "there is no run 'bb'"), (["a", "b", "--jsn"], "--jsn is no option; did you")):
        with pytest.raises(UserError, match=message):
            diff.main(words)


def test_torch_is_not_imported(pair):
    code = "import sys\nfrom filtrun.cli import main\nmain(['diff', 'a', 'b'])\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
