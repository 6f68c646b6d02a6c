"""State to files and back: the same values, types and structure; the same bytes for the same content."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from filtrun.errors import RunFailure, UserError
from filtrun.pack import load_tree, save_tree


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


BASE = torch.arange(6.0).view(2, 3)
TREE: dict[str, Any] = {
    "step": 7,
    "ids": {0: {"moment": torch.tensor([1.5, -2.0])}, 10: {"moment": torch.zeros(0)}, -1: "minus"},
    "bf16": torch.tensor([1.0, 2.5, -3e38], dtype=torch.bfloat16),
    "fp16": torch.tensor([1.0], dtype=torch.float16),
    "mask": torch.tensor([True, False]),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "long": torch.tensor(2**62),
    "zero_d": torch.tensor(3.5),
    "shared": [BASE, BASE.view(3, 2), BASE[0]],
    "strided": BASE.t(),
    "tuple": (1, 2.5, "x", None, True),
    "empty": {"dict": {}, "list": []},
    "a/b": torch.ones(1),
    "a": {"b": torch.zeros(2)},
    "param": torch.nn.Parameter(torch.ones(2)).detach(),
}


def test_round_trip(tmp_path: Path) -> None:
    save_tree(tmp_path / "state.safetensors", TREE, note="hello", base_sha256="ab")
    tree, metadata = load_tree(tmp_path / "state.safetensors")
    assert same(TREE, tree) and metadata == {"note": "hello", "base_sha256": "ab"}
    assert list(tmp_path.iterdir()) == [tmp_path / "state.safetensors"]


def test_an_optimizer_state_comes_back(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.AdamW([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:]}], fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        sum((w**2).sum() for w in weights).backward()  # type: ignore[union-attr]
        optimizer.step()
    save_tree(tmp_path / "o", optimizer.state_dict())
    state, _ = load_tree(tmp_path / "o")
    other = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:]}], fused=True)
    other.load_state_dict(state)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("step", "exp_avg", "exp_avg_sq"))
    assert other.param_groups[0]["lr"] == 0.1


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    turned = {key: TREE[key] for key in reversed(TREE)}
    turned["bf16"] = TREE["bf16"].clone()
    save_tree(tmp_path / "a", TREE, x="1", y="2")
    save_tree(tmp_path / "b", turned, y="2", x="1")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    save_tree(tmp_path / "c", {**TREE, "step": 8}, x="1", y="2")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    save_tree(tmp_path / "n", {"a": math.inf, "b": math.nan, "t": torch.tensor([math.nan])})
    tree, _ = load_tree(tmp_path / "n")
    assert tree["a"] == math.inf and math.isnan(tree["b"]) and tree["t"].isnan().all()


def test_what_is_no_state_is_named() -> None:
    with pytest.raises(TypeError, match="state at 'a/1' is a set"):
        save_tree(Path("unused"), {"a": [1, {2}]})


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "state"
    save_tree(path, TREE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="is missing, cut short or no state of filtrun"):
        load_tree(path)


def test_a_file_that_is_missing_or_of_somebody_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "plain.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "odd.safetensors", metadata={"filtrun": "{"})
    for name in ("none", "plain.safetensors", "odd.safetensors"):
        with pytest.raises(UserError, match=name):
            load_tree(tmp_path / name)


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    save_tree(path, {"step": 1})
    before = path.read_bytes()

    def full(tensors: Any, target: str, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RunFailure, match="state could not be written: .*No space left on device"):
        save_tree(path, {"step": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
