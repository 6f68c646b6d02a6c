"""Every mistake gets one short message with the key, the value and what would do; and every failure its reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CLASSIFY = ["task=classify", "model=resnet20", "model.width=4"]
SCRATCH = [*CLASSIFY, "method=full", "model.base=scratch"]


def message(result: Any, code: int) -> str:
    """The message on stderr, after checking its form."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err and "Traceback" not in result.out
    _, found, text = result.err.partition("filtrun: ")
    assert found and 1 <= len(text.strip().splitlines()) <= 6, result.err
    return text


CASES: list[tuple[list[str], list[str]]] = [
    # names and keys that do not exist
    (["data=digitz"], ["unknown data 'digitz'; did you mean 'digits'?", "cifar10, cifar100"]),
    (["model=unett"], ["unknown model 'unett'; did you mean 'unet'?", "resnet20"]),
    (["model=ResNet20"], ["did you mean 'resnet20'?"]),
    (["method=sarra"], ["unknown method 'sarra'; did you mean 'sara'?", "linear_probe"]),
    (["method=[sara,lorra]"], ["unknown method 'lorra'; did you mean 'lora'?"]),
    (["task=clasify"], ["unknown task 'clasify'; did you mean 'classify'?"]),
    (["scale=smok"], ["unknown scale 'smok'; did you mean 'smoke'?", "laptop"]),
    (["logger=tensorbord"], ["unknown logger 'tensorbord'; did you mean 'tensorboard'?"]),
    (["recipe=diffuse_digit_laptop"], ["unknown recipe", "did you mean 'diffuse_digits_laptop'?"]),
    (["sede=1"], ["unknown key 'sede'; did you mean 'seed'?", "allowed: classes, data"]),
    (["+sede=1"], ["unknown key 'sede'; did you mean 'seed'?"]),
    (["trainer.stepz=3"], ["unknown key 'trainer.stepz'; did you mean 'steps'?", "allowed in trainer: accumulate"]),
    (["+trainer.stepz=3"], ["unknown key trainer.stepz; did you mean 'steps'?"]),
    (["method.sara.treshold=1"], ["unknown key 'method.sara.treshold'; did you mean 'threshold'?"]),
    (["data.rot=x"], ["unknown key 'data.rot'; did you mean 'root'?"]),
    (["pretrain.stepz=3"], ["unknown key 'pretrain.stepz'; did you mean 'steps'?"]),
    # values of the wrong type or out of range
    (["trainer.steps=abc"], ["trainer.steps='abc' must be a whole number or null"]),
    (["trainer.steps=2.5"], ["trainer.steps=2.5 must be a whole number or null"]),
    (["trainer.lr=-1"], ["trainer.lr=-1.0 is out of range; allowed is [0, inf]"]),
    (["trainer.lr=nan"], ["trainer.lr=nan is out of range"]),
    (["trainer.optimizer=adamm"], ["choose from adamw, adam, sgd, muon, auon; did you mean 'adam'?"]),
    (["trainer.precision=64"], ["trainer.precision=64 is not allowed; choose from 32, bf16, 16"]),
    (["trainer.precision=16"], ["trainer.precision=16 needs a CUDA device; use bf16 or 32 on a CPU"]),
    (["trainer.epochs=2"], ["set exactly one of trainer.steps=4 and trainer.epochs=2.0"]),
    (["trainer.accumulate=3"], ["trainer.batch_size=16 is no multiple of trainer.accumulate=3"]),
    (["trainer.devices=3"], ["trainer.batch_size=16 is shared by 3 processes"]),
    (["method.sara.threshold=abc"], ["method.sara.threshold='abc' must be a number or null"]),
    (["method.sara.threshold=1", "method.sara.fraction=0.1"], ["takes one of threshold=1.0 and fraction=0.1"]),
    (["method.sara=3"], ["method.sara=3 is no method"]),
    (["method=null"], ["method=null must be a name", "allowed: adapter, adaptive_guidance"]),
    (["model=3"], ["model=3 must be a name", "unet"]),
    (["model.size=huge"], ["unknown model.size 'huge'", "allowed: base, large, nano, small, tiny"]),
    (["model.normalize=x"], ["unknown model.normalize 'x'", "allowed: data, half, imagenet, none"]),
    (["model.base=scrach"], ["unknown model.base 'scrach'; did you mean 'scratch'?"]),
    (["task.samples=1"], ["task.samples=1 is out of range; allowed is [2, inf]"]),
    (["data.target=[12]"], ["data.target has 12, but digits has classes 0..9"]),
    (["data.target=[7,a]"], ["data.target=[7, 'a'] must be a list, each item a whole number"]),
    (["data.source=[7]"], ["data.source and data.target both have class 7"]),
    (["data.root=/tmp"], ["data.root has no meaning for digits"]),
    (["classes=tarjet"], ["unknown classes 'tarjet'; did you mean 'target'?"]),
    (["seed=-1"], ["seed=-1 must be a whole number from 0"]),
    (["seed=x"], ["seed='x' must be a whole number from 0"]),
    (["seed=1,2"], ["Ambiguous value for argument 'seed=1,2'"]),
    (["seed=[1"], ["'seed=[1' on the command line is not understood; write key=value"]),
    (["oops"], ["'oops' on the command line is not understood"]),
    (["--multrun"], ["unknown flag '--multrun'; did you mean '--multirun'?"]),
    (["name=[3]"], ["name=[3] must be text"]),
    (["force=3"], ["force=3 must be true or false"]),
    (["pretrain=3"], ["pretrain=3 must hold options"]),
    (["stages.root=null"], ["stages.root=None must be a folder"]),
    (["trust=os"], ["trust=os must be a list of packages; write trust=[os]"]),
    (["device=tpu"], ["device=tpu is not allowed; choose auto, cpu, cuda or cuda:N"]),
    # code that is not trusted
    (["method.sara._target_=os.system"], ["the package 'os', which is not trusted", "add trust=[os]"]),
    (["+method.evil._target_=subprocess.run"], ["the package 'subprocess', which is not trusted"]),
    (["method.sara._target_=filtrun.launch.execute"], ["does not make a Method"]),
    # parts that do not go together
    (
        ["method=linear_probe", "model=unet"],
        ["method=linear_probe works with task=classify, not task=diffuse", "resnet20"],
    ),
    (["task=classify", "model=unet"], ["model=unet does task=diffuse or inverse, not task=classify"]),
    (["method=[sara,lora]"], ["method=lora and method=sara both claim the tensor"]),
    (["model.base=checkpoint"], ["model.base=checkpoint needs model.checkpoint=FILE"]),
    (["model.checkpoint=x"], ["model.checkpoint is set but model.base=pretrain"]),
    (["model.base=checkpoint", "model.checkpoint=none.pth"], ["weights file none.pth does not exist"]),
    (["model.base=hub"], ["model=unet has no weights on a hub"]),
    # data that is not there
    (["data=folder"], ["data.root is not set; pass data.root=DIR"]),
    (["data=folder", "data.root=nowhere"], ["data.root=nowhere does not exist"]),
    (["data=cifar", "data.root=nowhere"], ["data.root=nowhere does not exist"]),
]


@pytest.mark.parametrize(("words", "parts"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_a_mistake(tmp_path: Path, smoke: Any, record: Any, words: list[str], parts: list[str]) -> None:
    folder = tmp_path / "run"
    text = message(smoke(f"hydra.run.dir={folder}", *words), 2)
    for part in parts:
        assert part in text
    if (folder / "record.json").exists():  # the folder is this run's once the configuration composes
        values = record(folder)
        assert values["status"] == "failed" and values["error"].splitlines()[0] in text
        assert values["overrides"][-len(words) :] == words
    assert not (folder / "model.safetensors").exists()


def test_a_mistake_after_composition_is_in_the_record_and_the_log(tmp_path: Path, smoke: Any, record: Any) -> None:
    message(smoke(f"hydra.run.dir={tmp_path / 'run'}", "trainer.lr=-1"), 2)
    values = record(tmp_path / "run")
    assert (values["status"], values["error"]) == ("failed", "trainer.lr=-1.0 is out of range; allowed is [0, inf]")
    assert (values["data"], values["model"], values["methods"]) == ("digits", "unet", ["sara"])
    assert "Traceback" in (tmp_path / "run" / "filtrun.log").read_text()
    assert smoke(f"hydra.run.dir={tmp_path / 'run'}", "method=none", *CLASSIFY).code == 0  # the folder can be used


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["lst"], 2, "unknown command 'lst'; did you mean 'list'?"),
        (["sampel", "x"], 2, "unknown command 'sampel'; did you mean 'sample'?"),
        (["sample", "nowhere"], 2, "nowhere is no run folder: there is no record.json in it"),
        (["show", "nowhere"], 2, "nowhere"),
        (["info", "sarra"], 2, "did you mean 'sara'?"),
    ],
)
def test_verbs(cli: Any, words: list[str], code: int, text: str) -> None:
    assert text in message(cli(*words), code)


# -- broken data


def broken(photos: Path, folder: Path, damage: Callable[[Path], Any]) -> Path:
    shutil.copytree(photos, folder)
    damage(folder)
    return folder


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        lambda d: (d / "cat" / "3.png").write_bytes((d / "cat" / "3.png").read_bytes()[:300]),
        "cat/3.png is not an image that can be read",
    ),
    "no image": (lambda d: (d / "cat" / "3.png").write_text("hello"), "cat/3.png is not an image that can be read"),
    "empty file": (lambda d: (d / "cat" / "3.png").write_bytes(b""), "cat/3.png is empty (0 bytes)"),
    "empty class": (lambda d: (d / "dog").mkdir(), "the class folder {root}/dog has no images"),
    "nothing": (lambda d: [shutil.rmtree(p) for p in d.iterdir()], "{root} has no images and no class folders"),
}


@pytest.mark.parametrize("in_memory", ["true", "false"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_images(tmp_path: Path, photos: Path, smoke: Any, record: Any, damage: str, in_memory: str) -> None:
    change, told = DAMAGE[damage]
    root = broken(photos, tmp_path / "images", change)
    words = [
        *SCRATCH,
        "data=folder",
        f"data.root={root}",
        "data.size=16",
        f"data.in_memory={in_memory}",
        "data.workers=0",
    ]
    text = message(smoke(*words, f"hydra.run.dir={tmp_path / 'run'}"), 2)
    assert told.format(root=root) in text
    values = record(tmp_path / "run")
    assert values["status"] == "failed" and told.format(root=root) in values["error"]


def test_own_photos_without_a_class_to_adapt_to(tmp_path: Path, photos: Path, smoke: Any) -> None:
    """Said before a base is trained for nothing."""
    result = smoke("data=folder", f"data.root={photos}", "data.size=16", f"hydra.run.dir={tmp_path / 'run'}")
    assert "data.target is empty" in message(result, 2) and "pretrain" not in result.err


CIFAR_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda d: (d / "data_batch_3").unlink(), "data_batch_3"),
    "truncated": (lambda d: (d / "test_batch").write_bytes((d / "test_batch").read_bytes()[:5000]), "test_batch"),
    "corrupt": (lambda d: (d / "data_batch_2").write_bytes(b"not a pickle"), "data_batch_2"),
    "code": (lambda d: (d / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR."), "data_batch_1"),
}


@pytest.mark.parametrize("damage", CIFAR_DAMAGE)
def test_broken_cifar(tmp_path: Path, cifar: Path, smoke: Any, damage: str) -> None:
    change, told = CIFAR_DAMAGE[damage]
    root = tmp_path / "cifar"
    shutil.copytree(cifar, root)
    change(root / "cifar-10-batches-py")
    words = [*SCRATCH, "data=cifar", f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert told in message(smoke(*words), 2)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("shape", [(30, 32, 32, 4), (30, 16, 16, 3), (30, 32, 32)])
def test_images_of_another_shape(tmp_path: Path, smoke: Any, shape: tuple[int, ...]) -> None:
    import numpy as np

    labels = np.arange(30) % 10
    images = np.zeros(shape, dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    words = [*SCRATCH, "data=cifar", f"data.root={tmp_path / 'set.npz'}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert "set.npz" in message(smoke(*words), 2)


def test_weights_that_do_not_fit(tmp_path: Path, smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    from filtrun.models.resnet import cifar_resnet

    monkeypatch.chdir(tmp_path)
    good = cifar_resnet(num_classes=10, in_channels=1, depth=20, width=4).state_dict()
    save_file(good, "good.safetensors")
    save_file({"some": torch.zeros(3)}, "other.safetensors")
    save_file({**good, "linear.weight": torch.zeros(10, 99)}, "shape.safetensors")
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:2000])
    Path("text.txt").write_text("hello")
    words = [*CLASSIFY, "method=none", "model.base=checkpoint"]
    for name in ("other.safetensors", "shape.safetensors", "cut.safetensors", "text.txt"):
        text = message(smoke(*words, f"model.checkpoint={name}", f"hydra.run.dir=run-{name}"), 2)
        assert name in text
    assert smoke(*words, "model.checkpoint=good.safetensors", "hydra.run.dir=run").code == 0


# -- failures


def test_a_loss_that_explodes(tmp_path: Path, smoke: Any, record: Any) -> None:
    words = [*SCRATCH, "trainer.lr=1e30", "trainer.steps=8", f"hydra.run.dir={tmp_path / 'run'}"]
    text = message(smoke(*words), 1)
    assert (
        "the loss became nan between steps 1 and 2 (train, learning rate" in text and "try a lower trainer.lr" in text
    )
    values = record(tmp_path / "run")
    assert values["status"] == "failed" and values["error"].startswith("the loss became nan between steps 1 and 2")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_memory_that_is_not_there(tmp_path: Path, smoke: Any, record: Any) -> None:
    words = ["task=classify", "model=resnet20", "model.base=scratch", "model.width=400000", "method=full"]
    text = message(smoke(*words, f"hydra.run.dir={tmp_path / 'run'}"), 1)  # one layer alone would take terabytes
    assert text.startswith("out of memory; lower trainer.batch_size")
    assert record(tmp_path / "run")["status"] == "failed"


def test_a_failure_nobody_thought_of(tmp_path: Path, smoke: Any, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("what is this\nsecond line")

    monkeypatch.setattr("filtrun.tasks.classify.Classify.loss", broken)
    text = message(smoke(*SCRATCH, f"hydra.run.dir={tmp_path / 'run'}"), 1)
    assert text.splitlines()[0] == "ZeroDivisionError: what is this"
    assert f"the full traceback is in {tmp_path / 'run' / 'filtrun.log'}" in text
    assert "second line" in (tmp_path / "run" / "filtrun.log").read_text()
    assert record(tmp_path / "run")["error"].startswith("ZeroDivisionError: what is this")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("logger", ["none", "tensorboard"])
def test_a_disk_that_fills_up(small_disk: Path, command: Any, stages_root: Path, tmp_path: Path, logger: str) -> None:
    words = [
        "scale=smoke",
        "device=cpu",
        f"logger={logger}",
        f"stages.root={stages_root}",
        "model.size=nano",
        "method=full",
    ]
    done = command(*words, "trainer.log_every=1", f"hydra.run.dir={small_disk / 'run'}", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    text = done.stderr.partition("filtrun: ")[2]
    assert "No space left" in text or "no disk space left" in text
    assert 1 <= len(text.strip().splitlines()) <= 6
    values = json.loads((small_disk / "run" / "record.json").read_text())  # whole, whichever it is
    assert values["status"] in ("failed", "running") and not (small_disk / "run" / "model.safetensors").exists()


def test_a_full_disk_simulated(tmp_path: Path, smoke: Any, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    folder = tmp_path / "run"
    text = message(smoke(*SCRATCH, f"hydra.run.dir={folder}"), 1)
    assert "checkpoints/step-000000002.safetensors could not be written" in text and "No space left on device" in text
    assert record(folder)["status"] == "failed" and "No space left on device" in record(folder)["error"]
    monkeypatch.undo()
    os.chdir(tmp_path)
    assert smoke(*SCRATCH, f"hydra.run.dir={folder}").code == 0 and record(folder)["status"] == "finished"


def test_folders_that_cannot_be_written(tmp_path: Path, smoke: Any) -> None:
    (tmp_path / "file").write_text("x")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        text = message(smoke(*SCRATCH, f"hydra.run.dir={folder}"), 2)
        assert str(folder) in text and "cannot be written" in text and reason in text
    text = message(smoke(*CLASSIFY, f"hydra.run.dir={tmp_path / 'run'}", f"stages.root={tmp_path / 'file'}"), 2)
    assert f"stages.root={tmp_path / 'file'} cannot be written" in text


def test_a_read_only_folder(tmp_path: Path, smoke: Any) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a read-only file system is not permitted here")
    try:
        text = message(smoke(*SCRATCH, f"hydra.run.dir={folder / 'run'}"), 2)
        assert "cannot be written: Read-only file system" in text
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_path_that_a_python_caller_gets(tmp_path: Path) -> None:
    import filtrun
    from filtrun.errors import UserError

    with pytest.raises(UserError, match="did you mean 'sara'"):
        filtrun.run("method=sarra", f"hydra.run.dir={tmp_path}")
