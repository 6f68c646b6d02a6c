"""`filtrun report`: the file it writes, and what it says when it cannot."""

from __future__ import annotations

import subprocess
import sys


def test_a_page_is_written_and_replaced_but_no_other_file(cli, records, tmp_path) -> None:
    for seed in range(2):
        records.write_record(tmp_path / "runs" / str(seed), seed=seed)
    done = cli("report", "runs", "--out", "page.html")
    assert done.code == 0 and "page.html: 2 runs" in done.out, done.err
    first = (tmp_path / "page.html").read_text()
    assert first.startswith("<!doctype html>") and "<title>runs · filtrun report</title>" in first
    assert cli("report", "runs", "--out", "page.html", "--where", "seed=1").code == 0
    assert "seed=1" in (tmp_path / "page.html").read_text()
    (tmp_path / "mine.html").write_text("my notes")
    refused = cli("report", "runs", "--out", "mine.html")
    assert refused.code == 2 and "--force" in refused.err
    assert (tmp_path / "mine.html").read_text() == "my notes"
    assert cli("report", "runs", "--out", "mine.html", "--force").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.html", "page.html", "runs"]


def test_mistakes_are_told_in_one_line(cli, records, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    records.write_record(tmp_path / "runs" / "a")
    for words, told in (
        (("nowhere",), "there is no folder nowhere"),
        (("empty",), "there is no run below empty"),
        (("runs", "--where", "seed=99"), "there is no run below runs for which seed=99"),
        (("runs", "--out", "empty"), "is a folder"),
        (("runs", "--out", "none/page.html"), "there is no folder none"),
        (("runs", "--whre", "a=1"), "--where"),
    ):
        result = cli("report", *words)
        assert result.code == 2 and told in result.err and len(result.err.splitlines()) <= 2, result.err
    assert not (tmp_path / "report.html").exists()


def test_torch_is_not_loaded(records, tmp_path) -> None:
    records.write_record(tmp_path / "runs" / "a")
    code = (
        "import sys; from filtrun.cli import main; code = main(['report', 'runs']); "
        "print(code, sorted({'torch', 'matplotlib', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
