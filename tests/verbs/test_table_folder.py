from __future__ import annotations

import json
import subprocess
import sys

import pytest

from filtrun.errors import UserError
from filtrun.verbs import table


@pytest.fixture
def here(run_sweeps, records, tmp_path, monkeypatch):
    """A working folder with the nine records of the example card and one that is broken."""
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    shutil.copytree(run_sweeps, tmp_path / "outputs" / "sweeps")
    (tmp_path / "outputs" / "runs" / "torn").mkdir(parents=True)
    (tmp_path / "outputs" / "runs" / "torn" / "record.json").write_text("{")
    return tmp_path


def told(capsys, *words):
    assert table.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_every_record_and_groups(here, capsys):
    out = told(capsys, "outputs")
    assert "9 records below outputs" in out and "1 files could not be read, outputs/runs/torn/record.json first" in out
    assert sum(line.startswith("sweeps/") for line in out.splitlines()) == 9
    out = " ".join(told(capsys, "outputs", "--by", "methods", "--metric", "test/accuracy", "--where", "seed<3").split())
    assert "full 3 92.00 ± 2.00 %" in out and "9 records below outputs with seed<3" in out
    (data,) = json.loads(told(capsys, "outputs", "--by", "methods", "--sort", "test/accuracy", "--format", "json"))
    means = [row["test/accuracy"] for row in data["rows"]]
    assert means == sorted(means, reverse=True) and data["records"] == 9


def test_files_are_named_by_what_they_are(here, capsys):
    told(capsys, "outputs", "--columns", "all", "--out", "t.csv")
    lines = (here / "t.csv").read_text().splitlines()
    assert len(lines) == 10 and "trainer.lr" in lines[0].split(",")
    told(capsys, "outputs", "--by", "methods", "--pivot", "seed", "--out", "t.tex")
    assert r"\begin{tabular}" in (here / "t.tex").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "laptop"], "and outputs is a folder of records; --where scale="),
        (["--run"], "--run goes with a paper's table"), (["device=cpu"], "device=cpu goes with a paper's table"),
        (["--by", "seed", "--columns", "name"], "--columns shows records one by one"),
        (["--columns", "all"], "--columns all is for files"), (["--limit", "-1"], "--limit -1 must be"),
        (["--where", "sead=1"], "--where sead: no record has such a key; did you mean 'seed'"),
        (["--metric", "test/acuracy"], "--metric test/acuracy: no record has such a key; did you mean 'test/accuracy'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(here, words, message):
    with pytest.raises(UserError) as error:
        table.main(["outputs", *words])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_paper_goes_before_a_folder_of_its_name(here, capsys):
    (here / "sara").mkdir()
    with pytest.raises(UserError, match="there is no record below sara"):
        table.main(["./sara"])
    assert "published" in told(capsys, "sara")
    with pytest.raises(UserError, match="there is no folder no/where"):
        table.main(["no/where"])


def test_torch_is_not_imported(here):
    code = (
        "import sys\nfrom filtrun.cli import main\nassert main(['table', 'outputs', '--by', 'methods']) == 0\n"
        "assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
