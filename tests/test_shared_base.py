from __future__ import annotations

import pytest

from filtrun.api import composed_by_hydra, plain, resolved
from filtrun.catalogue import entries
from filtrun.errors import UserError
from filtrun.shared_base import _base, composed_on_base


def on_base(words, stamp="now"):
    config, choices = composed_on_base(words, (), stamp)
    return resolved(config), choices


CARDS = {entry.name: entry.card for entry in entries("papers") if entry.card is not None}


@pytest.mark.parametrize(
    ("paper", "scale"), [("lpn", "paper"), ("dpm_solver_v3", "smoke"), ("espcn", "smoke"), ("binary_adapter", "laptop")]
)
def test_the_rows_of_a_table_are_what_hydra_composes(paper, scale):
    table = CARDS[paper].tables[0]
    for row in list(table.rows)[:4]:
        words = [*table.overrides(row, scale), "seed=2", "device=cpu", "logger=none"]
        assert on_base(words) == plain(composed_by_hydra(words)), row


@pytest.mark.parametrize(
    "words",
    [
        ["model=espcn", "model.base=checkpoint", "model.checkpoint=x.pt"],
        ["model=espcn", "task=superres"],
        ["method=[snell,masksparsity]", "method.snell.rank=4", "model=vit", "task=classify"],
        ["+task.losses.l2=1", "task=denoise", "model=plain_unet"],
        ["~trainer.ema", "seed=3"],
        ["data.target=[1,2]", "data.root='a b'", "task.sample_seed=${seed}", "seed=5"],
    ],
)
def test_every_kind_of_override(words):
    def told(make):
        try:
            return make(words)
        except UserError as error:
            return str(error)

    assert told(on_base) == told(lambda given: plain(composed_by_hydra(given)))


@pytest.mark.parametrize("wrong", ["trainer.stepz=3", "nokey=3", "method=nnoe", "seed=1,2", "trainer.lr=[", "a@b=3"])
def test_mistakes_are_told_as_by_hydra(wrong):
    with pytest.raises(UserError) as told:
        on_base(["data=digits", wrong])
    with pytest.raises(UserError) as expected:
        composed_by_hydra(["data=digits", wrong])
    assert str(told.value) == str(expected.value)


def test_files_are_read_once_for_the_same_choices_and_again_when_one_changes():
    _base.cache_clear()
    for lr in (1, 2, 3):
        assert on_base([f"trainer.lr={lr}"])[0]["trainer"]["lr"] == lr
    assert _base.cache_info().misses == 1
    on_base(["trainer.lr=1"], "later")
    assert _base.cache_info().misses == 2
