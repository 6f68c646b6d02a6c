"""Epoch order: pure function of (seed, epoch), the same however it is cut, resumed or decoded."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from filtrun.data.augment import Augment
from filtrun.data.loader import _STREAMS, batches_per_epoch, epoch_batches, epoch_order, workers_for
from filtrun.data.split import Split
from filtrun.errors import UserError


class Stripes:
    """Lazy images: image i is filled with i; number 13 does not decode if `broken`."""

    def __init__(self, ids, broken=False):
        self.ids, self.broken = list(ids), broken
        self.shape = (len(self.ids), 1, 2, 2)

    def __len__(self):
        return len(self.ids)

    def select(self, rows):
        return Stripes([self.ids[i] for i in rows], self.broken)

    def decode(self, rows):
        ids = [self.ids[i] for i in rows]
        if self.broken and 13 in ids:
            raise UserError("number 13 does not decode")
        return torch.tensor(ids, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def tensor_split(n=50):
    return Split(Stripes(range(n)).decode(range(n)), torch.arange(n) % 5)


def stream_split(n=50, broken=False):
    return Split(Stripes(range(n), broken), torch.arange(n) % 5)


def order(split, batch_size=8, **options):
    options = {"seed": 0, "epoch": 0, "device": "cpu"} | options
    return [batch.index.tolist() for batch in epoch_batches(split, batch_size, **options)]


def test_order_is_a_pure_function_of_seed_and_epoch():
    split = tensor_split()
    torch.manual_seed(1)
    first = order(split)
    torch.manual_seed(2)
    assert order(split) == first
    assert sum(first, []) == epoch_order(50, 0, 0)[:48].tolist()
    assert order(split, epoch=1) != first and order(split, seed=1) != first


def test_every_image_comes_with_its_own_label_and_pixels():
    for split in (tensor_split(), stream_split()):
        for batch in epoch_batches(split, 8, seed=0, epoch=0, device="cpu"):
            assert torch.equal(batch.y, batch.index % 5)
            assert torch.equal(batch.x[:, 0, 0, 0], batch.index.float() / 255)


def test_unshuffled_keeps_the_last_short_batch():
    got = order(tensor_split(10), 4, shuffle=False, drop_last=False)
    assert got == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("n", "size", "drop", "count"), [(10, 4, True, 2), (10, 4, False, 3), (8, 4, False, 2), (3, 4, True, 1)]
)
def test_batches_per_epoch(n, size, drop, count):
    assert batches_per_epoch(tensor_split(n), size, drop) == count == len(order(tensor_split(n), size, drop_last=drop))


@pytest.mark.parametrize("drop_last", [True, False])
def test_slices_of_the_ranks_side_by_side_are_the_batch(drop_last):
    split = tensor_split()
    whole = order(split, drop_last=drop_last)
    left, right = (order(split, drop_last=drop_last, rank=rank, world=2) for rank in (0, 1))
    assert [a + b for a, b in zip(left, right, strict=True)] == whole
    assert {len(part) for part in left[:-1]} == {4}


@pytest.mark.parametrize("make", [tensor_split, stream_split])
def test_skip_equals_going_on(make):
    split = make()
    whole = order(split)
    assert [order(split, skip=k) for k in range(8)] == [whole[k:] for k in range(8)]


def test_skipped_batches_are_not_decoded():
    split = stream_split(broken=True)
    where = next(i for i, ids in enumerate(order(stream_split())) if 13 in ids)
    assert order(split, skip=where + 1) == order(stream_split(), skip=where + 1)


def test_order_is_the_same_for_any_number_of_workers():
    split = stream_split()
    state = torch.get_rng_state()
    assert order(split, workers=0) == order(split, workers=1) == order(split, workers=2) == order(tensor_split())
    assert torch.equal(torch.get_rng_state(), state), "the loader drew from the global generator"


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_one_inside_the_other_and_epochs_left_early_do_not_mix(workers):
    split = stream_split()
    first, second = (order(tensor_split(), epoch=epoch) for epoch in (0, 1))

    def ids(batch):
        return batch.index.tolist()

    common = {"seed": 0, "device": "cpu", "workers": workers}
    outer = epoch_batches(split, 8, epoch=0, **common)
    got = [ids(next(outer))]
    assert [ids(b) for b in epoch_batches(split, 8, epoch=1, **common)] == second
    got += [ids(b) for b in outer]
    assert got == first
    left = epoch_batches(split, 8, epoch=0, **common)
    assert ids(next(left)) == first[0]
    left.close()
    for epoch, want in ((1, second), (0, first)):
        assert [ids(b) for b in epoch_batches(split, 8, epoch=epoch, **common)] == want


def test_decoding_processes_live_on_for_the_next_epoch():
    split = stream_split()
    pids = []
    for epoch in range(2):
        order(split, epoch=epoch, workers=2)
        (stream,) = _STREAMS[split].values()
        pids.append([worker.pid for worker in stream.loader._iterator._workers])
    assert pids[0] == pids[1] and len(set(pids[0])) == 2
    workers = stream.loader._iterator._workers
    del split, stream
    gc.collect()
    for worker in workers:  # and go with the split
        worker.join(30)
        assert not worker.is_alive()


def test_as_many_decoding_processes_as_the_cores_allow(monkeypatch):
    for cores, cuda, cpu in ((1, 1, 2), (2, 1, 2), (8, 7, 4), (64, 16, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert workers_for(torch.device("cuda")) == cuda and workers_for(torch.device("cpu")) == cpu
    assert workers_for(torch.device("cuda"), processes=8) == 7  # of 64 cores each has 8


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_one_line(workers):
    with pytest.raises(UserError) as error:
        order(stream_split(broken=True), workers=workers)
    assert str(error.value) == "number 13 does not decode"


def test_augmentation_is_drawn_from_the_global_generator():
    split = Split(torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), torch.zeros(40))
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        batches = epoch_batches(split, 40, seed=0, epoch=0, device="cpu", augment=Augment(crop_pad=2, flip=True))
        runs.append(next(batches).x)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 9, "world": 2}, "batch_size=9 is shared by 2 processes; take a multiple of 2"),
    ],
)
def test_bad_batch_size(options, message):
    with pytest.raises(UserError, match=message):
        epoch_batches(tensor_split(), options.pop("batch_size"), seed=0, epoch=0, device="cpu", **options)


def test_empty_split():
    with pytest.raises(UserError, match="has no images"):
        epoch_batches(tensor_split().of_classes([7]), 4, seed=0, epoch=0, device="cpu")
