from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import pytest

from filtrun.catalogue import conf_dir
from filtrun.errors import UserError
from filtrun.verbs import info, list_


def listed(capsys, *arguments):
    assert list_.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_of_methods(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {row["name"]: row for row in listed(capsys, "methods")}
    assert rows["sara"] == {
        "kind": "methods", "name": "sara", "paper": "SaRA", "link": "https://arxiv.org/abs/2409.06633", "year": 2025,
        "summary": "SaRA: train the smallest weights of a pre-trained model (ICLR 2025, arXiv 2409.06633).",
        "family": "peft", "status": "not run",
    }  # fmt: skip
    assert rows["full"]["family"] == "baseline" and rows["full"]["year"] is None
    assert list(rows) == sorted(rows)


def test_kinds_may_be_named_in_any_way(capsys):
    assert {row["kind"] for row in listed(capsys)} == {"methods", "models", "data", "tasks", "papers"}
    assert {row["kind"] for row in listed(capsys, "methods,papers")} == {"methods", "papers"}
    assert {row["kind"] for row in listed(capsys, "method", "data")} == {"methods", "data"}
    assert {"tensorboard", "wandb"} <= {row["name"] for row in listed(capsys, "loggers")}


def test_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert list_.main([]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text and "…" not in text
    for part in ("Methods (", ": method=NAME", "Data sets (", "Papers (", "sara", "digits", "resnet20", "2025"):
        assert part in text


def test_wide_tables_say_what_a_method_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    list_.main(["methods"])
    assert "Train the classification head on frozen features." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metods"], "unknown kind 'metods'; did you mean 'method"),
        (["--jsno"], "--jsno is no option; did you mean '--json'"),
        (["--config-dir", "/no/such"], "no such folder"),
        (["--config-dir"], "expected one argument"),
        (["--status", "plannd"], "--status plannd must be implemented or planned; did you mean 'planned'"),
        (["papers", "--family", "pef"], "no family is called 'pef' here; did you mean 'peft'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        list_.main(arguments)


def test_user_configs_and_broken_ones_are_listed(capsys, tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# Mine.\nmine: {_target_: my_kit.methods.Mine}\n")
    (tmp_path / "method" / "torn.yaml").write_text("torn: {\n")
    rows = {row["name"]: row for row in listed(capsys, "methods", "--config-dir", str(tmp_path))}
    assert (rows["mine"]["summary"], rows["mine"]["family"], rows["mine"]["paper"]) == ("Mine.", "my_kit", None)
    assert rows["torn"]["status"] == "unreadable" and "torn.yaml, line" in rows["torn"]["summary"]


@pytest.mark.parametrize("call", ["list_.main([])", "info.main(['sara'])", "info.main(['trainer', '--json'])"])
def test_neither_torch_nor_hydra_is_imported(call):
    code = (
        "import sys\nfrom filtrun.verbs import info, list_\n" + call + "\nassert not "
        "{'torch', 'hydra', 'omegaconf', 'numpy', 'filtrun.method', 'filtrun.trainer'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_listing_costs_little_cpu_time():
    def cost(code):
        def once():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        return min(once() for _ in range(3))

    bare = cost("pass")
    assert cost("from filtrun.verbs import list_\nlist_.main([])") < 60 * bare
    assert cost("from filtrun.verbs import list_\nlist_.main(['papers'])") < 60 * bare
    assert cost("from filtrun.verbs import info\ninfo.main(['sara'])") < 60 * bare


def test_modules_are_importable_as_verbs():
    assert callable(list_.main) and callable(info.main)


def test_every_paper_is_implemented_or_planned(capsys):
    rows = {row["name"]: row for row in listed(capsys, "papers")}
    cards = {path.stem for path in (conf_dir() / "paper").glob("*.yaml")}
    assert len(rows) == 287 and {n for n, row in rows.items() if row["status"] == "implemented"} == cards
    assert {n for n, row in rows.items() if row["status"] == "planned"} == set(rows) - cards
    assert rows["sara"]["brings"] == "method" and rows["sara"]["family"] == "peft" and "LoRA" in rows["sara"]["claim"]
    salt = rows["salt"]
    assert (salt["year"], salt["link"], salt["claims"]) == (2025, "https://arxiv.org/abs/2503.16055", None)
    assert salt["summary"].startswith("Adapter that scales and shifts") and "2-5% Dice" in salt["claim"]


def test_papers_by_family_and_status(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    both = {row["name"] for row in listed(capsys, "papers", "--family", "peft,guidance", "--status", "planned")}
    assert {"salt", "gfcg"} <= both and not {"sara", "apg", "tas"} & both
    rows = listed(capsys, "--family", "guidance", "--status", "implemented")
    assert {(r["kind"], r["family"]) for r in rows} == {("methods", "guidance"), ("papers", "guidance")}
    assert list_.main(["papers"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and re.search(r"287 papers: \d+ implemented, \d+ planned", text)
    lines = [line.split() for line in text.splitlines()]
    assert ["peft"] in lines and lines.index(["guidance"]) < lines.index(["peft"])
    assert list_.main([]) == 0
    assert "salt" not in (text := capsys.readouterr().out) and "(`filtrun list papers` shows them)" in text


def test_a_users_card_takes_the_place_of_a_planned_paper(capsys, cards, tmp_path):
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "salt.yaml").write_text(json.dumps(cards.CARD))
    (salt,) = (r for r in listed(capsys, "papers", "--config-dir", str(tmp_path)) if r["name"] == "salt")
    assert (salt["status"], salt["paper"], salt["claims"]) == ("implemented", cards.CARD["title"], "not run")


def test_a_planned_paper_says_what_it_claims(capsys, cli):
    told = cli("info", "salt")
    assert told.code == 0 and "Planned, not implemented. It claims: Beats LoRA" in told.out
    refused = cli("table", "salt")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1
    assert "salt is planned, not implemented" in refused.err and "It claims: Beats LoRA" in refused.err
