from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from filtrun.errors import UserError
from filtrun.report.card import read_card
from filtrun.verbs import info, list_, table


@pytest.fixture
def here(cards, run_sweeps, tmp_path, monkeypatch):
    """A working folder with the example card and all its records at laptop scale."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    cards.write_card(tmp_path / "conf")
    shutil.copytree(run_sweeps, tmp_path / "outputs" / "sweeps")
    return tmp_path


def told(capsys, *words, code=0):
    assert table.main(["tiny", "--config-dir", "conf", *words]) == code
    return capsys.readouterr().out


def test_every_format_has_the_numbers(here, capsys):
    assert "92.00 ± 2.00 %" in told(capsys) and "holds: all beats some" in told(capsys, "--scale", "laptop")
    assert "**92.00 ± 2.00 %**" in told(capsys, "--format", "md")
    assert r"\textbf{92.00 $\pm$ 2.00 \%}" in told(capsys, "--format", "latex")
    assert "<strong>92.00 ± 2.00 %</strong>" in told(capsys, "--format", "html")
    (data,) = json.loads(told(capsys, "--format", "json"))
    assert data["rows"]["full"]["metrics"]["test/accuracy"]["mean"] == pytest.approx(0.92) and data["missing"] == []


def test_several_scales_rows_and_seeds(here, capsys):
    smoke, laptop = json.loads(told(capsys, "--scale", "smoke,laptop", "--format", "json", "--seeds", "1,2"))
    assert (smoke["scale"], laptop["scale"], laptop["seeds"]) == ("smoke", "laptop", [1, 2])
    assert len(smoke["missing"]) == 6 and laptop["rows"]["none"]["n"] == 2
    (data,) = json.loads(told(capsys, "--rows", "head,none", "--format", "json"))
    assert list(data["rows"]) == ["head", "none"] and [c["verdict"] for c in data["claims"]] == ["does not hold"]


def test_another_folder_of_sweeps(here, capsys):
    (here / "outputs" / "sweeps").rename(here / "elsewhere")
    assert "9 of 9 cells are not run (cost unknown); --run does" in told(capsys)
    assert "not run" not in told(capsys, "--sweep-dir", "elsewhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tinny"], "unknown paper 'tinny' (`filtrun list papers` has all); did you mean 'tiny'?"),
        (
            ["tiny", "--scale", "laptpo"],
            "unknown scale 'laptpo' (allowed: smoke, laptop, paper); did you mean 'laptop'?",
        ),
        (["tiny", "--scale", "paper"], "tiny has no table at scale paper; it has smoke, laptop"),
        (
            ["tiny", "--format", "htm"],
            "unknown format 'htm' (allowed: rich, md, latex, html, json, csv, parquet); did you mean 'html'?",
        ),
        (["tiny", "--rows", "fulll"], "--rows fulll: the paper tiny has no such row; did you mean 'full'"),
        (["tiny", "--seeds", "0,a"], "--seeds 0,a must be whole numbers"),
        (["tiny", "--formt", "md"], "--formt is no option; did you mean '--format'"),
        (["tiny", "trainer.lr=1"], "trainer.lr=1: a card says what its cells compute"),
        (["tiny", "device"], "device: a card says"),
        (["tiny", "--force"], "--force goes with --run"),
        (["gallery", "--rows", "tny"], "--rows tny: no such paper; did you mean 'tiny'"),
        (["gallery", "--write-card"], "--write-card takes one paper"),
        (["tiny", "--write-card", "--scale", "smoke"], "at a scale whose numbers mean something"),
        (["tiny", "--by", "seed"], "--by goes with a folder of records; a paper's card says"),
        (["tiny", "--limit", "0"], "--limit goes with a folder of records"),
        (
            ["tiny", "--where", "trainer.lrr=1"],
            "--where trainer.lrr: no record has such a key; did you mean 'trainer.lr'",
        ),
        (["tiny", "--where", "seed=7"], "no cell of the table has seed=7"),
        (["tiny", "--where", "seed=1", "--write-card"], "not with --write-card"),
        (["gallery", "--where", "seed=1"], "--where goes with the table of one paper or a folder"),
        (["tiny", "--out", "x.doc"], "--out x.doc: give --format, or a name that ends in .md, .tex"),
        (["tiny", "--format", "parquet"], "give --out FILE.parquet"),
        (["./tiny"], "there is no folder ./tiny"),
        ([], "required: PAPER"),
    ],
)
def test_mistakes_are_one_line(here, words, message):
    with pytest.raises(UserError) as error:
        table.main([*words, "--config-dir", "conf"])
    assert message in str(error.value) and ("\n" not in str(error.value) or not words)


def test_some_cells_of_a_paper(here, capsys):
    out = told(capsys, "--where", "seed<2,methods!=none")
    assert "only cells with seed<2, methods!=none" in out and "seeds 0, 1;" in out and "\nnone" not in out
    shutil.rmtree(here / "outputs" / "sweeps")
    (data,) = json.loads(told(capsys, "--where", "seed=2", "--where", "method~probe", "--format", "json"))
    assert [(m["row"], m["seed"]) for m in data["missing"]] == [("head", 2)]  # known of a cell before it is run


def test_a_table_in_a_file(here, capsys):
    told(capsys, "--out", "t.md")
    assert "**92.00 ± 2.00 %**" in (here / "t.md").read_text()
    with pytest.raises(UserError, match="t.md exists; choose another --out, or --overwrite"):
        told(capsys, "--out", "t.md")
    told(capsys, "--out", "t.md", "--overwrite", "--format", "csv")
    lines = (here / "t.md").read_text().splitlines()
    assert lines[0].startswith("paper,table,scale,row,seed,test/accuracy") and len(lines) == 10
    assert lines[4].startswith("tiny,main,laptop,head,0,0.8,")
    assert sorted(p.name for p in here.iterdir()) == ["conf", "outputs", "t.md"]


def test_a_broken_card_says_what_is_wrong(here):
    (here / "conf" / "paper" / "torn.yaml").write_text("title: [\n")
    with pytest.raises(UserError, match=r"torn.yaml, line"):
        table.main(["torn", "--config-dir", "conf"])


def test_the_gallery(here, capsys):
    assert table.main(["gallery", "--rows", "tiny", "--config-dir", "conf", "--format", "md"]) == 0
    out = capsys.readouterr().out
    assert "| full | Tiny | 2024 | peft | classify, digits | accuracy ↑ | **92.00 ± 2.00 % (3)** |" in out
    assert "head 81.33 ± 1.53 % (3)" in out and "| 1/2 |" in out
    assert table.main(["gallery", "--rows", "tiny", "--config-dir", "conf", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["papers"][0]["baseline"]["mean"] == pytest.approx(0.8133, abs=1e-4)


def test_a_card_keeps_what_was_measured_and_info_and_list_show_it(here, capsys, monkeypatch):
    def status():
        list_.main(["papers", "--json", "--config-dir", "conf"])
        return next(row["claims"] for row in json.loads(capsys.readouterr().out) if row["name"] == "tiny")

    path = here / "conf" / "paper" / "tiny.yaml"
    told(capsys, "--write-card")
    (measured,) = read_card(path).table("main").measured
    assert measured.rows["head"]["test/accuracy"] == (0.8, 0.83, 0.81) and measured.device == "cpu (x86_64)"
    assert status() == "holds 1/2 (laptop)"
    shutil.rmtree(here / "outputs")  # a new user has none
    assert status() == "holds 1/2 (laptop)"
    assert info.main(["tiny", "--config-dir", "conf"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for part in (f"holds (laptop, 3 seeds, {measured.date}): test/accuracy(full)", "does not hold (laptop, 3 seeds",
                 "92.00 ± 2.00 %", f"Measured at laptop scale, seeds 0, 1, 2, {measured.date}"):  # fmt: skip
        assert part in page
    out = told(capsys)
    assert "92.00" not in out and "the card has numbers measured at laptop scale" in out


def test_without_records_there_is_nothing_to_write(here, capsys):
    shutil.rmtree(here / "outputs")
    with pytest.raises(
        UserError, match="no row of main at laptop scale is run with all seeds; run `filtrun table tiny"
    ):
        table.main(["tiny", "--config-dir", "conf", "--write-card"])
    assert "measured" not in (here / "conf" / "paper" / "tiny.yaml").read_text()
    with pytest.raises(UserError, match="tiny"):
        told(capsys, "--write-card", "--scale", "paper")


def test_torch_is_not_imported(here):
    code = (
        "import sys\nfrom filtrun.verbs import table\ntable.main(['tiny', '--config-dir', 'conf'])\n"
        "assert not {'torch', 'numpy', 'lightning_fabric'} & set(sys.modules)"
    )
    for _ in range(2):  # composed, and from what was kept of it: then without Hydra
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and "92.00 ± 2.00 %" in done.stdout, done.stderr
        code = code.replace("{'torch'", "{'hydra', 'omegaconf', 'torch'")
