from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

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
    assert cost("from filtrun.verbs import info\ninfo.main(['sara'])") < 60 * bare


def test_modules_are_importable_as_verbs():
    assert callable(list_.main) and callable(info.main)
