"""MID, mask, inpaint and denoise: train a denoiser from clean images and unpaired noisy ones.

"Unsupervised Real-World Denoising: Sparsity is All You Need", arXiv 2503.21377 (2025); no official code. Clean images
get synthetic noise and lose random pixels, and the network learns to give the clean image back. After each round the
noise it finds in the real noisy images (noisy minus restored) takes the place of the synthetic noise, so the training
noise comes closer to the real one.

Not in the published text, and so our choices: the masked share (0.2), the number of rounds (3), subtracting each
residual's mean (without it brightness drifts from round to round), and estimating the level of the first, white noise
from the noisy images.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.context import mix_seed
from filtrun.data.crops import CropTurn
from filtrun.errors import UserError
from filtrun.method import Method
from filtrun.options import check_options, opt
from filtrun.trainer import Phase

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Batch, Split


def pixel_mask(shape: torch.Size | tuple[int, ...], alpha: float, same: bool = True,
               generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:  # fmt: skip
    """Random mask for images of `shape` (N, C, H, W): 1 with probability `alpha`, where the pixel is taken away.

    Args:
        same: one draw for all channels of a pixel, (N, 1, H, W); else each its own, (N, C, H, W).
        generator: a CPU generator; None: torch's global one of `device`.
    """
    n, c, h, w = shape
    size = (n, 1 if same else c, h, w)
    draws = torch.rand(size, device=device) if generator is None else torch.rand(size, generator=generator).to(device)
    return (draws < alpha).float()


def estimate_sigma(images: Tensor) -> float:
    """Standard deviation of the noise in images (N, C, H, W): median of the diagonal Haar details over 0.6745.

    Donoho and Johnstone, Biometrika 1994. Spatially correlated noise comes out too small.
    """
    a, b = images[..., :-1:2, :-1:2], images[..., :-1:2, 1::2]
    c, d = images[..., 1::2, :-1:2], images[..., 1::2, 1::2]
    return ((a - b - c + d) / 2).abs().flatten().float().median().item() / 0.6745


def takes_mask(model: nn.Module) -> bool:
    """Whether the model's forward has an argument `mask`."""
    return "mask" in inspect.signature(type(model).forward).parameters


def masked_call(network: Callable[..., Any], x: Tensor, mask: Tensor, shown: bool) -> Any:
    """The network's output for x without the masked pixels, told about them where it can be (`shown`)."""
    return network(x * (1 - mask), mask=mask) if shown else network(x * (1 - mask))


def restore(network: Callable[..., Any], x: Tensor, masks: int, alpha: float, same: bool, shown: bool) -> Tensor:
    """Mean output over `masks` random masks, which depend on the image's size only: x (N, C, H, W) -> same."""
    from filtrun.tasks.image_to_image import result

    if not alpha:
        return result(masked_call(network, x, x.new_zeros(1, 1, *x.shape[-2:]), shown))
    total = torch.zeros_like(x)
    for j in range(masks):
        generator = torch.Generator().manual_seed(mix_seed(j, *x.shape[-2:]))
        mask = pixel_mask((1, *x.shape[1:]), alpha, same, generator, x.device)
        total = total + result(masked_call(network, x, mask.expand(len(x), -1, -1, -1), shown))
    return total / masks


@dataclass
class MID(Method):
    """Iterative training of a denoiser with a pool of noise; it owns the training step.

    The training images are cut in two: of the first part only the clean images are used, of the second only the noisy
    ones. In evaluation the output is the mean over several masks.
    """

    alpha: float = opt(0.2, "share of pixels taken away", low=0, high=0.99, source="our choice")
    rounds: int = opt(3, "rounds of training; the pool of noise is made anew between them", low=1, source="our choice")
    masks: int = opt(4, "masks an output is averaged over in evaluation", low=1, source="our choice")
    sigma: float | None = opt(None, "first round: white noise of this standard deviation on the scale of 0 to 255; "
                              "null: estimated from the noisy images", low=0)  # fmt: skip
    pool: int = opt(64, "noise patches kept, of the size of the training tiles", low=1)
    noisy_share: float = opt(0.5, "share of the training images used as noisy ones", low=0.01, high=0.99)
    criterion: str = opt("l1", "distance to the clean image", choices=("l1", "l2"))
    same_mask: bool = opt(True, "take all channels of a pixel away together")
    centre: bool = opt(True, "subtract the mean of each residual, channel by channel")

    trains: ClassVar = "all"
    tasks: ClassVar = ("denoise",)
    identity_at_start: ClassVar[bool] = False  # the mean over masks is another output than the plain one
    paper: ClassVar[str] = "MID, arXiv 2503.21377 (2025)"

    def __post_init__(self) -> None:
        check_options(self, "method.mid")
        self.noisy: Split | None = None
        self.noise: Tensor | None = None
        self._shown = False
        self.first_sigma = 0.0

    # -- the method's parts ----------------------------------------------------------------------------------------
    def draw_noise(self, shape: torch.Size | tuple[int, ...], device: torch.device | str) -> Tensor:
        """Noise (N, C, H, W) for a batch: patches of the pool, cut and mirrored at random (global generator)."""
        assert self.noise is not None
        self.noise = self.noise.to(device)  # of a resumed run it comes from the disk
        which = torch.randint(len(self.noise), (shape[0],), device=device)
        return CropTurn(shape[-1], flip=True, rotate=False)(self.noise[which])

    def batch_loss(self, network: Callable[..., Any], clean: Tensor) -> Tensor:
        """Distance of the network's output to `clean` (N, C, H, W), given clean plus noise minus masked pixels."""
        from filtrun.tasks.image_to_image import result

        noisy = clean + self.draw_noise(clean.shape, clean.device)
        mask = pixel_mask(clean.shape, self.alpha, self.same_mask, None, clean.device)
        out = result(masked_call(network, noisy, mask, self._shown)).float()
        return F.l1_loss(out, clean) if self.criterion == "l1" else F.mse_loss(out, clean)

    def residuals(self, noisy: Tensor, restored: Tensor) -> Tensor:
        """The noise found in images: noisy minus restored, centred for each image and channel."""
        found = noisy - restored
        return found - found.mean((2, 3), keepdim=True) if self.centre else found

    def noisy_tiles(self, run: Run) -> list[Tensor]:
        """The noisy images the pool is made from, in batches; the same in every round."""
        assert self.noisy is not None
        task: Any = run.task
        rows = torch.linspace(0, len(self.noisy) - 1, min(self.pool, len(self.noisy))).long().unique()
        batches = []
        for i, some in enumerate(rows.split(32)):
            generator = torch.Generator().manual_seed(mix_seed(run.seed, 101, i))
            batches.append(task.make_pair(run, self.noisy.batch(some).to(run.device), generator).x)
        return batches

    def white_noise(self, run: Run) -> Tensor:
        """The first pool: white Gaussian noise of the asked or estimated level."""
        tiles = self.noisy_tiles(run)
        shape = (self.pool, *tiles[0].shape[1:])
        sigma = estimate_sigma(torch.cat(tiles)) if self.sigma is None else self.sigma / 255
        self.first_sigma = 255 * sigma
        generator = torch.Generator().manual_seed(mix_seed(run.seed, 102))
        return (sigma * torch.randn(shape, generator=generator)).to(run.device)

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        self._shown = takes_mask(run.model)
        if self._shown and not self.same_mask and self.alpha:
            raise UserError("method.mid.same_mask=false needs a model that is not shown the mask; set same_mask=true")
        noise = inspect.signature(type(run.model).forward).parameters.get("sigma")
        if noise is not None and noise.default is noise.empty:
            raise UserError("method=mid works on noise of unknown level, and this model has to be told sigma")
        split = run.train_split
        if split is None:
            return
        count = len(split)
        first = min(max(1, round((1 - self.noisy_share) * count)), count - 1)
        if first < 1:
            raise UserError(f"method=mid needs two training images or more, one clean and one noisy; there is {count}")
        # neighbouring tiles are of one photograph: two runs of them share as few photographs as can be
        self.noisy = split.subset(torch.arange(first, count))
        run.train_split = split.subset(torch.arange(first))

    def phases(self, run: Run) -> list[Phase]:
        total = run.trainer.total_steps(len(run.train_split) if run.train_split is not None else 0)
        lengths = [total * (i + 1) // self.rounds - total * i // self.rounds for i in range(self.rounds)]
        return [Phase(f"round{i}", steps) for i, steps in enumerate(lengths) if steps]

    @torch.no_grad()
    def start_phase(self, run: Run) -> None:
        assert run.phase is not None
        if run.phase is run.phases[0]:
            self.noise = self.white_noise(run)
            return
        with run.evaluating():
            found = [self.residuals(x, run.net(x).float()) for x in self.noisy_tiles(run)]
        self.noise = torch.cat(found)

    def own_step(self, run: Run, batch: Batch) -> Tensor:  # type: ignore[override]
        from filtrun.runner import chunks

        task: Any = run.task
        total = torch.zeros((), device=run.device)
        parts = chunks(batch, run.trainer.accumulate)
        for i, part in enumerate(parts):
            run.seed_step(i + 1)
            share = len(part) / len(batch)
            with run.fabric.no_backward_sync(run.net, enabled=i + 1 < len(parts)):
                loss = self.batch_loss(run.net, task.make_pair(run, part).y)
                for method in run.methods:
                    loss = method.loss(run, part, loss)
                run.fabric.backward(loss * share)
            total += loss.detach() * share
        run.each("after_backward")
        if run.trainer.clip:
            run.fabric.clip_gradients(run.net, run.optimizer, max_norm=run.trainer.clip, error_if_nonfinite=False)
        run.optimizer.step()
        run.task_loss = total
        return total

    def before_eval(self, run: Run) -> None:
        plain = run.model.forward
        averaged = functools.partial(self._averaged, plain)
        object.__setattr__(run.model, "forward", averaged)

    def _averaged(self, plain: Callable[..., Any], x: Tensor, **more: Any) -> Tensor:
        more.pop("mask", None)
        return restore(functools.partial(plain, **more), x, self.masks, self.alpha, self.same_mask, self._shown)

    def after_eval(self, run: Run) -> None:
        object.__delattr__(run.model, "forward")

    def state_dict(self) -> dict[str, Any]:
        return {**({} if self.noise is None else {"noise": self.noise}), **self.delta_state()}

    def delta_state(self) -> dict[str, Any]:
        return {"first_sigma": self.first_sigma}  # the pool of noise is needed to go on training only

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.noise, self.first_sigma = state.get("noise"), state.get("first_sigma", 0.0)

    def report(self, run: Run) -> dict[str, float | int | str]:
        found: dict[str, float | int | str] = {"rounds": self.rounds, "first_sigma": self.first_sigma}
        if self.noise is not None:
            found |= {"noise_std": 255 * self.noise.std().item(), "noise_patches": len(self.noise)}
        return found
