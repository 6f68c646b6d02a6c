"""MID: masks and residuals by their definitions, the pool's statistics, and rounds that resume."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.errors import UserError
from filtrun.methods.restoration.mid import MID, estimate_sigma, pixel_mask, restore, takes_mask
from filtrun.models.mid import MaskedUNet


def test_masked_share_is_alpha_and_a_seed_gives_the_same_mask() -> None:
    shape = (4, 3, 100, 100)
    mask = pixel_mask(shape, 0.2, generator=torch.Generator().manual_seed(1))
    assert mask.shape == (4, 1, 100, 100) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(mask.mean().item() - 0.2) < 3 * (0.2 * 0.8 / mask.numel()) ** 0.5
    assert torch.equal(mask, pixel_mask(shape, 0.2, generator=torch.Generator().manual_seed(1)))
    assert pixel_mask(shape, 0.2, same=False).shape == shape
    assert not pixel_mask(shape, 0.0).any()


def test_sigma_is_estimated_from_images_with_structure() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 128).expand(2, 3, 128, 128)
    noisy = ramp + 0.1 * torch.randn_like(ramp)
    assert estimate_sigma(noisy) == pytest.approx(0.1, rel=0.03)
    assert estimate_sigma(ramp) == pytest.approx(0.0, abs=1e-6)


def test_output_is_the_mean_over_fixed_masks() -> None:
    torch.manual_seed(1)
    model, x = MaskedUNet(3, width=2, levels=1), torch.rand(2, 3, 8, 8)
    seen: list[Tensor] = []

    def watched(image: Tensor, mask: Tensor) -> Tensor:
        seen.append(mask)
        return model(image, mask)

    out = restore(watched, x, 3, 0.5, True, True)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1]) and torch.equal(seen[0][0], seen[0][1])
    torch.testing.assert_close(out, torch.stack([model(x, m) for m in seen]).mean(0))
    again = restore(model, x[1:], 3, 0.5, True, True)
    torch.testing.assert_close(again, out[1:])
    assert torch.equal(restore(model, x, 3, 0.0, True, True), model(x))


def test_residuals_have_zero_mean_for_each_image_and_channel() -> None:
    torch.manual_seed(2)
    noisy, restored = torch.rand(2, 4, 3, 6, 6)
    found = MID().residuals(noisy, restored)
    assert found.mean((2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(found + (noisy - restored).mean((2, 3), keepdim=True), noisy - restored)
    assert torch.equal(MID(centre=False).residuals(noisy, restored), noisy - restored)


@pytest.mark.parametrize(("criterion", "distance"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_without_masks_training_is_plain_denoising_of_the_pool_s_noise(criterion: str, distance: Any) -> None:
    model = MaskedUNet(3, width=2, levels=1)
    method = MID(alpha=0.0, criterion=criterion)
    method._shown = takes_mask(model)
    method.noise = 0.1 * torch.randn(5, 3, 16, 16)
    clean = torch.rand(4, 3, 8, 8)
    torch.manual_seed(3)
    noise = method.draw_noise(clean.shape, "cpu")
    for sample in noise:  # every one is a patch of the pool, mirrored or not
        windows = method.noise.unfold(2, 8, 1).unfold(3, 8, 1)
        far = [(windows - s[None, :, None, None]).abs().amax((1, 4, 5)).min() for s in (sample, sample.flip(-1))]
        assert min(far) == 0
    torch.manual_seed(3)
    torch.testing.assert_close(method.batch_loss(model, clean), distance(model(clean + noise), clean))


class Task:
    """White noise of standard deviation 0.1 on smooth images."""

    def make_pair(self, run: Any, batch: Any, generator: torch.Generator | None = None) -> Any:
        return SimpleNamespace(x=batch.x + 0.1 * torch.randn(batch.x.shape, generator=generator), y=batch.x, mask=None)


def tiny_run(method: MID, model: nn.Module, images: int = 40) -> Any:
    from contextlib import contextmanager

    from lightning_fabric import Fabric

    from filtrun.data.split import Split

    line = torch.linspace(0, 255, 16)
    tiles = (line[None, :, None] * torch.linspace(0.2, 1, images)[:, None, None]).expand(images, 16, 16)
    split = Split(tiles[:, None].to(torch.uint8), torch.zeros(images, dtype=torch.long))
    run: Any = SimpleNamespace(
        task=Task(), model=model, net=model, methods=[method], shared={}, device=torch.device("cpu"), seed=0, step=0,
        fabric=Fabric(accelerator="cpu", devices=1), train_split=split, phases=[], phase=None,
        trainer=SimpleNamespace(accumulate=1, clip=0.0, total_steps=lambda n: 10), seed_step=lambda micro=0: None,
        each=lambda *a: None,
    )  # fmt: skip

    @contextmanager
    def evaluating() -> Any:
        method.before_eval(run)
        with torch.no_grad():
            yield
        method.after_eval(run)

    run.evaluating = evaluating
    method.edit_model(run)
    run.phases = method.phases(run)
    return run


class Blur(nn.Module):
    """A fixed denoiser: the mean over rows, exact on images that do not change along them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(3, keepdim=True).expand_as(x) / 1.0


def test_rounds_share_the_steps_and_the_images_are_unpaired() -> None:
    method = MID(rounds=3, noisy_share=0.25)
    run = tiny_run(method, Blur())
    assert [(p.name, p.steps) for p in run.phases] == [("round0", 3), ("round1", 3), ("round2", 4)]
    assert method.noisy is not None
    assert run.train_split.index.tolist() == list(range(30)) and method.noisy.index.tolist() == list(range(30, 40))


def test_the_pool_of_a_round_has_the_noise_of_the_noisy_images() -> None:
    method = MID(alpha=0.0, rounds=2, pool=16)
    run = tiny_run(method, Blur())
    run.phase = run.phases[0]
    method.start_phase(run)
    assert method.noise is not None and method.noise.shape == (16, 1, 16, 16)
    assert method.first_sigma / 255 == pytest.approx(0.1, rel=0.15)
    assert method.noise.std().item() == pytest.approx(method.first_sigma / 255, rel=0.05)
    run.phase = run.phases[1]
    method.start_phase(run)
    assert method.noise.shape == (16, 1, 16, 16)  # as many as noisy images were asked for
    assert method.noise.mean((2, 3)).abs().max() < 1e-6
    assert method.noise.std().item() == pytest.approx(0.1, rel=0.1)  # within 20 % of the true level
    first = method.noise
    method.start_phase(run)
    assert torch.equal(first, method.noise)


def test_the_pool_is_saved_for_resuming_and_not_with_a_finished_model() -> None:
    method = MID(rounds=1, pool=4, sigma=20.0)
    model = MaskedUNet(1, width=2, levels=1)
    run = tiny_run(method, model)
    run.phase = run.phases[0]
    method.start_phase(run)
    assert method.first_sigma == 20.0
    other = MID(rounds=1, pool=4)
    other.load_state_dict(method.state_dict())
    assert other.noise is not None and torch.equal(other.noise, method.noise)
    plain = model(torch.rand(1, 1, 5, 5))
    with run.evaluating():
        assert method.delta_state() == {"first_sigma": 20.0}
        assert "forward" in vars(model)
    assert "forward" not in vars(model) and plain.shape == (1, 1, 5, 5)


def test_a_step_moves_the_model() -> None:
    torch.manual_seed(4)
    method, model = MID(rounds=1, pool=4), MaskedUNet(1, width=2, levels=1)
    run = tiny_run(method, model)
    run.phase = run.phases[0]
    method.start_phase(run)
    run.net, run.optimizer = run.fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    loss = method.own_step(run, run.train_split.batch(torch.arange(3)))
    assert loss.item() > 0 and run.task_loss is not None
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UserError, match="same_mask=false needs a model that is not shown the mask"):
        tiny_run(MID(same_mask=False), MaskedUNet(1, width=2, levels=1))
    with pytest.raises(UserError, match="two training images or more"):
        tiny_run(MID(), Blur(), images=1)

    class Told(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return x

    with pytest.raises(UserError, match="has to be told sigma"):
        tiny_run(MID(), Told())
