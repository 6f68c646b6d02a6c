"""Adversarial inpainting: every loss by hand, what reaches which network, two optimizers that resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from filtrun.errors import UserError
from filtrun.methods.restoration import misf_gan
from filtrun.methods.restoration.misf_gan import (
    CONTENT,
    STYLE,
    MisfGan,
    content_loss,
    gan_loss,
    gram,
    masked_l1,
    split_layers,
    style_loss,
    vgg19_features,
)
from filtrun.pack import load_tree, save_tree


@pytest.mark.parametrize("real", [True, False])
def test_adversarial_losses(real: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 3, 3)
    p = torch.sigmoid(logits)
    assert gan_loss(logits, real).item() == pytest.approx(-(p if real else 1 - p).log().mean().item(), rel=1e-5)
    assert gan_loss(logits, real, "lsgan").item() == pytest.approx((p - float(real)).square().mean().item(), rel=1e-5)
    margin = (1 - logits if real else 1 + logits).clamp(min=0)
    assert gan_loss(logits, real, "hinge").item() == pytest.approx(margin.mean().item(), rel=1e-5)
    assert gan_loss(logits, True, "hinge", generator=True).item() == pytest.approx(-logits.mean().item(), rel=1e-5)


def test_gram_of_a_constant_map_and_by_loops() -> None:
    assert torch.allclose(gram(torch.full((1, 4, 5, 6), 3.0)), torch.full((1, 4, 4), 9.0 / 4))
    torch.manual_seed(1)
    x = torch.randn(2, 3, 4, 5)
    slow = torch.stack([
        torch.stack([torch.stack([(x[n, a] * x[n, b]).sum() / 60 for b in range(3)]) for a in range(3)]) for n in (0, 1)
    ])  # fmt: skip
    torch.testing.assert_close(gram(x), slow)


def test_masked_l1_is_relative_to_the_size_of_the_hole() -> None:
    a, b, mask = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2, :2] = 1
    assert masked_l1(a, b, mask).item() == pytest.approx(4.0)
    assert masked_l1(a, b, torch.zeros_like(mask)).item() == pytest.approx(16.0)  # as if one pixel was missing


def test_vgg_layers_are_the_named_ones() -> None:
    torch.manual_seed(2)
    net = vgg19_features(pretrained=False)
    assert net is not None and not any(p.requires_grad for p in net.parameters())
    x = torch.rand(1, 3, 32, 32)
    content, style = split_layers(net(x))
    assert [t.shape[1] for t in content] == [64, 128, 256, 512, 512]
    assert [t.shape[1] for t in style] == [128, 256, 512, 512]
    h, after = x, {}
    for i, layer in enumerate(net.features):  # not normalised, as the official code feeds it
        h = layer(h)
        after[i] = h
    for i, found in zip((*CONTENT, *STYLE), (*content, *style), strict=True):
        assert isinstance(net.features[i], torch.nn.ReLU)
        torch.testing.assert_close(found, after[i])
    other, _ = split_layers(net(1 - x))
    expected = sum((a - b).abs().mean() for a, b in zip(content, other, strict=True))
    torch.testing.assert_close(content_loss(content, other), expected)
    expected = sum((gram(a) - gram(b)).abs().mean() for a, b in zip(content, other, strict=True))
    torch.testing.assert_close(style_loss(content, other), expected)


def images() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 8:20, 8:20] = 1
    return torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32), mask


def test_generator_terms_have_the_paper_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misf_gan, "vgg19_features", lambda normalize: vgg19_features(normalize, pretrained=False))
    method = MisfGan(discriminator_width=4).attach(3)
    assert method.discriminator is not None and method.vgg is not None
    method.discriminator.eval()
    output, target, mask = images()
    terms = method.generator_terms(output, target, mask)
    assert list(terms) == ["l1", "adversarial", "content", "style"]
    p = torch.sigmoid(method.discriminator(output))
    torch.testing.assert_close(terms["adversarial"], -0.1 * p.log().mean())
    torch.testing.assert_close(terms["l1"], (output - target).abs().mean() / mask.mean())
    seen, wanted = (split_layers(method.vgg(t)) for t in (output, target))
    torch.testing.assert_close(terms["content"], 0.1 * content_loss(seen[0], wanted[0]))
    seen, wanted = (split_layers(method.vgg(t * mask)) for t in (output, target))
    torch.testing.assert_close(terms["style"], 250 * style_loss(seen[1], wanted[1]))
    torch.stack(list(terms.values())).sum().backward()
    assert output.grad is not None and output.grad.abs().max() > 0


def test_without_weights_of_vgg_two_terms_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misf_gan, "vgg19_features", lambda normalize: None)
    method = MisfGan(discriminator_width=2).attach(3)
    assert list(method.generator_terms(*images())) == ["l1", "adversarial"]
    assert method.report(None)["features"] == "none (no perceptual and style terms)"  # type: ignore[arg-type]
    with pytest.raises(UserError, match="features=vgg19 needs torchvision's vgg19"):
        MisfGan(features="vgg19").attach(3)


@pytest.mark.parametrize("official", [False, True])
def test_the_discriminator_gets_the_generator_s_gradient_only_with_the_switch(official: bool) -> None:
    method = MisfGan(discriminator_width=4, features="none", official_gradients=official).attach(3)
    discriminator = method.discriminator
    assert discriminator is not None
    output, target, mask = images()
    against = method.discriminator_loss(output, target)
    torch.stack(list(method.generator_terms(output, target, mask).values())).sum().backward()
    leaked = [p.grad for p in discriminator.parameters()]
    assert all((g is not None) == official for g in leaked)
    grad = output.grad.clone() if output.grad is not None else None
    against.backward()
    assert grad is not None and torch.equal(grad, output.grad)  # the discriminator's loss is detached from the output
    assert all(p.grad is not None and p.requires_grad for p in discriminator.parameters())


class TinyTask:
    """What the method asks of a task: pairs with a mask, and the network's output."""

    crop = 24

    def make_pair(self, run: Any, batch: Any) -> Any:
        mask = torch.zeros(len(batch), 1, 24, 24)
        mask[..., 4:20, 4:20] = 1
        return SimpleNamespace(x=batch.x * (1 - mask), y=batch.x, mask=mask)

    def forward(self, run: Any, made: Any) -> Tensor:
        return torch.sigmoid(run.model(made.x))


def tiny_run(method: MisfGan, accumulate: int = 1) -> Any:
    from lightning_fabric import Fabric

    torch.manual_seed(4)
    model = torch.nn.Conv2d(3, 3, 3, padding=1)
    run: Any = SimpleNamespace(
        task=TinyTask(), model=model, methods=[method], shared={}, device=torch.device("cpu"), seed=0, step=0,
        data=SimpleNamespace(channels=3), fabric=Fabric(accelerator="cpu", devices=1),
        trainer=SimpleNamespace(accumulate=accumulate, clip=0.0, lr=1e-2, precision="32"),
        seed_step=lambda micro=0: None, each=lambda *a: None, reduce=lambda t, how: t,
    )  # fmt: skip
    method.edit_model(run)
    run.net, run.optimizer = run.fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    return run


def batch_of(n: int) -> Any:
    from filtrun.data.split import Batch

    x = torch.rand(n, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    return Batch(x, torch.zeros(n, dtype=torch.long), torch.arange(n))


def test_one_step_moves_both_networks_as_two_losses_computed_before_any_update() -> None:
    method = MisfGan(discriminator_width=2, features="none", betas=[0.0, 0.9])
    run, batch = tiny_run(method), batch_of(3)
    assert method.discriminator is not None and method.optimizer is not None
    method.discriminator.eval()  # no power iteration, so that the losses can be had again
    weight = run.model.weight.detach().clone()
    before = [p.detach().clone() for p in method.discriminator.parameters()]
    made = run.task.make_pair(run, batch)
    output = run.task.forward(run, made)
    d_grads = torch.autograd.grad(method.discriminator_loss(output, made.y), list(method.discriminator.parameters()))
    terms = method.generator_terms(output, made.y, made.mask)
    (g_grad,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), run.model.weight)
    loss = method.own_step(run, batch)
    assert loss.item() == pytest.approx(sum(t.item() for t in terms.values()), rel=1e-5)
    torch.testing.assert_close(run.model.weight.detach(), weight - 1e-2 * g_grad)
    for old, new, grad in zip(before, method.discriminator.parameters(), d_grads, strict=True):
        # the first step of Adam without momentum: the gradient over its own magnitude
        torch.testing.assert_close(new.detach(), old - 1e-3 * grad / (grad.abs() + 1e-8), atol=1e-6, rtol=1e-4)


def test_two_micro_batches_make_the_same_step() -> None:
    ends = []
    for accumulate in (1, 2):
        method = MisfGan(discriminator_width=2, features="none", l1=0.1)
        run = tiny_run(method, accumulate)
        assert method.discriminator is not None
        method.discriminator.eval()
        method.own_step(run, batch_of(4))
        ends.append(run.model.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-4)


def test_a_resumed_method_goes_on_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    method = MisfGan(discriminator_width=2, features="none")
    run = tiny_run(method)
    method.own_step(run, batch_of(3))
    save_tree(tmp_path / "state.safetensors", {"method": method.state_dict(), "model": run.model.state_dict()})
    run.optimizer.zero_grad()
    method.own_step(run, batch_of(3))
    other = MisfGan(discriminator_width=2, features="none")
    again = tiny_run(other)
    state, _ = load_tree(tmp_path / "state.safetensors")
    other.load_state_dict(state["method"])
    again.model.load_state_dict(state["model"])
    other.own_step(again, batch_of(3))
    assert method.discriminator is not None and other.discriminator is not None
    for a, b in zip(method.discriminator.state_dict().values(), other.discriminator.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(run.model.weight, again.model.weight)


def test_the_finished_model_is_stored_without_the_discriminator(tmp_path: Path) -> None:
    from filtrun.delta import FILE, load_delta, save_delta

    method = MisfGan(discriminator_width=8, features="none")
    method.slug = "misf_gan"
    run = tiny_run(method)
    method.own_step(run, batch_of(3))
    save_delta(run, tmp_path, "base")
    weights = sum(p.numel() for p in run.model.parameters()) * 4
    assert (tmp_path / FILE).stat().st_size < weights + 2000
    assert method.state_dict()["discriminator"] and method.state_dict()["optimizer"]["state"]  # checkpoints have both
    other = MisfGan(discriminator_width=8, features="none")
    other.slug = "misf_gan"
    again = tiny_run(other)
    load_delta(again, tmp_path / FILE, "base")
    assert torch.equal(again.model.weight, run.model.weight)


def test_deltas_of_earlier_versions_with_a_discriminator_load(tmp_path: Path) -> None:
    from filtrun.delta import FILE, load_delta

    method = MisfGan(discriminator_width=2, features="none")
    run = tiny_run(method)
    method.own_step(run, batch_of(3))
    tensors = dict(run.model.named_parameters())
    state = {"tensors": tensors, "methods": {"misf_gan": method.state_dict()}}
    save_tree(tmp_path / FILE, state, base_sha256="base")
    other = MisfGan(discriminator_width=2, features="none")
    other.slug = "misf_gan"
    again = tiny_run(other)
    load_delta(again, tmp_path / FILE, "base")
    assert torch.equal(again.model.weight, run.model.weight)
    assert method.discriminator is not None and other.discriminator is not None
    for a, b in zip(method.discriminator.parameters(), other.discriminator.parameters(), strict=True):
        assert torch.equal(a, b)


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="method.misf_gan.betas"):
        MisfGan(betas=[0.9])
    method, run = MisfGan(), SimpleNamespace(task=SimpleNamespace(crop=16))
    with pytest.raises(UserError, match=r"task.crop=16 is too small for the discriminator; allowed is \[24, inf\]"):
        method.edit_model(run)  # type: ignore[arg-type]
