"""One epoch of batches: a fixed order for (seed, epoch), a slice for each rank, decoding ahead for streams."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from filtrun.data.split import Batch, Split, mix_seed, permutation, to_float
from filtrun.errors import UserError


def batches_per_epoch(split: Split, batch_size: int, drop_last: bool = True) -> int:
    """How many batches `epoch_batches` yields without `skip`; a short last batch is kept if it is the only one."""
    whole, left = divmod(len(split), batch_size)
    return whole + bool(left and (not drop_last or not whole))


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """The order of `n` samples in an epoch, int64 (n,): a pure function of its arguments."""
    return permutation(n, "epoch", seed, epoch) if shuffle else torch.arange(n)


def epoch_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    device: str | torch.device,
    skip: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    rank: int = 0,
    world: int = 1,
    augment: Callable[[Tensor], Tensor] | None = None,
    workers: int | None = 0,
) -> Iterator[Batch]:
    """The batches of one epoch, on `device`.

    The order depends on (seed, epoch) alone, whatever the number of workers, ranks and skipped batches; laid side by
    side the ranks' slices are the batch of a single process. Nothing is drawn from torch's global generator except by
    `augment`. A tensor-backed split is moved to `device` (once, see ``Split.to``) and read there without any
    synchronisation; a stream is decoded by `workers` processes ahead of use.

    Args:
        batch_size: images per step over all ranks.
        skip: leave out this many first batches without reading them (resume).
        drop_last: leave out a last batch that is short, unless it is the only one.
        rank, world: this process's slice. A short batch is shared out evenly; every rank gets the same number of
            batches, so with fewer images than ranks a slice may be empty.
        augment: called with x, float32 (n, C, H, W) in [0, 1], on `device`.
        workers: decoding processes for a stream, which live on for the next epoch; 0 decodes in this one, None is
            `workers_for`. A tensor-backed split needs none.

    Raises:
        UserError: `batch_size` below 1 or not divisible by `world`, an empty split, or an image that does not decode.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: at least 1 is needed")
    if batch_size % world:
        raise UserError(f"batch_size={batch_size} is shared by {world} processes; take a multiple of {world}")
    if not 0 <= rank < world or skip < 0:
        raise ValueError(f"rank {rank} of {world}, skip {skip}")
    if not len(split):
        raise UserError(f"the split {split.name!r} has no images")
    order = epoch_order(len(split), seed, epoch, shuffle)
    count = batches_per_epoch(split, batch_size, drop_last)
    batches = order[skip * batch_size : count * batch_size].split(batch_size) if skip < count else ()
    slices = [batch if world == 1 else batch.tensor_split(world)[rank] for batch in batches]
    device = torch.device(device)
    if split.tensor_backed:
        return _from_tensor(split.to(device), slices, augment)
    workers = workers_for(device, world) if workers is None else workers
    return _from_stream(split, slices, device, augment, workers)


def workers_for(device: torch.device, processes: int = 1) -> int:
    """Decoding processes that suit this machine's cores, for each of `processes` that train.

    Beside a GPU all cores but the one that drives it, at most 16. Beside training on the CPU half of them, at least 2:
    they are as many as training needs, and wait most of the time where decoding is light.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // max(1, processes))
    return min(16, max(1, share - 1)) if device.type == "cuda" else min(16, max(2, share // 2))


def _from_tensor(split: Split, slices: list[Tensor], augment: Callable[[Tensor], Tensor] | None) -> Iterator[Batch]:
    if not slices:
        return
    # The whole order moves in one copy, and what is a number for each image is looked up once: the batches are views.
    order, sizes = torch.cat(slices).to(split.device, non_blocking=True), [len(s) for s in slices]
    index = split.index.index_select(0, order).split(sizes)
    labels = split.labels.index_select(0, order).split(sizes) if split.labels.ndim == 1 else None
    for i, rows in enumerate(order.split(sizes)):
        x = to_float(split.read(rows))
        y = split.labels.index_select(0, rows) if labels is None else labels[i]
        yield Batch(x if augment is None else augment(x), y, index[i])


class _Batches(Dataset):
    """Each item is one whole batch by its rows, still uint8; an image that does not decode is passed on as its message.

    (An exception raised in a worker would reach the user as a page of worker traceback.)
    """

    def __init__(self, split: Split) -> None:
        # another object: the split itself must be free to go, and its processes with it
        self.split = Split(split.images, split.labels, split.index, parent_len=split.parent_len, name=split.name)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor] | str:
        try:
            return self.split.read(rows), self.split.labels[rows], self.split.index[rows]
        except UserError as error:
            return str(error)


class _Stream:
    """The decoding processes of a split: they stay for the next epoch, since starting them stalls the training.

    `order` is what the loader reads next, a list of rows for each batch. One user at a time.
    """

    def __init__(self, split: Split, workers: int, pin: bool) -> None:
        self.order: list[Tensor] = []
        self.busy = False
        self.loader = DataLoader(
            _Batches(split),
            batch_size=None,
            sampler=self,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin,
            # its own generator: a loader otherwise takes its base seed from the global one
            generator=torch.Generator().manual_seed(mix_seed("workers")),
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.order)


_STREAMS: WeakKeyDictionary[Split, dict[tuple[int, bool], _Stream]] = WeakKeyDictionary()


def _from_stream(
    split: Split,
    slices: list[Tensor],
    device: torch.device,
    augment: Callable[[Tensor], Tensor] | None,
    workers: int,
) -> Iterator[Batch]:
    key = workers, device.type == "cuda"
    streams = _STREAMS.setdefault(split, {})
    stream = streams.get(key)
    if stream is None or stream.busy:  # in the middle of an epoch a method may want an epoch of its own
        made = _Stream(split, *key)
        stream = streams.setdefault(key, made) if stream is None else made
    stream.order, stream.busy = slices, True
    try:
        for item in stream.loader:
            if isinstance(item, str):
                raise UserError(item)
            images, labels, index = (t.to(device, non_blocking=True) for t in item)
            x = to_float(images)
            yield Batch(x if augment is None else augment(x), labels, index)
    finally:
        stream.busy = False
