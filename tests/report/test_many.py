from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path

import pytest

from filtrun.errors import RunFailure, UserError
from filtrun.report import export
from filtrun.report.fairness import differences, tried, unlike
from filtrun.report.formats import FORMATS
from filtrun.report.index import read_records
from filtrun.report.many import Question, folder_sheet
from filtrun.report.select import parse_where

ACCURACY = {("lora", 0.1): (0.5, 0.75, 1.0), ("lora", 0.2): (0.25, 0.25, 0.25), ("full", 0.1): (0.6, 0.8, 0.7)}


@pytest.fixture
def folder(records, tmp_path):
    """Two methods, one with two learning rates, three seeds each; and a run that failed."""
    runs = tmp_path / "many"
    for (method, lr), values in ACCURACY.items():
        for seed, value in enumerate(values):
            _write(
                records,
                runs / f"{method}-{lr}-{seed}",
                method,
                lr,
                seed,
                {"test/accuracy": value, "test/nll": 1 - value},
            )
    _write(records, runs / "lora-0.1-9", "lora", 0.1, 9, {"base/accuracy": 0.1}, status="failed")
    return runs


def _write(records, place, method, lr, seed, metrics, **more):
    config = {
        "seed": seed, "scale": "laptop", "task": {"_target_": "filtrun.tasks.classify.Classify"},
        "trainer": {"lr": lr, "batch_size": 10}, "method": {method: {"rank": 4}}, "pretrain": {"seed": seed},
    }  # fmt: skip
    cost = {"steps": 300, "flops": 1e6 if method == "lora" else 2e6, "total_params": 100}
    report = {method: {"rank": 4 + seed}}
    parts = dict(
        task="classify", evaluation={"split": "test"}, environment={"device": "cpu", "torch": "2.13", "git": "a"}
    )
    records.write_record(
        place, config=config, seed=seed, methods=[method], metrics=metrics, cost=cost, report=report, **parts, **more
    )


def asked(folder, **question):
    return folder_sheet(read_records(folder), Path(folder), Question(**question))


def test_groups_have_mean_deviation_and_count(folder):
    sheet = asked(folder, by=("methods", "trainer.lr"), metrics=("test/accuracy", "cost/flops", "report/rank"))
    assert [[b.text for b in row] for row in sheet.rows] == [
        ["full", "0.1", "3", "70.00 ± 10.00 %", "2 MFLOP", "5 ± 1"],
        ["lora", "0.1", "3", "75.00 ± 25.00 %", "1 MFLOP", "5 ± 1"],
        ["lora", "0.2", "3", "25.00 ± 0.00 %", "1 MFLOP", "5 ± 1"],
    ]
    assert [row[3].mark for row in sheet.rows] == ["second", "best", ""] and sheet.rows[1][4].mark == "best"
    assert sheet.columns[3].better == "higher" and sheet.columns[4].better == "lower"
    for row in sheet.data["rows"]:
        values = ACCURACY[row["methods"], row["trainer.lr"]]
        assert row["test/accuracy"] == pytest.approx(statistics.mean(values)) and row["n"] == 3
        assert row["test/accuracy std"] == pytest.approx(statistics.stdev(values))
    assert "left out because they are not finished: 1 failed (--where status=... shows them)" in sheet.notes


def test_pivot_puts_values_into_columns(folder):
    sheet = asked(folder, by=("methods",), pivot="trainer.lr", metrics=("test/accuracy",))
    assert [c.group for c in sheet.columns] == ["", "trainer.lr=0.1", "trainer.lr=0.2"]
    assert [[b.text for b in row] for row in sheet.rows] == [
        ["full", "70.00 ± 10.00 %", "-"], ["lora", "75.00 ± 25.00 %", "25.00 ± 0.00 %"],
    ]  # fmt: skip
    assert (
        sheet.data["rows"][0]["trainer.lr=0.2 n"] == 0 and sheet.data["rows"][0]["trainer.lr=0.2 test/accuracy"] is None
    )
    assert r"\multicolumn{1}{c}{trainer.lr=0.1}" in FORMATS["latex"]([sheet])


def test_single_records_are_sorted_and_cut(folder):
    sheet = asked(folder, sort="test/accuracy", limit=2, where=tuple(parse_where(["trainer.lr=0.1"])))
    assert [row[0].text for row in sheet.rows] == ["lora-0.1-2", "full-0.1-1"]  # the best first
    assert [c.title for c in sheet.columns] == ["run", "methods", "seed", "status", "accuracy", "NLL"]
    assert "and 5 records more: --limit 0 shows all" in sheet.notes[0]
    assert len(sheet.data["rows"]) == 7 and sheet.data["rows"][-1]["test/accuracy"] is None  # the failed one, last
    turned = asked(folder, sort="test/accuracy", reverse=True)
    assert turned.rows[-1][0].text == "lora-0.1-9" and turned.rows[0][0].text == "lora-0.2-0"
    assert [r[0].text for r in asked(folder, sort="cost/flops", columns=("seed",)).rows][-1] == "full-0.1-2"


def test_grouping_against_a_slow_reference(folder):
    everything = [json.loads(p.read_text()) for p in sorted(folder.glob("*/record.json"))]
    for key, get in {"seed": lambda r: r["seed"], "methods": lambda r: r["methods"][0],
                     "trainer.lr": lambda r: r["config"]["trainer"]["lr"]}.items():  # fmt: skip
        want = {}
        for record in everything:
            if record["status"] == "finished" and record["config"]["trainer"]["lr"] < 0.15:
                want.setdefault(get(record), []).append(record["metrics"]["test/nll"])
        sheet = asked(folder, by=(key,), where=tuple(parse_where(["trainer.lr<0.15"])), metrics=("test/nll",))
        found = {row[key]: (row["n"], row["test/nll"]) for row in sheet.data["rows"]}
        assert found == {k: (len(v), pytest.approx(statistics.mean(v))) for k, v in want.items()}


def test_the_same_cell_twice_is_no_second_seed(records, folder):
    _write(records, folder / "z" / "again", "full", 0.1, 0, {"test/accuracy": 0.9})
    sheet = asked(folder, by=("methods",), metrics=("test/accuracy",), where=tuple(parse_where(["methods=full"])))
    assert sheet.data["rows"][0]["n"] == 3 and "1 repeat what another record computed and count once" in sheet.notes
    assert sheet.data["rows"][0]["test/accuracy"] == pytest.approx((0.9 + 0.8 + 0.7) / 3)


def test_what_is_said_with_a_table(folder):
    sheet = asked(folder, by=("methods", "trainer.lr"))
    assert sheet.caption[:3] == [
        "laptop scale, not the paper's setting", "data digits; model unet (100 parameters); task classify",
        "budget: 300 steps of 10, 3,000 images seen",
    ]  # fmt: skip
    assert "seeds 0, 1, 2" in sheet.caption and "measured with split: test" in sheet.caption
    assert (
        f"tuning: settings recorded below {folder} with one task, data, model and scale: full 1, lora 2"
        in sheet.caption
    )
    assert sheet.warnings == ["unlike tuning: settings tried: 1 (full), 2 (lora)"]
    mixed = asked(folder, by=("methods",))
    assert "mixed within a row: trainer.lr: 0.1, 0.2 (lora)" in mixed.warnings


def test_rows_that_are_unlike(folder):
    def rows(**changes):
        found = [r | {"config": dict(r["config"])} for r in read_records(folder) if r["config"]["trainer"]["lr"] == 0.1]
        made = {"full": [r for r in found if "full" in r["methods"]]}
        made["lora"] = [r | changes for r in found if "lora" in r["methods"] and r["status"] == "finished"]
        return made

    assert differences(rows(), ["methods"]) == ({}, {}) and unlike(rows()) == []
    between = differences(rows(config={"trainer": {"lr": 0.3, "batch_size": 10}}), ["methods"])[1]
    assert between["trainer.lr"] == "0.1 (full), 0.3 (lora)" and "method.full.rank" not in between
    assert differences(rows(config={"trainer": {"lr": 0.3}}), ["methods", "trainer.lr"])[1].keys() >= {
        "trainer.batch_size"
    }
    one = rows(config={"trainer": {"lr": 0.1, "batch_size": 10}, "split_seed": 1})
    for record in one["full"]:
        record["config"]["split_seed"] = 0
    assert differences(one, ["methods"])[1]["split_seed"] == "0 (full), 1 (lora)"  # another seed than the run's is told
    assert unlike(rows(environment={"device": "cuda", "torch": "2.13", "git": "b"})) == [
        "the cells were run with unlike device: cpu, cuda",
        "the cells were run with unlike versions of the code (git): a, b",
    ]  # fmt: skip
    assert unlike(rows(evaluation={"split": "val"})) == ["measured unlike: split: test (full), val (lora)"]
    (line,) = unlike(rows(cost={"steps": 7}))
    assert line == "unlike budgets: 300 steps of 10, 3,000 images seen (full); 7 steps of 10, 70 images seen (lora)"
    fewer = rows()
    fewer["lora"] = fewer["lora"][:2]
    assert unlike(fewer) == ["the rows have unlike numbers of seeds: 3 (full), 2 (lora)"]
    fewer["full"] = fewer["full"][1:]
    assert unlike(fewer) == ["the rows have unlike seeds: 1, 2 (full), 0, 1 (lora)"]
    found = read_records(folder)
    assert tried(found, found) == {"full": 1, "lora": 2}


def test_files_for_programs(folder):
    sheet = asked(folder, columns=("all",))
    rows = list(csv.DictReader(io.StringIO(export.rendered([sheet], "csv").decode())))
    assert len(rows) == 10 and rows[0]["trainer.lr"] == "0.1"
    assert rows[0]["test/accuracy"] == "0.6" and rows[0]["cost/steps"] == "300" and rows[0]["methods"] == "full"
    assert json.loads(export.rendered([sheet], "json"))[0]["rows"][3]["report/rank"] == 4
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = parquet.read_table(pyarrow.BufferReader(export.rendered([sheet], "parquet")))
    assert table.num_rows == 10 and table["test/accuracy"].to_pylist()[:3] == [0.6, 0.8, 0.7]
    assert table["seed"].type == pyarrow.int64() and table["test/accuracy"].null_count == 1


def test_without_pyarrow_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"^parquet needs pyarrow: pip install 'filtrun\[parquet\]'$"):
        export.rendered([asked(folder)], "parquet")


def test_latex_and_markdown_mark_the_best(folder):
    sheet = asked(folder, by=("methods", "trainer.lr"), metrics=("test/accuracy",))
    text = FORMATS["latex"]([sheet])
    assert (
        r"\textbf{75.00 $\pm$ 25.00 \%}" in text and r"\underline{70.00 $\pm$ 10.00 \%}" in text and r"\toprule" in text
    )
    assert "**75.00 ± 25.00 %**" in FORMATS["md"]([sheet])


def test_what_cannot_be_answered(records, folder, tmp_path):
    for question, message in {
        Question(
            by=("method.lora.rnak",)
        ): "--by method.lora.rnak: no record has such a key; did you mean 'method.lora.rank'",
        Question(where=tuple(parse_where(["seed>50"]))): "none of 10 records below .* has seed>50",
        Question(by=("seed",), where=tuple(parse_where(["seed=9"]))): "none of the 1 records is finished",
    }.items():
        with pytest.raises(UserError, match=message):
            folder_sheet(read_records(folder), folder, question)
    with pytest.raises(UserError, match="there is no record below"):
        folder_sheet([], tmp_path, Question())
    with pytest.raises(RunFailure, match="could not be written"):
        export.write(tmp_path / "nowhere" / "t.md", b"x")
