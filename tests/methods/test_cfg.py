"""CFG as a method, and guidance in a run: whose rule counts, which classes, what is refused, what the record says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from filtrun.api import compose
from filtrun.bench_run import BenchRun
from filtrun.diffusion.guidance import ClassifierFree
from filtrun.errors import UserError
from filtrun.methods.guidance.adaptive_guidance import AdaptiveGuidance
from filtrun.methods.guidance.apg import APG
from filtrun.methods.guidance.cfg import ClassifierFreeGuidance
from filtrun.methods.guidance.cfgpp import CFGpp
from filtrun.plan import Plan, make_plan

NANO = ["model=unet", "model.size=nano"]


def plan_of(*words: str) -> Plan:
    config, choices, _ = compose("data=digits", "model=unet", "logger=none", *words)
    return make_plan(config, choices)


def test_formula_and_bad_options() -> None:
    method = ClassifierFreeGuidance(scale=3.0)
    wrapped: Any = method.guide(SimpleNamespace(), lambda x, sigma, cond=None: None)  # type: ignore[arg-type]
    assert isinstance(wrapped, ClassifierFree) and wrapped.scale == 3.0
    assert method.report(SimpleNamespace()) == {"scale": 3.0}  # type: ignore[arg-type]
    with pytest.raises(UserError, match="scale"):
        ClassifierFreeGuidance(scale=-1.0)


def test_a_method_takes_the_place_of_the_tasks_guidance(tmp_path: Path) -> None:
    """cfg with scale 3 gives the images of task.guidance=3 to the bit, whatever task.guidance is."""
    drawn, calls = [], []
    for method, words in (("cfg", ["method.cfg.scale=3", "task.guidance=7"]), ("none", ["task.guidance=3"])):
        run: Any = BenchRun(method, [*NANO, "task.sample_steps=3", *words], tmp_path).fresh()
        with run.evaluating():
            images, nfe = run.task.generate(run, torch.arange(4), seed=1)
        drawn.append(images)
        calls.append(nfe)
    assert torch.equal(*drawn) and calls == [6, 6]


@pytest.mark.parametrize(
    ("words", "which", "held_out"),
    [
        (["method=apg"], "all", []),
        (["method=[elucd,apg]"], "all", []),
        (["method=[sara,apg]"], "target", [7, 8, 9]),
        (["method=[apg,lora]"], "target", [7, 8, 9]),
        (["method=none"], "target", [7, 8, 9]),
        (["method=apg", "classes=target"], "target", [7, 8, 9]),
        (["method=apg", "data.source=[0,1,2]"], "source", []),
    ],
)
def test_classes_of_a_run_that_only_samples(words: list[str], which: str, held_out: list[int]) -> None:
    """Nothing is held out where nothing learns it: the base knows all classes and is judged by all."""
    plan = plan_of(*words)
    assert plan.which == which and plan.data.target == held_out


def test_two_rules_of_classifier_free_guidance_are_refused() -> None:
    for pair in ("cfg,apg", "cfgpp,adaptive_guidance", "apg,sara,cfgpp"):
        names = [name for name in pair.split(",") if name != "sara"]
        with pytest.raises(UserError, match=f"method={names[0]} and method={names[1]} both"):
            plan_of(f"method=[{pair}]")
    assert [m.slug for m in plan_of("method=[adaptive_guidance,elucd]").methods] == ["adaptive_guidance", "elucd"]


def test_diffusers_models_are_guided_too(tmp_path: Path) -> None:
    words = ["model=diffusers", "task.sample_steps=3", "task.clip=null"]
    run: Any = BenchRun("apg", words, tmp_path).fresh()
    for method in (APG(), CFGpp(), AdaptiveGuidance(threshold=-1.0, min_steps=1)):
        run.methods = [method]
        with run.evaluating():
            images, nfe = run.task.generate(run, torch.arange(4), seed=1)
        assert nfe == (4 if isinstance(method, AdaptiveGuidance) else 6) and images.isfinite().all()


def test_a_run_of_composed_methods(smoke: Callable[..., Any], cli: Callable[..., Any], tmp_path: Path) -> None:
    """SaRA trains, then its model is drawn from with APG; the record says so, and other guidance is refused later."""
    result = smoke("method=[sara,apg]", "data=digits", *NANO, f"hydra.run.dir={tmp_path}/run", "task.sample_batch=10")
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["cost"]["nfe"] == 6 and record["cost"]["trainable_params"] > 0
    assert record["report"]["apg"] == {"scale": 4.0} and record["report"]["sara"]
    assert record["evaluation"]["sampler"] == "ddim, 3 steps, apg"
    assert record["evaluation"]["reference"] == "train images of the target classes"
    wrong = cli("sample", tmp_path / "run", "-n", "4", "--out", tmp_path / "x.png", "--guidance", "2")
    assert wrong.code == 2 and "method=apg" in wrong.err
