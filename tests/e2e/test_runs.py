"""The real command on real images: what a user gets, from composition to the stored model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

CLASSIFY = ["task=classify", "model=resnet20", "model.width=4"]


def finished(result: Any, folder: Path, record: Any) -> dict[str, Any]:
    """The record of a run that must have worked, its files checked."""
    from filtrun.stages import file_sha256

    assert result.code == 0, result.err
    values = record(folder)
    assert values["status"] == "finished" and values["error"] is None and len(values["key"]) == 16
    assert all(v is not None and v == v for v in values["metrics"].values())
    for artifact in values["artifacts"]:
        assert file_sha256(folder / artifact["path"]) == artifact["sha256"]
    assert "model" in {a["kind"] for a in values["artifacts"]}
    return values


def test_the_main_job(tmp_path: Path, smoke: Any, record: Any) -> None:
    run = tmp_path / "run"
    done = smoke("logger=tensorboard", f"hydra.run.dir={run}")
    values = finished(done, run, record)
    assert (values["methods"], values["data"], values["model"], values["task"]) == (
        ["sara"],
        "digits",
        "unet",
        "diffuse",
    )
    for line in ("method sara, data digits, model unet, task diffuse", "FID", "old classes kept", f"results: {run}"):
        assert line in done.out
    names = {"fid", "kid", "precision", "recall", "target_accuracy", "source_accuracy", "source_fid"}
    assert set(values["metrics"]) == {f"{split}/{name}" for split in ("base", "tuned", "test") for name in names}
    cost = values["cost"]
    assert cost["trainable_params"] == round(0.15 * cost["total_params"]) and cost["steps"] == 4 and cost["nfe"] == 3
    assert cost["stored_bytes"] == (run / "model.safetensors").stat().st_size < 4 * cost["total_params"]
    assert [s["name"] for s in values["stages"]] == ["pretrain", "judge", "features", "evaluate-base"]
    assert values["overrides"][0] == "scale=smoke" and values["config"]["trainer"]["steps"] == 4
    assert [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()] == [2, 4]
    from PIL import Image

    for name in ("samples_before.png", "samples.png"):
        with Image.open(run / name) as image:
            assert image.size[1] == 7 * (48 + 2) + 2 and image.size[0] > 10 * 50  # 4 old and 3 new classes, 10 each
    assert list((run / "tensorboard").iterdir()) and not (run / "checkpoints").exists()
    config = (run / ".hydra" / "config.yaml").read_text()
    assert "_target_: filtrun.methods.peft.sara.SaRA" in config


@pytest.mark.parametrize(
    ("method", "model", "trained"),
    [
        ("full", CLASSIFY, lambda total: total),
        ("none", CLASSIFY, lambda total: 0),
        ("linear_probe", CLASSIFY, lambda total: 16 * 10 + 10),
        ("bitfit", ["model=vit", "model.size=nano", "model.depth=2"], None),
        ("lora", ["model=vit", "model.size=nano", "model.depth=2"], None),
    ],
)
def test_methods_on_classifiers(
    tmp_path: Path, smoke: Any, record: Any, method: str, model: list[str], trained: Any
) -> None:
    values = finished(smoke(*model, f"method={method}", f"hydra.run.dir={tmp_path / 'run'}"), tmp_path / "run", record)
    total, count = values["cost"]["total_params"], values["cost"]["trainable_params"]
    assert count == trained(total) if trained else 0 < count < total / 2
    metrics = values["metrics"]
    assert {n.partition("/")[2] for n in metrics} == {"accuracy", "top5", "nll", "ece", "source_accuracy", "source_nll"}
    changed = [n for n in metrics if n.startswith("base/") and metrics[n] != metrics[n.replace("base/", "test/")]]
    assert bool(changed) == (method != "none")
    if method not in ("none", "linear_probe"):  # four steps on the new classes; a head alone needs more
        assert metrics["test/nll"] < metrics["base/nll"]


def test_without_a_base_all_classes_are_trained(tmp_path: Path, smoke: Any, record: Any) -> None:
    words = [
        *CLASSIFY,
        "method=full",
        "model.base=scratch",
        "trainer.steps=60",
        "trainer.batch_size=64",
        "trainer.lr=0.01",
    ]
    values = finished(smoke(*words, f"hydra.run.dir={tmp_path / 'run'}"), tmp_path / "run", record)
    assert set(values["metrics"]) == {f"{s}/{n}" for s in ("tuned", "test") for n in ("accuracy", "top5", "nll", "ece")}
    assert values["metrics"]["test/accuracy"] > 0.8 and values["stages"] == []
    assert values["evaluation"]["classes"] == "all" and values["evaluation"]["images"] == 359


def test_a_folder_of_photographs(tmp_path: Path, photos: Path, smoke: Any, record: Any) -> None:
    words = ["data=folder", f"data.root={photos}", "data.size=24", "method=full"]
    scratch = [*CLASSIFY, *words, "model.base=scratch", "trainer.steps=30", "trainer.lr=0.01"]
    values = finished(smoke(*scratch, f"hydra.run.dir={tmp_path / 'a'}"), tmp_path / "a", record)
    assert values["metrics"]["test/accuracy"] > 0.6  # three photographs; chance is a third
    adapt = ["model=unet", "model.size=nano", *words, "data.target=[2]", f"hydra.run.dir={tmp_path / 'b'}"]
    values = finished(smoke(*adapt), tmp_path / "b", record)
    assert "test/fid" in values["metrics"] and (tmp_path / "b" / "samples.png").exists()


def test_a_streamed_folder_computes_what_a_resident_one_does(
    tmp_path: Path, photos: Path, smoke: Any, record: Any
) -> None:
    words = [*CLASSIFY, "model.base=scratch", "method=full", "data=folder", f"data.root={photos}", "data.size=16"]
    results = []
    for name, options in {"a": ["data.in_memory=true"], "b": ["data.in_memory=false", "data.workers=1"]}.items():
        done = smoke(*words, *options, "trainer.clip=0", f"hydra.run.dir={tmp_path / name}")
        results.append(finished(done, tmp_path / name, record)["metrics"])
    assert results[0] == results[1]


def test_cifar_files(tmp_path: Path, cifar: Path, smoke: Any, record: Any) -> None:
    words = [*CLASSIFY, "method=full", "data=cifar", f"data.root={cifar}", "task.eval_batch=7"]
    values = finished(smoke(*words, f"hydra.run.dir={tmp_path / 'run'}"), tmp_path / "run", record)
    assert values["evaluation"]["images"] == 4  # two of ten classes are new
    assert "cifar" in values["name"]


def test_weights_from_a_file(tmp_path: Path, smoke: Any, record: Any) -> None:
    from safetensors.torch import save_file

    from filtrun.models.resnet import cifar_resnet

    torch.manual_seed(5)
    net = cifar_resnet(num_classes=10, in_channels=1, depth=20, width=4)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    words = [*CLASSIFY, "method=none", "model.base=checkpoint", f"model.checkpoint={tmp_path / 'net.safetensors'}"]
    values = finished(smoke(*words, f"hydra.run.dir={tmp_path / 'run'}"), tmp_path / "run", record)
    from filtrun.data.digits import Digits

    data = Digits().setup()
    (mean,), (std,) = data.mean_std()
    test = data.split("test")
    with torch.no_grad():
        logits = net.eval()((test.images.float() / 255 - mean) / std)
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    assert values["metrics"]["test/accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_bf16(tmp_path: Path, smoke: Any, record: Any) -> None:
    results = {}
    for precision in ("32", "bf16"):
        words = ["model=vit", "model.size=nano", "model.depth=1", "method=full", f"trainer.precision={precision}"]
        done = smoke(*words, f"hydra.run.dir={tmp_path / precision}")
        results[precision] = finished(done, tmp_path / precision, record)["metrics"]["test/nll"]
    assert results["32"] != results["bf16"] == pytest.approx(results["32"], rel=0.1)


def test_a_grid_and_the_same_grid_again(tmp_path: Path, smoke: Any, record: Any) -> None:
    sweep = tmp_path / "sweep"
    words = [*CLASSIFY, "trainer.steps=3", "method=none,sara", "seed=0,1", "-m", f"hydra.sweep.dir={sweep}"]
    first = smoke(*words)
    assert first.code == 0 and "4 cells: 4 finished, 0 failed" in first.out
    cells = sorted(p.parent for p in sweep.glob("*/record.json"))
    assert len(cells) == 4
    made = {(tuple(record(c)["methods"]), record(c)["seed"]) for c in cells}
    assert made == {(("none",), 0), (("none",), 1), (("sara",), 0), (("sara",), 1)}
    before = {p: p.stat().st_mtime_ns for c in cells for p in c.iterdir() if p.is_file()}
    again = smoke(*words)
    assert again.code == 0 and "4 cells: 4 finished, 0 failed" in again.out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    more = smoke(*[w.replace("seed=0,1", "seed=0,1,2") for w in words])  # a larger grid keeps what is there
    assert "6 cells: 6 finished, 0 failed" in more.out and len(list(sweep.glob("*/record.json"))) == 6
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_cell_that_fails_does_not_stop_the_grid(tmp_path: Path, smoke: Any, record: Any) -> None:
    words = [*CLASSIFY, "model.base=scratch", "method=full", "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = smoke(*words, "trainer.lr=1e30,-1,0.001")
    assert done.code == 1 and "3 cells: 1 finished, 2 failed" in done.out
    assert sorted(record(p.parent)["status"] for p in tmp_path.glob("sweep/*/record.json")) == [
        "failed",
        "failed",
        "finished",
    ]


def test_who_stops_a_grid_stops_all_of_it(
    tmp_path: Path, smoke: Any, record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("filtrun.tasks.classify.Classify.loss", stop)
    words = [*CLASSIFY, "model.base=scratch", "method=full", "seed=0,1", "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = smoke(*words)
    assert done.code == 1 and "interrupted after 0 of 2 cells; the same command goes on" in done.err
    assert [record(p.parent)["status"] for p in tmp_path.glob("sweep/*/record.json")] == ["interrupted"]


# -- samples


def test_sample(tmp_path: Path, smoke: Any, cli: Any) -> None:
    from PIL import Image

    run = tmp_path / "run"
    assert smoke(f"hydra.run.dir={run}").code == 0
    done = cli("sample", str(run), "-n", "6", "--out", "grid.png", "--device", "cpu")
    assert done.code == 0 and "6 samples, 3 network evaluations each" in done.out
    with Image.open("grid.png") as image:
        assert image.size == (2 * 50 + 2, 3 * 50 + 2)  # 8 pixels six times as large, two columns
    before = Path("grid.png").read_bytes()
    refused = cli("sample", str(run), "-n", "4", "--out", "grid.png")
    assert refused.code == 2 and "grid.png exists" in refused.err and Path("grid.png").read_bytes() == before
    assert cli("sample", str(run), "-n", "6", "--out", "again.png").code == 0
    assert Path("again.png").read_bytes() == before  # the same seed
    assert cli("sample", str(run), "-n", "6", "--seed", "1", "--out", "grid.png", "--force").code == 0
    assert Path("grid.png").read_bytes() != before
    some = cli(
        "sample", str(run), "-n", "2", "--classes", "7,8", "--steps", "5", "--guidance", "2", "--out", "some.png"
    )
    assert some.code == 0 and "evaluations each" in some.out
    for words, text in (
        (["--classes", "77"], "unknown class '77'"),
        (["-n", "0"], "at least one image is needed"),
        (["--out", "no/where.png"], "there is no folder"),
        (["--steps", "0"], "task.sample_steps=0 is out of range"),
    ):
        wrong = cli("sample", str(run), "--out", "new.png", *words)
        assert wrong.code == 2 and text in wrong.err
    assert not Path("new.png").exists()


def test_sample_wants_a_denoiser(tmp_path: Path, smoke: Any, cli: Any) -> None:
    assert smoke(*CLASSIFY, "method=none", f"hydra.run.dir={tmp_path / 'run'}").code == 0
    done = cli("sample", str(tmp_path / "run"))
    assert done.code == 2 and "is a run of task=classify; only task=diffuse can draw samples" in done.err


@pytest.mark.parametrize("method", ["sara", "lora", "full"])
def test_a_stored_model_is_the_one_that_was_measured(tmp_path: Path, smoke: Any, record: Any, method: str) -> None:
    from filtrun.reload import reload

    words = ["model=vit", "model.size=nano", "model.depth=1", f"method={method}", "trainer.ema=0.5"]
    values = finished(smoke(*words, f"hydra.run.dir={tmp_path / 'run'}"), tmp_path / "run", record)
    run, _ = reload(tmp_path / "run", device="cpu")
    with run.evaluating():
        again = run.task.evaluate(run)
    for name, value in again.items():
        assert value == pytest.approx(values["metrics"][f"test/{name}"], abs=1e-6)


def test_a_stored_delta_belongs_to_its_base(tmp_path: Path, smoke: Any) -> None:
    from filtrun.errors import UserError
    from filtrun.pack import load_tree, save_tree
    from filtrun.reload import reload

    run = tmp_path / "run"
    assert smoke("model=vit", "model.size=nano", "model.depth=1", "method=lora", f"hydra.run.dir={run}").code == 0
    path = run / "model.safetensors"
    tree, metadata = load_tree(path)
    name = next(iter(tree["tensors"]))
    save_tree(path, {**tree, "tensors": {**tree["tensors"], name: torch.zeros(99)}}, **metadata)
    with pytest.raises(UserError, match=r"has shape \(99,\), the model has"):
        reload(run, device="cpu")
    save_tree(path, tree, **{**metadata, "base_sha256": "0" * 64})
    with pytest.raises(UserError, match="belongs to another base: its hash is 000000000000"):
        reload(run, device="cpu")
    path.unlink()
    with pytest.raises(UserError, match="holds no trained model"):
        reload(run, device="cpu")
