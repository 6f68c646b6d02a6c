from __future__ import annotations

import json

import pytest

from filtrun.errors import UserError
from filtrun.verbs import info
from filtrun.verbs.info import readable


def told(capsys, *arguments):
    assert info.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys, monkeypatch, *arguments, width=100):
    monkeypatch.setenv("COLUMNS", str(width))
    assert info.main(list(arguments)) == 0
    return capsys.readouterr().out


def option(entry, key):
    return next(o for o in entry["options"] if o["key"] == key)


def test_a_method_and_its_paper(capsys):
    method, paper = told(capsys, "sara")
    assert (method["kind"], paper["kind"]) == ("methods", "papers")
    assert method["use"] == "method=sara" and method["facts"]["trains"] == "part"
    assert {"edit_model", "param_groups", "finish"} <= set(method["hooks"]) and "guide" not in method["hooks"]
    assert option(method, "method.sara.rank_min_dim") == {
        "key": "method.sara.rank_min_dim", "default": 64, "required": False, "type": "int", "allowed": ">= 0",
        "meaning": "matrices with a side up to this are left out of the nuclear norm", "source": "optim/adamw.py",
    }  # fmt: skip
    assert option(method, "method.sara.memory")["allowed"] == "scatter, dense"
    assert option(method, "method.sara.fraction")["allowed"] == "0 to 1 or null"
    assert paper["card"]["tables"][0]["runs"] == {"smoke": 3, "laptop": 9, "paper": 9}


def test_the_default_is_the_configs_value(capsys, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "few.yaml").write_text("# Few.\n_target_: filtrun.data.digits.Digits\nfew_shot: 7\n")
    (few,) = told(capsys, "few", "--config-dir", str(tmp_path))
    assert option(few, "data.few_shot")["default"] == 7
    assert option(few, "data.val_fraction")["default"] == 0.1  # not in the file: the class's


def test_a_model_explains_the_keys_the_runner_reads(capsys):
    (unet,) = told(capsys, "unet")
    assert option(unet, "model.base")["allowed"] == "pretrain, scratch, checkpoint, hub"
    assert option(unet, "model.normalize")["allowed"] == "data, imagenet, half, none"
    assert "feature map sides" in option(unet, "model.attention")["meaning"]
    (resnet,) = told(capsys, "resnet20")  # its builder's docstring is silent: the config's comment speaks
    assert option(resnet, "model.width")["meaning"].startswith("channels of the first stage")


def test_a_data_set_a_task_and_the_trainer(capsys):
    (digits,) = told(capsys, "digits")
    assert digits["facts"] == {
        "licence": "CC BY 4.0 (UCI Machine Learning Repository)", "image size": 8, "channels": 1,
    }  # fmt: skip
    (task,) = told(capsys, "diffuse")
    assert task["metrics"]["fid"]["better"] == "lower" and list(task["metrics"])[0] == "fid"
    (trainer,) = told(capsys, "trainer")
    assert option(trainer, "trainer.optimizer")["allowed"] == "adamw, adam, sgd, muon, auon"
    assert option(trainer, "trainer.momentum")["allowed"] == "0 to 1"


def test_pages(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, "sara")
    for part in ("sara (method)", "sara (paper)", "filtrun method=sara", "method.sara.OPTION=VALUE", "readme: 2e-3",
                 "https://arxiv.org/abs/2409.06633", "134.96", "a part of the parameters", "laptop: "):  # fmt: skip
        assert part in text
    assert text.count("134.96") == 1  # the card is shown once, with the paper


@pytest.mark.parametrize(
    "name", ["sara", "unet", "folder", "diffuse", "trainer", "wandb", "smoke", "diffusers", "cifar100"]
)
def test_every_page_fits_80_columns(capsys, monkeypatch, name):
    text = shown(capsys, monkeypatch, name, width=80)
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text and "…" not in text


def test_what_else_a_config_sets(capsys, monkeypatch):
    assert "task.noise=linear, task.prediction=eps" in shown(capsys, monkeypatch, "diffusers")


def test_published_numbers_of_a_method_without_a_card(capsys, monkeypatch, tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(
        "# Mine.\nmine:\n  _target_: my_kit.Mine\n  deep: 2  # layers\n  claims:\n    - {metric: FID, published: 3.5}\n"
    )
    text = shown(capsys, monkeypatch, "mine", "--config-dir", str(tmp_path))
    assert "Published: metric=FID, published=3.5" in text and "layers" in text


def test_whole_numbers_are_printed_as_such(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, "misf", width=80)
    assert "23,059,166" in text and "23059166" not in text
    assert "647,328" in shown(capsys, monkeypatch, "dpenet", width=80)


def test_unknown_names():
    with pytest.raises(UserError, match="nothing is called 'resnt20'; did you mean 'resnet20'"):
        info.main(["resnt20"])
    with pytest.raises(UserError, match="required: NAME"):
        info.main([])


def test_readable_joins_wrapped_lines_only():
    long = "x" * 80
    assert readable(f"{long}\nnext\n- a\n>>> f()  # doctest: +SKIP\n``y``") == f"{long} next\n- a\n>>> f()\n`y`"
