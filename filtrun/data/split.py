"""A batch, and a split: images with labels and a stable position, held as a tensor or decoded when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from filtrun.errors import UserError


@dataclass
class Batch:
    """What a step gets.

    Attributes:
        x: float32 (N, C, H, W) in [0, 1].
        y: int64 (N,) class ids, or a float32 target image (N, C', H', W') for paired data.
        index: int64 (N,), position of each sample in the set the split was cut from; the same in every epoch.
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: str | torch.device, non_blocking: bool = True) -> Batch:
        """The same batch on `device`."""
        moved = (t.to(device, non_blocking=non_blocking) for t in (self.x, self.y, self.index))
        return replace(self, **dict(zip(("x", "y", "index"), moved, strict=True)))


class LazyImages(Protocol):
    """Images that are decoded when asked for: what a streaming split holds instead of a tensor."""

    shape: tuple[int, int, int, int]  # (N, C, H, W)

    def __len__(self) -> int: ...

    def select(self, rows: list[int]) -> LazyImages:
        """The images at `rows`, still undecoded."""
        ...

    def decode(self, rows: list[int]) -> Tensor:
        """uint8 (len(rows), C, H, W)."""
        ...


def mix_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all `parts`; neighbouring seeds or epochs give unrelated streams."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(n: int, *seed: object) -> Tensor:
    """A permutation of 0..n-1, int64 (n,) on the CPU: a pure function of `n` and the seed parts."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix_seed(*seed)))


def stratified(labels: Tensor, fraction: float, *seed: object) -> tuple[Tensor, Tensor]:
    """Part off `fraction` of every class.

    Args:
        labels: int64 (N,).
        fraction: in [0, 1); each class gives the nearest whole number of samples, at least one and never all of
            them; a class with one sample gives none.
        seed: the draw for one class depends on the seed and its id only, not on the other classes.

    Returns:
        (rest, part): ascending positions, int64, disjoint, together all of 0..N-1.
    """
    taken = torch.zeros(len(labels), dtype=torch.bool)
    if fraction > 0:
        for c in labels.unique().tolist():
            rows = (labels == c).nonzero().flatten()
            count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
            taken[rows[permutation(len(rows), "part", *seed, c)[:count]]] = True
    return (~taken).nonzero().flatten(), taken.nonzero().flatten()


class Split:
    """Images with labels, either a tensor or files decoded on demand.

    Attributes:
        images: uint8 (N, C, H, W), float32 where 8 bits are too few, or a `LazyImages` of that shape.
        labels: int64 (N,).
        index: int64 (N,), position in the parent set; `parent_len` is that set's length, so a table of
            per-sample state of that length can be addressed with any batch's ``index``.
        name: what messages call it.
    """

    def __init__(
        self,
        images: Tensor | LazyImages,
        labels: Tensor,
        index: Tensor | None = None,
        *,
        parent_len: int | None = None,
        name: str = "split",
    ) -> None:
        if len(images) != len(labels):
            raise UserError(f"{name}: {len(images)} images but {len(labels)} labels")
        if isinstance(images, Tensor) and (images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4):
            raise TypeError(f"images must be uint8 or float32 (N, C, H, W), not {images.dtype} {tuple(images.shape)}")
        self.images, self.labels, self.name = images, labels.long(), name
        self.index = torch.arange(len(labels), device=labels.device) if index is None else index.long()
        self.parent_len = len(labels) if parent_len is None else parent_len
        self._copies: dict[torch.device, Split] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        kind = "tensor" if self.tensor_backed else "stream"
        return f"Split({self.name!r}, {len(self)} x {tuple(self.images.shape[1:])}, {kind}, {self.device})"

    @property
    def tensor_backed(self) -> bool:
        return isinstance(self.images, Tensor)

    @property
    def device(self) -> torch.device:
        return self.images.device if isinstance(self.images, Tensor) else torch.device("cpu")

    @property
    def class_ids(self) -> list[int]:
        """The ids that occur, ascending."""
        return self.labels.unique().tolist()

    def subset(self, indices: Tensor | Sequence[int], name: str | None = None) -> Split:
        """The samples at positions `indices` of this split, in that order."""
        rows = torch.as_tensor(indices, dtype=torch.long).to(self.device)
        images: Tensor | LazyImages
        if isinstance(self.images, Tensor):
            images = self.images.index_select(0, rows)
        else:
            images = self.images.select(rows.tolist())
        return Split(images, self.labels[rows], self.index[rows], parent_len=self.parent_len, name=name or self.name)

    def of_classes(self, ids: Sequence[int], name: str | None = None) -> Split:
        """The samples whose label is in `ids`, in this split's order; labels keep their ids."""
        wanted = torch.isin(self.labels, torch.tensor(list(ids), dtype=torch.long, device=self.labels.device))
        return self.subset(wanted.nonzero().flatten(), name)

    def few_shot(self, k: int, seed: int, name: str | None = None) -> Split:
        """`k` samples of every class that occurs, in this split's order.

        The draw for a class depends on `seed`, its id and its size only, so a class has the same shots in a split
        of all classes and in one of a few.

        Raises:
            UserError: a class has fewer than `k` samples, or `k` < 1.
        """
        if k < 1:
            raise UserError(f"few_shot={k}: at least 1 image per class is needed")
        labels, rows = self.labels.cpu(), []
        for c in labels.unique().tolist():
            members = (labels == c).nonzero().flatten()
            if len(members) < k:
                raise UserError(f"data.few_shot={k}: class {c} has only {len(members)} images in {self.name!r}")
            rows.append(members[permutation(len(members), "shots", seed, c)[:k]])
        return self.subset(torch.cat(rows).sort().values if rows else torch.zeros(0, dtype=torch.long), name)

    def to(self, device: str | torch.device) -> Split:
        """This split with its tensors on `device`; copied once and remembered. A stream stays where it is."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if not isinstance(self.images, Tensor) or device == self.device:
            return self
        if device not in self._copies:
            tensors = (t.to(device) for t in (self.images, self.labels, self.index))
            images, labels, index = tensors
            self._copies[device] = Split(images, labels, index, parent_len=self.parent_len, name=self.name)
        return self._copies[device]

    def read(self, indices: Tensor) -> Tensor:
        """uint8 or float32 (len(indices), C, H, W) at positions `indices`, which lie on this split's device."""
        if isinstance(self.images, Tensor):
            return self.images.index_select(0, indices)
        return cast(LazyImages, self.images).decode(indices.tolist())

    def batch(self, indices: Tensor | Sequence[int]) -> Batch:
        """The samples at positions `indices` as a batch on this split's device."""
        rows = torch.as_tensor(indices, dtype=torch.long).to(self.device)
        return Batch(to_float(self.read(rows)), self.labels.index_select(0, rows), self.index.index_select(0, rows))


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1], exactly value / 255; float32 stays as it is."""
    return images if images.dtype == torch.float32 else images.to(torch.float32).div_(255)
