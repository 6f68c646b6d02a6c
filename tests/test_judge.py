"""The judge and the feature network: trained apart from what they judge, well enough to be believed."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning_fabric import Fabric

from filtrun.context import Run
from filtrun.data.digits import Digits
from filtrun.judge import FEATURE_SEED, JUDGE_SEED, feature_network, judge_network
from filtrun.methods.baseline.full import Full
from filtrun.stages import Stages
from filtrun.tasks.diffuse import Diffuse
from filtrun.trainer import Trainer


def digits_run(folder: Path) -> Run:
    data = Digits()
    data.setup(0)
    return Run(
        fabric=Fabric(accelerator="cpu", devices=1), task=Diffuse(), data=data, model=torch.nn.Linear(1, 1),
        methods=[Full()], trainer=Trainer(), stages=Stages(folder), which="target", keeps="source",
    )  # fmt: skip


def test_the_judge_knows_digits_and_is_trained_once(tmp_path: Path) -> None:
    run = digits_run(tmp_path)
    judge = judge_network(run, steps=250)
    test = run.data.split("test")
    batch = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        accuracy = (judge(batch.x).argmax(1) == batch.y).double().mean().item()
    assert accuracy > 0.97
    assert not any(p.requires_grad for p in judge.net.parameters()) and not judge.net.training
    again = judge_network(digits_run(tmp_path), steps=250)
    weights = again.net.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in judge.net.state_dict().items())
    assert [s["cached"] for s in run.stages.used] == [False]


def test_judge_and_features_are_two_networks(tmp_path: Path) -> None:
    run = digits_run(tmp_path)
    judge, features = judge_network(run, steps=5), feature_network(run, "classifier", steps=5)
    assert JUDGE_SEED != FEATURE_SEED and judge.name != features.name
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert features(images).shape == (4, 128)
    assert {s["name"] for s in run.stages.used} == {"judge", "features"}
    weights = features.net.state_dict()  # type: ignore[attr-defined]
    assert not torch.equal(judge.net.state_dict()["head.weight"], weights["head.weight"])
