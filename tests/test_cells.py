from __future__ import annotations

import math

import pytest

from filtrun.cells import cell_digest, content, flat
from filtrun.stages import digest

CONFIG = {
    "seed": 1, "device": "cpu", "threads": 1, "name": "x", "stages": {"root": "a"}, "logger": {"l": {}}, "workers": 1,
    "data": {"_target_": "filtrun.data.cifar.Cifar10", "root": "/a", "target": [8, 9]},
    "trainer": {"steps": 5, "devices": 1, "log_every": 2, "evaluate": True, "lr": 1e-3},
    "pretrain": {"seed": 0, "checkpoint_every": 3}, "method": {"m": {"_target_": "a.M", "claims": []}},
}  # fmt: skip


def changed(**values):
    return {**CONFIG, **values}


@pytest.mark.parametrize(
    "other",
    [
        changed(device="cuda", threads=None, name=None, stages={"root": "b"}, logger=None, workers=4),
        changed(data={"_target_": "filtrun.data.cifar.Cifar10", "root": None, "target": [8, 9]}),
        changed(trainer={"lr": 0.001, "steps": 5, "devices": 2, "log_every": 9, "evaluate": True}),
        changed(pretrain={"seed": 0}),
        dict(reversed(CONFIG.items())),
    ],
)
def test_where_a_run_runs_does_not_matter(other):
    assert cell_digest(other) == cell_digest(CONFIG) and len(cell_digest(other)) == 16


@pytest.mark.parametrize(
    "other",
    [
        changed(seed=2),
        changed(trainer={**CONFIG["trainer"], "lr": 2e-3}),
        changed(trainer={**CONFIG["trainer"], "evaluate": False}),  # a run without metrics is another cell
        changed(data={**CONFIG["data"], "target": [9]}),
        changed(method={}),
        changed(new=None),
    ],
)
def test_what_it_computes_does(other):
    assert cell_digest(other) != cell_digest(CONFIG)


def test_options_that_came_later_are_in_no_key_where_they_change_nothing():
    later = {"crop_padding": "reflect", "alternate_flip": False, "brightness": 0.0, "hue": 0}
    assert cell_digest(changed(data=CONFIG["data"] | later)) == cell_digest(CONFIG)
    for key, value in (("crop_padding", "zero"), ("alternate_flip", True), ("hue", 0.1)):
        assert cell_digest(changed(data=CONFIG["data"] | later | {key: value})) != cell_digest(CONFIG)


def test_decoding_processes_do_not_matter_and_old_names_stay():
    folder = {"_target_": "filtrun.data.folder.Folder", "root": "/a"}
    names = {cell_digest(changed(data={**folder, "workers": n})) for n in (2, 0, None, 7)}
    assert len(names) == 1
    assert names.pop() == digest(content(changed(data={**folder, "workers": 2})))
    assert content(changed(data={**folder, "workers": None}))["data"] == {**folder, "workers": 2}


def test_a_folder_of_ones_own_is_its_content():
    for target in ("filtrun.data.folder.Folder", "mine.Data"):
        one, two = (changed(data={"_target_": target, "root": root}) for root in ("a", "b"))
        assert cell_digest(one) != cell_digest(two)


def test_a_record_has_the_digest_of_its_configuration(tmp_path):
    from filtrun.record import Record

    config = changed(bound=math.inf, pair=(1, 2), numbers={1: "a"})
    record = Record(tmp_path, config=config)
    record.write()
    assert cell_digest(Record.read(tmp_path).config) == cell_digest(config)


def test_the_configuration_is_left_alone():
    content(CONFIG)["trainer"]["lr"] = 5
    assert CONFIG["trainer"]["lr"] == 1e-3 and CONFIG["data"]["root"] == "/a" and "hydra" not in content({"hydra": 1})


def test_flat():
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}
