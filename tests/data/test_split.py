"""Splits, class-wise views and few shots: values on hand-made tensors."""

from __future__ import annotations

import pytest
import torch

from filtrun.data.split import Batch, Split, mix_seed, permutation, stratified, to_float
from filtrun.errors import UserError


def make(n: int = 30, classes: int = 3) -> Split:
    """Image i is filled with the value i and has label i mod `classes`."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 2, 4, 4).clone()
    return Split(images, torch.arange(n) % classes, name="toy")


def test_batch_values_are_exact_and_index_is_the_parent_position():
    part = make().of_classes([2, 0])
    batch = part.batch([0, 1, 5])
    assert batch.index.tolist() == [0, 2, 8]
    assert batch.y.tolist() == [0, 2, 2]
    assert batch.x.dtype == torch.float32 and batch.x.shape == (3, 2, 4, 4)
    assert torch.equal(batch.x[:, 0, 0, 0], torch.tensor([0.0, 2.0, 8.0]) / 255)
    assert part.parent_len == 30 and len(part) == 20 and part.class_ids == [0, 2]


def test_to_float_divides_every_byte_value_exactly():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_float(values).tolist() == [float(torch.tensor(v, dtype=torch.float32) / 255) for v in range(256)]


def test_batch_to_keeps_values():
    batch = Batch(torch.ones(2, 1, 1, 1), torch.tensor([1, 2]), torch.tensor([3, 4])).to("cpu")
    assert len(batch) == 2 and batch.index.tolist() == [3, 4]


def test_subset_of_a_subset_keeps_the_first_parent():
    part = make().subset([9, 3, 6]).subset([2, 0])
    assert part.index.tolist() == [6, 9] and part.images[:, 0, 0, 0].tolist() == [6, 9]


def test_few_shot_counts_and_independence_of_other_classes():
    split = make()
    shots = split.few_shot(4, seed=3)
    assert shots.labels.bincount().tolist() == [4, 4, 4]
    assert shots.index.tolist() == sorted(shots.index.tolist())
    assert shots.index.tolist() == split.few_shot(4, seed=3).index.tolist()
    assert shots.index.tolist() != split.few_shot(4, seed=4).index.tolist()
    alone = split.of_classes([1]).few_shot(4, seed=3)
    assert alone.index.tolist() == shots.of_classes([1]).index.tolist()


@pytest.mark.parametrize(
    ("k", "message"), [(11, r"few_shot=11.*class 0 has only 10 images in 'toy'"), (0, "at least 1")]
)
def test_few_shot_bad(k, message):
    with pytest.raises(UserError, match=message):
        make().few_shot(k, seed=0)


def test_length_mismatch():
    with pytest.raises(UserError, match="toy: 3 images but 2 labels"):
        Split(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2), name="toy")


def test_stratified_parts_are_disjoint_complete_and_proportional():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    rest, part = stratified(labels, 0.2, "x", 1)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(63))
    # at least one of the two samples of class 2; the single sample of class 3 is not taken away
    assert labels[part].bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert stratified(labels, 0.2, "x", 1)[1].tolist() == part.tolist()
    assert stratified(labels, 0.2, "x", 2)[1].tolist() != part.tolist()
    assert stratified(labels, 0.0, "x")[0].tolist() == list(range(63))


def test_permutation_depends_on_every_seed_part_and_not_on_the_global_generator():
    before = torch.get_rng_state()
    a = permutation(100, "epoch", 0, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, permutation(100, "epoch", 0, 1))
    assert sorted(a.tolist()) == list(range(100))
    assert not torch.equal(a, permutation(100, "epoch", 1, 0))
    assert mix_seed(1, 11) != mix_seed(11, 1) and 0 <= mix_seed("a") < 2**63


def test_to_the_same_device_is_the_same_object():
    split = make()
    assert split.to("cpu") is split and split.tensor_backed


def test_to_copies_once():
    split = make()
    assert split.to("meta") is split.to("meta") and split.to("meta").device.type == "meta"
