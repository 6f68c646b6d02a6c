"""The conformance suite on image-to-image models: tiny settings, pairs that belong to their image, processes."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from filtrun import conformance_checks as checks
from filtrun.bench_run import IMAGE_SETTINGS, BenchRun, tiny
from filtrun.conformance import conform
from filtrun.runner import chunks


def test_what_makes_a_named_model_tiny_comes_first_and_yields_to_the_user() -> None:
    words = tiny(["model=dpenet", "model.width=4"])
    assert words[0] == "task=derain" and "model.streak_blocks=1" in words and words[-2:] == [
        "model=dpenet", "model.width=4",
    ]  # fmt: skip
    assert "model.width=8" not in words and words.count("model=dpenet") == 1
    assert tiny(["task=superres"], "unet")[:2] == ["model=espcn", "data=photos"]
    assert tiny(["model=plain_unet", "task=derain"])[0] == "data=photos"
    assert tiny(["task=inpaint"], "misf")[0] == "model=misf"
    assert tiny(["model=vit", "data=digits"]) == ["model=vit", "data=digits"]
    assert tiny(["task=classify"], "unet") == ["task=classify"]


@pytest.mark.parametrize("model", IMAGE_SETTINGS)
def test_every_tiny_setting_composes_and_is_tiny(model: str, tmp_path: Path) -> None:
    from filtrun.api import compose

    words = tiny([f"model={model}"])
    config, choices, _ = compose("method=full", "logger=none", *words)
    assert choices["model"] == model and choices["data"] == "photos" and config["task"]["crop"] == 32
    assert f"task={choices['task']}" == IMAGE_SETTINGS[model][0]


@pytest.mark.parametrize(("model", "task"), [("espcn", "superres"), ("misf", "inpaint"), ("dpenet", "derain")])
def test_fixed_pairs_do_not_depend_on_how_a_batch_is_cut(model: str, task: str, tmp_path: Path) -> None:
    bench = BenchRun("full", tiny([f"model={model}"]), tmp_path)
    run: Any = bench.fresh(fixed=True)
    assert run.task.kind == task and type(bench.plan.task) is not type(run.task)
    batch = run.augment(next(iter(run.batches(0, 0))))
    torch.manual_seed(1)
    whole = run.task.make_pair(run, batch)
    torch.manual_seed(2)
    parts = [run.task.make_pair(run, part) for part in chunks(batch, 4)]
    for name in ("x", "y", "mask", "index"):
        if getattr(whole, name) is not None:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    side = 32 - 32 % run.task.ratio
    assert whole.y.shape[-2:] == (side, side) and len(whole.x) == 16
    other = run.task.make_pair(run, batch, torch.Generator().manual_seed(3))  # as evaluation asks for them
    assert (task == "superres") == torch.equal(other.x, whole.x)


def test_a_baseline_conforms_on_a_model_of_superres() -> None:
    found = {c.name: c.status for c in conform("full", "model=espcn", ddp=False)}
    assert set(found.values()) == {"passed", "skipped"} and found["gradient accumulation"] == "passed"
    assert [name for name, status in found.items() if status == "skipped"] == ["stated numbers"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "model"), [("mid", "mid"), ("misf_gan", "misf"), ("proximal_matching", "lpn")])
def test_two_processes_on_methods_for_images(method: str, model: str) -> None:
    found = {c.name: (c.status, c.reason) for c in conform(method, f"model={model}")}
    assert found["two processes"] == ("passed", "")


def test_differences_that_rounding_makes_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    start, end = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0])}
    found = {"w": end["w"] + torch.tensor([0.0, 0.01])}
    bench: Any = None
    checks._agree(bench, start, end, {"w": end["w"] + 5e-5}, "now")
    monkeypatch.setattr(checks, "_rounded", lambda bench: {"w": end["w"] + 0.02})
    with pytest.raises(checks.Skip, match="rounding errors grow: weights that differ by 1e-7 end up 0.01 apart"):
        checks._agree(bench, start, end, found, "now")
    monkeypatch.setattr(checks, "_rounded", lambda bench: {"w": end["w"] + 1e-6})
    with pytest.raises(checks.Failed, match="w differs by 0.005 now"):
        checks._agree(bench, start, end, found, "now")


def test_unused_parameters_are_looked_for_only_where_a_method_says_so() -> None:
    from filtrun.launch import ddp

    for unused in (False, True):
        plan = types.SimpleNamespace(methods=[types.SimpleNamespace(unused_params=unused)])
        strategy = ddp(plan, spawn=True)
        assert strategy._ddp_kwargs.get("find_unused_parameters", False) is unused
        assert strategy._start_method == "spawn" and ddp(plan, spawn=False)._start_method == "popen"
