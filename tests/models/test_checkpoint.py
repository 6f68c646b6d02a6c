"""Tests of filtrun.models.checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from filtrun.errors import UserError
from filtrun.models.checkpoint import head_of, load_weights, read_state, replace_head
from filtrun.models.mobilenet import MobileNetV2
from filtrun.models.resnet import cifar_resnet
from filtrun.models.unet import UNet
from filtrun.models.vgg import VGG16
from filtrun.models.vit import ViT


class Net(nn.Module):
    def __init__(self, classes: int = 3, width: int = 4):
        super().__init__()
        self.body = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("form", ["safetensors", "plain", "state_dict", "model", "ddp", "compiled ddp"])
def test_round_trip(form: str, tmp_path: Path) -> None:
    source, target = Net(), Net()
    state = source.state_dict()
    path = tmp_path / "weights.pth"
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        prefix = {"ddp": "module.", "compiled ddp": "_orig_mod.module."}.get(form, "")
        named = {prefix + key: value for key, value in state.items()}
        torch.save({form: named, "epoch": 3} if form in ("state_dict", "model") else named, path)
    assert not same(source, target)
    assert load_weights(target, path) == []
    assert same(source, target)


def test_dtype_of_the_model_stays(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    target = Net().bfloat16()
    load_weights(target, tmp_path / "a.pt")
    assert target.body.weight.dtype == torch.bfloat16


def test_files_without_batch_counters_load(tmp_path: Path) -> None:
    state = {key: value for key, value in Net().state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "old.safetensors")
    assert load_weights(Net(), tmp_path / "old.safetensors") == []


def test_strict_names(tmp_path: Path) -> None:
    state = Net().state_dict()
    del state["norm.weight"], state["norm.bias"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "a.pt")
    target = Net()
    with pytest.raises(
        UserError, match=r"does not fit Net: 2 missing \(norm.weight, norm.bias\); 1 unexpected \(extra\)"
    ):
        load_weights(target, tmp_path / "a.pt")
    assert load_weights(target, tmp_path / "a.pt", strict=False) == ["norm.weight", "norm.bias"]
    assert torch.equal(target.body.weight, state["body.weight"])


def test_only_the_first_three_names_are_told(tmp_path: Path) -> None:
    torch.save({f"other.{i}": torch.zeros(1) for i in range(5)}, tmp_path / "a.pt")
    for strict in (True, False):  # nothing in common is a mistake either way
        with pytest.raises(UserError, match=r"5 unexpected \(other.0, other.1, other.2, \.\.\.\)"):
            load_weights(Net(), tmp_path / "a.pt", strict=strict)


def test_head_of_another_size_needs_consent(tmp_path: Path) -> None:
    source, target = Net(classes=7), Net(classes=3)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    before = target.head.weight.clone()
    with pytest.raises(
        UserError, match=r"2 of another shape .*\[7, 4\] in the file, \[3, 4\] in the model\n.*head=True"
    ):
        load_weights(target, tmp_path / "a.pt", strict=False)
    assert not torch.equal(target.body.weight, source.body.weight)  # nothing was touched
    assert load_weights(target, tmp_path / "a.pt", head=True) == ["head.weight", "head.bias"]
    assert torch.equal(target.body.weight, source.body.weight) and torch.equal(target.head.weight, before)
    assert load_weights(Net(classes=7), tmp_path / "a.pt", head=True) == []  # the same size: loaded like the rest


def test_other_shapes_are_never_passed_over(tmp_path: Path) -> None:
    torch.save(Net(width=5).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match="of another shape") as told:
        load_weights(Net(), tmp_path / "a.pt", strict=False, head=True)
    assert "head=True" not in str(told.value)


class Code:
    """Stands for anything that is no tensor."""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "does not exist"),
        ("a.txt", b"text", "not a weights file: its suffix is '.txt'"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1", "not a safetensors file or is truncated"),
        ("a.pt", b"not a pickle", "not a PyTorch weights file or is truncated"),
        ("a.pth", b"", "not a PyTorch weights file or is truncated"),
        ("a.ckpt", Code(), "holds pickled objects besides tensors"),
        ("b.ckpt", {"epoch": 3}, "holds no state dict"),
        ("c.ckpt", [torch.zeros(1)], "holds no state dict"),
        ("d.ckpt", {}, "holds no state dict"),
    ],
)
def test_files_that_are_no_weights(name: str, content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_weights(Net(), path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    state = {"w": torch.randn(500)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(UserError, match="is truncated"):
        read_state(path)
    with pytest.raises(UserError, match="is a folder"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: cifar_resnet(), "linear"),
        (lambda: VGG16(width=0.125), "classifier"),
        (lambda: MobileNetV2(width=0.35), "classifier"),
        (lambda: ViT(size="nano"), "head"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10)), "4"),
        (lambda: nn.ModuleDict({"fc": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 10)), "z": nn.Linear(2, 2)}), "fc.1"),
    ],
)
def test_head_is_found_and_replaced(build, name: str) -> None:
    model = build()
    found, head = head_of(model)
    assert found == name and head is model.get_submodule(name) and head.out_features == 10
    others = [p for p in model.parameters() if all(p is not q for q in head.parameters())]
    new = replace_head(model.double(), 4)
    assert model.get_submodule(name) is new and new.weight.shape == (4, head.in_features)
    assert new.weight.dtype == torch.float64 and getattr(model, "num_classes", 4) == 4
    assert len(others) == len(list(model.parameters())) - len(list(new.parameters()))


def test_convolutional_head() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1, bias=False))
    new = replace_head(model, 5)
    assert isinstance(new, nn.Conv2d) and new.weight.shape == (5, 8, 1, 1) and new.bias is None


def test_heads_that_are_not_there() -> None:
    with pytest.raises(UserError, match="UNet is a denoiser"):
        head_of(UNet(size="nano"))
    with pytest.raises(UserError, match="no linear layer"):
        head_of(nn.Sequential(nn.Conv2d(1, 1, 3)))
    with pytest.raises(UserError, match="num_classes=0"):
        replace_head(Net(), 0)
    with pytest.raises(UserError, match="itself the head"):
        replace_head(nn.Linear(2, 2), 3)
