"""Methods of different families in one run: what is left behind is what each of them promises, and conflicts are named.

The pairs go through the real command at smoke scale; what it stored is loaded again and looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from filtrun import runner
from filtrun.api import compose
from filtrun.bench_run import BenchRun, probe
from filtrun.context import Run
from filtrun.errors import UserError
from filtrun.methods.guidance.apg import apg
from filtrun.plan import make_plan
from filtrun.reload import reload

Smoke = Callable[..., Any]
DENOISER = ["data=digits", "model=unet", "model.size=nano", "task.sample_steps=3", "task.judge_steps=10"]
VIT = ["model=vit", "model.size=nano", "model.depth=2"]
RESNET = ["model=resnet20", "model.width=8"]


def finished(smoke: Smoke, folder: Path, *words: str) -> tuple[Run, dict[str, Any]]:
    """A run of the command, loaded again from its folder, and its record."""
    result = smoke(*words, f"hydra.run.dir={folder}")
    assert result.code == 0, result.err
    return reload(folder, device="cpu")[0], json.loads((folder / "record.json").read_text())


def plain_names(model: nn.Module) -> bool:
    """Whether nothing of an adapter, a mask or a parametrisation is left in the model."""
    return not any(word in name for name in model.state_dict() for word in ("lora", "parametriz", "original", "part."))


def conv_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


# -- PEFT and pruning --------------------------------------------------------------------------------------------------
def test_ssf_is_folded_and_the_pattern_stays_exact(smoke: Smoke, tmp_path: Path) -> None:
    words = ["data=digits", *VIT, "method.nm_progressive.pattern='2:4'"]
    run, record = finished(smoke, tmp_path / "run", "method=[ssf,nm_progressive]", *words)
    state = run.model.state_dict()
    masked = [name for name in state if name.endswith(("fc1.weight", "fc2.weight"))]
    assert len(masked) == 4
    for name in masked:
        kept = (state[name].unflatten(1, (-1, 4)) != 0).sum(-1)
        assert torch.equal(kept, torch.full_like(kept, 2)), name
    assert plain_names(run.model) and not any(m._forward_hooks for m in run.model.modules())
    assert record["report"]["ssf"]["adapter_params"] > 0 and record["report"]["nm_progressive"]["sparsity"] == 0.5


@pytest.mark.parametrize("names", ["[ssf,nm_progressive]", "[nm_progressive,ssf]"])
def test_folding_behind_a_mask_moves_nothing_in_either_order(names: str, tmp_path: Path) -> None:
    setting = BenchRun(names, [*VIT, "method.nm_progressive.pattern='2:4'"], tmp_path)
    run = setting.trained(steps=4)
    before = probe(run)
    weight = setting.base.get_parameter("blocks.0.mlp.fc1.weight")
    run.each_reversed("finish")
    assert (probe(run) - before).abs().max() < 1e-5
    now: Any = run.model.get_parameter("blocks.0.mlp.fc1.weight")
    kept = now != 0
    ratio = torch.where(kept, now / weight, torch.nan)  # frozen: what is left is the base's row times its scale
    middle = ratio.nanmedian(1, keepdim=True).values.expand_as(ratio)
    torch.testing.assert_close(ratio[kept], middle[kept], rtol=1e-4, atol=0)
    assert 2 * int(kept.sum()) == kept.numel() and (middle != 1).all()


def test_lora_is_merged_and_channels_are_gone(smoke: Smoke, tmp_path: Path) -> None:
    words = ["data=digits", *RESNET, "method.masksparsity.macs=0.3"]
    run, record = finished(smoke, tmp_path / "run", "method=[lora,masksparsity]", *words)
    config, choices, _ = compose("data=digits", *RESNET, "method=none", "logger=none")
    dense, slim = conv_shapes(make_plan(config, choices).make_model()), conv_shapes(run.model)
    assert slim.keys() == dense.keys() and plain_names(run.model)
    assert all(a <= b for name in dense for a, b in zip(slim[name], dense[name], strict=True))
    assert sum(s != dense[n] for n, s in slim.items()) >= 2
    numbers = record["report"]["masksparsity"]
    assert numbers["channels_left"] < numbers["channels"]
    for conv, norm in zip(run.model.modules(), list(run.model.modules())[1:], strict=False):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            assert conv.out_channels == norm.num_features == len(conv.weight)


@pytest.mark.parametrize("other", ["ssf", "flora"])
def test_who_stands_in_the_way_of_removal_is_named(other: str, smoke: Smoke, tmp_path: Path) -> None:
    words = ["data=digits", *RESNET, "method.masksparsity.macs=0.3", f"hydra.run.dir={tmp_path / 'run'}"]
    done = smoke(f"method=[{other},masksparsity]", *words)
    assert done.code == 2, done.err
    assert f"method=masksparsity cannot take channels out of the layers as method={other} changed them" in done.err


def test_loras_product_is_in_the_slim_weights(tmp_path: Path) -> None:
    """After removal: merged weight = frozen weight of the kept channels + product, and the output does not move."""
    run = BenchRun("[lora,masksparsity]", [*RESNET, "method.masksparsity.macs=0.3"], tmp_path).trained(steps=6)
    lora: Any = run.methods[0]
    held = {f"{name}.weight": wrapped for name, (wrapped, _) in lora.wrapped.items()}
    want = {n: (w.get_base_layer().weight + w.get_delta_weight("default")).detach() for n, w in held.items()}
    moved = sum(bool(w.get_delta_weight("default").abs().max() > 0) for w in held.values())
    before = probe(run)
    run.each_reversed("finish")
    assert moved > 0 and (probe(run) - before).abs().max() < 1e-5
    for name, weight in want.items():
        torch.testing.assert_close(run.model.get_parameter(name).detach(), weight, atol=1e-6, rtol=1e-5)


# -- PEFT and guidance -------------------------------------------------------------------------------------------------
def drawn(run: Run, guidance: bool = True) -> torch.Tensor:
    """Four images; without `guidance` by the task's own rule."""
    methods = run.methods
    run.methods = methods if guidance else []
    try:
        with run.evaluating():
            return run.task.generate(run, torch.arange(4), seed=1)[0]  # type: ignore[attr-defined]
    finally:
        run.methods = methods


@pytest.mark.parametrize("method", ["snell", "sara"])
def test_a_tuned_denoiser_is_drawn_from_with_apg(smoke: Smoke, tmp_path: Path, method: str) -> None:
    """[snell,apg] trains what snell trains, draws other images than [snell], and those that APG draws of its model."""
    both, record = finished(smoke, tmp_path / "both", f"method=[{method},apg]", "method.apg.scale=6", *DENOISER)
    alone, other = finished(smoke, tmp_path / "alone", f"method={method}", *DENOISER)
    assert record["cost"]["trainable_params"] == other["cost"]["trainable_params"] > 0
    assert record["cost"]["nfe"] == 6 and record["evaluation"]["sampler"] == "ddim, 3 steps, apg"
    for name, tensor in both.model.state_dict().items():
        assert torch.equal(tensor, alone.model.state_dict()[name]), name
    guided = drawn(both)
    assert not torch.allclose(guided, drawn(alone), atol=1e-3)
    assert torch.equal(drawn(both, guidance=False), drawn(alone))
    rule = SimpleNamespace(guide=lambda run, denoise: apg(denoise, scale=6.0), sampler=lambda run: None, combines=True,
                           before_eval=lambda run: None, after_eval=lambda run: None, slug="rule")  # fmt: skip
    alone.methods = [rule]  # type: ignore[list-item]
    assert torch.equal(drawn(alone), guided)


@pytest.mark.parametrize("method", ["lora", "ssf", "snell", "flora", "svfit", "bitfit", "adapter"])
def test_peft_methods_tune_the_denoiser(method: str, tmp_path: Path) -> None:
    """They train on the U-Net's convolutions, leave every frozen tensor alone and give images."""
    setting = BenchRun(method, ["data=digits", "model=unet", "model.size=nano", "task.sample_steps=2"], tmp_path)
    run = setting.trained(steps=3)
    base = dict(setting.base.named_parameters())
    frozen = [(n, p) for n, p in run.weights.items() if not p.requires_grad]
    assert frozen and all(torch.equal(p, base[n]) for n, p in frozen)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert 0 < trained < sum(p.numel() for p in base.values())
    before = probe(run)
    assert (before - probe(setting.fresh(edit=False))).abs().max() > 1e-6
    run.each_reversed("finish")
    assert (probe(run) - before).abs().max() < 1e-5
    assert drawn(run).isfinite().all()


# -- what does not go together -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "what"),
    [
        ("cfg,apg", "both say how the conditional and the unconditional prediction"),
        ("mid,misf_gan", "both own the training step; use one of them"),
    ],
)
def test_two_rules_or_two_owners_are_refused_by_both_names(names: str, what: str) -> None:
    one, two = names.split(",")
    config, choices, _ = compose(f"method=[{names}]", "logger=none")
    with pytest.raises(UserError) as error:
        make_plan(config, choices)
    assert str(error.value).startswith(f"method={one} and method={two} {what}") and "\n" not in str(error.value)


def test_two_methods_that_claim_a_tensor_are_refused_by_both_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^method=nm_progressive and method=iss_p both claim the tensor 'blocks\.0"):
        BenchRun("[nm_progressive,iss_p]", [*VIT, "method.nm_progressive.pattern='2:4'"], tmp_path).fresh()


@pytest.mark.parametrize("peft", ["lora", "snell", "flora", "svfit", "spt"])
@pytest.mark.parametrize("mask", ["nm_progressive", "iss_p"])
def test_nothing_is_added_where_a_mask_promises_zeros(peft: str, mask: str, tmp_path: Path) -> None:
    """The network would train with entries that the mask cuts off in the end."""
    for first, second in ((peft, mask), (mask, peft)):
        with pytest.raises(UserError, match=r"^method=\w+ and method=\w+ both claim the tensor '.+weight'") as error:
            BenchRun(f"[{first},{second}]", VIT, tmp_path).fresh()
        assert f"method={peft} " in str(error.value) and f"method={mask} " in str(error.value)


@pytest.mark.parametrize("names", ["[ssf,iss_p]", "[snip,ssf]"])
def test_scaling_keeps_the_zeros_of_a_mask(names: str, tmp_path: Path) -> None:
    run = BenchRun(names, [*VIT, *(["method.snip.granularity=weight"] if "snip" in names else [])], tmp_path).trained(
        steps=6
    )
    before = probe(run)
    run.each_reversed("finish")
    assert (probe(run) - before).abs().max() < 1e-5
    assert (run.model.get_parameter("blocks.0.mlp.fc1.weight") == 0).float().mean() > 0.5


def test_only_those_that_plan_phases_are_named(tmp_path: Path) -> None:
    """A method beside the two that has no plan is not blamed."""
    run = BenchRun("[lora,masksparsity]", RESNET, tmp_path).fresh()
    second: Any = BenchRun("masksparsity", RESNET, tmp_path).fresh().methods[0]
    second.slug = "other"
    run.methods = [*run.methods, second]
    with pytest.raises(UserError, match=r"phases of the run: masksparsity, other; use one of them$"):
        runner.setup(run)
