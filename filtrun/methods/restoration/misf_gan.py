"""Adversarial training of an inpainting network, as MISF trains its generator (CVPR 2022, arXiv 2203.06304).

Official code tsingqguo/misf (``src/models.py``, ``src/loss.py``), which follows edge-connect (arXiv 1901.00212). The
generator's loss is ``L1 / mean(mask) + 0.1 adversarial + 0.1 perceptual + 250 style``; a patch discriminator has an
optimizer of its own. Both losses are computed before either optimizer steps.

Where this differs from the official code, on purpose: there the generator's backward pass also writes 0.1 times its
adversarial gradient into the discriminator, which then steps on the sum; here the discriminator is frozen in that pass
(``official_gradients=true`` gives theirs). Perceptual and style terms need VGG-19's ImageNet weights in torch's hub
cache and are left out, and the record says so, where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.errors import UserError
from filtrun.losses import VggFeatures
from filtrun.method import Method, count
from filtrun.models.misf_parts import PatchDiscriminator
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run

CONTENT = (1, 6, 11, 20, 29)
"""relu1_1, relu2_1, relu3_1, relu4_1, relu5_1 among the layers of VGG-19."""
STYLE = (8, 17, 26, 31)
"""relu2_2, relu3_4, relu4_4, relu5_2."""
SMALLEST = 24
"""Side of the smallest image the discriminator takes."""


def gan_loss(logits: Tensor, real: bool, kind: str = "nsgan", generator: bool = False) -> Tensor:
    """Adversarial loss of a discriminator's logits, a scalar.

    Args:
        real: what the logits should say.
        kind: ``nsgan``: binary cross-entropy; ``lsgan``: squared distance of the probability to 0 or 1; ``hinge``.
        generator: the loss of the generator, which for ``hinge`` is minus the mean.
    """
    if kind == "hinge":
        return -logits.mean() if generator else F.relu(1 - logits if real else 1 + logits).mean()
    wanted = torch.full_like(logits, float(real))
    if kind == "lsgan":
        return F.mse_loss(torch.sigmoid(logits), wanted)
    return F.binary_cross_entropy_with_logits(logits, wanted)


def gram(features: Tensor) -> Tensor:
    """Gram matrices (N, C, C) of feature maps (N, C, H, W), divided by C H W."""
    n, c, h, w = features.shape
    flat = features.reshape(n, c, h * w)
    return flat @ flat.mT / (c * h * w)


def content_loss(output: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the L1 distance of feature maps."""
    return torch.stack([F.l1_loss(a, b) for a, b in zip(output, target, strict=True)]).sum()


def style_loss(output: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the L1 distance of Gram matrices."""
    return torch.stack([F.l1_loss(gram(a), gram(b)) for a, b in zip(output, target, strict=True)]).sum()


def masked_l1(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference of the whole image over the mean of the mask, counted as one pixel at least."""
    return F.l1_loss(output, target) / mask.mean().clamp(min=1 / mask.numel())


def vgg19_features(normalize: bool = False, pretrained: bool = True) -> VggFeatures | None:
    """VGG-19 up to relu5_2, giving the layers of CONTENT and STYLE in ascending order; None without its weights.

    Args:
        normalize: subtract ImageNet's mean and divide by its deviation first; the official code does not.
        pretrained: False: random weights (for tests).
    """
    from filtrun.compat import torchvision
    from filtrun.metrics.image import cached_weights

    path = cached_weights("vgg19-")
    if pretrained and path is None:
        return None
    torchvision()
    from torchvision.models import vgg19

    net = vgg19(weights=None)
    if pretrained and path is not None:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    made = VggFeatures(net.features, tuple(sorted(CONTENT + STYLE)))
    if not normalize:
        made.mean.zero_()  # type: ignore[operator]
        made.std.fill_(1.0)  # type: ignore[operator]
    return made


def split_layers(features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Feature maps of `vgg19_features` as (content layers, style layers)."""
    order = sorted(CONTENT + STYLE)
    named = dict(zip(order, features, strict=True))
    return [named[i] for i in CONTENT], [named[i] for i in STYLE]


@dataclass
class MisfGan(Method):
    """Train an inpainting network against a patch discriminator; it owns the training step and the loss.

    Batches need a mask, so it works with task=inpaint and any of its models. ``task.losses`` has no effect.
    """

    l1: float = opt(1.0, "weight of L1 / mean(mask)", low=0, source="config.yml")
    adversarial: float = opt(0.1, "weight of the adversarial term", low=0, source="config.yml")
    content: float = opt(0.1, "weight of the perceptual term", low=0, source="config.yml")
    style: float = opt(250.0, "weight of the style term, inside the hole", low=0, source="config.yml")
    gan: str = opt("nsgan", "adversarial loss", choices=("nsgan", "lsgan", "hinge"), source="config.yml")
    discriminator_lr: float = opt(0.1, "learning rate of the discriminator over that of the generator", low=0,
                                  source="config.yml")  # fmt: skip
    discriminator_width: int = opt(64, "channels of its first layer", low=1, source="src/networks.py")
    betas: list[float] = opt([0.0, 0.9], "moment decay of the discriminator's Adam", source="config.yml")
    features: str = opt("auto", "VGG-19 for the perceptual and style terms: where its weights are, or needed, or never",
                        choices=("auto", "vgg19", "none"))  # fmt: skip
    normalize_features: bool = opt(False, "normalise VGG's input as it was trained; the official code does not")
    official_gradients: bool = opt(False, "add the generator's adversarial gradient to the discriminator's")

    trains: ClassVar = "all"
    tasks: ClassVar = ("inpaint",)
    paper: ClassVar[str] = "MISF, arXiv 2203.06304 (CVPR 2022)"

    def __post_init__(self) -> None:
        check_options(self, "method.misf_gan")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"method.misf_gan.betas={self.betas} must be two numbers in [0, 1)")
        self.vgg: VggFeatures | None = None
        self.discriminator: PatchDiscriminator | None = None
        self.optimizer: torch.optim.Adam | None = None

    def attach(self, channels: int, device: torch.device | str = "cpu", lr: float = 1e-4) -> MisfGan:
        """Build the discriminator and its optimizer, and find VGG-19's weights; returns self.

        Raises UserError when features=vgg19 and its weights are not there.
        """
        if self.features != "none" and (self.content or self.style):
            self.vgg = vgg19_features(self.normalize_features)
            if self.vgg is None and self.features == "vgg19":
                raise UserError(
                    "method.misf_gan.features=vgg19 needs torchvision's vgg19-dcbb9e9d.pth in "
                    f"{torch.hub.get_dir()}/checkpoints; features=none trains without"
                )
            self.vgg = None if self.vgg is None else self.vgg.to(device)
        self.discriminator = PatchDiscriminator(channels, self.discriminator_width).to(device)
        betas = (self.betas[0], self.betas[1])
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr * self.discriminator_lr, betas=betas)
        return self

    # -- the two losses --------------------------------------------------------------------------------------------
    def discriminator_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean of the losses on real and on generated images; gives no gradient to `output`."""
        assert self.discriminator is not None
        real = gan_loss(self.discriminator(target), True, self.gan)
        return (real + gan_loss(self.discriminator(output.detach()), False, self.gan)) / 2

    def generator_terms(self, output: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Weighted terms of the generator's loss for images (N, C, H, W) in [0, 1] and mask (N, 1, H, W)."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(self.official_gradients)
        terms = {"l1": self.l1 * masked_l1(output, target, mask)}
        if self.adversarial:
            logits = self.discriminator(output)
            terms["adversarial"] = self.adversarial * gan_loss(logits, True, self.gan, generator=True)
        self.discriminator.requires_grad_(True)
        if self.vgg is not None and self.content:
            seen, wanted = (split_layers(self.vgg(image))[0] for image in (output, target))
            terms["content"] = self.content * content_loss(seen, wanted)
        if self.vgg is not None and self.style:
            seen, wanted = (split_layers(self.vgg(image * mask))[1] for image in (output, target))
            terms["style"] = self.style * style_loss(seen, wanted)
        return terms

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        crop = getattr(run.task, "crop", SMALLEST)
        if 0 < crop < SMALLEST:
            raise UserError(f"task.crop={crop} is too small for the discriminator; allowed is [{SMALLEST}, inf]")
        if self.official_gradients and run.trainer.precision == "16":
            raise UserError("method.misf_gan.official_gradients=true needs trainer.precision=32 or bf16")
        self.attach(run.data.channels, run.device, run.trainer.lr)

    def own_step(self, run: Run, batch: Any) -> Tensor:  # type: ignore[override]
        from filtrun.runner import chunks
        from filtrun.tasks.image_to_image import result

        assert self.discriminator is not None and self.optimizer is not None
        task: Any = run.task
        total, distance = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
        self.optimizer.zero_grad()
        parts = chunks(batch, run.trainer.accumulate)
        for i, part in enumerate(parts):
            run.seed_step(i + 1)
            share = len(part) / len(batch)
            with run.fabric.no_backward_sync(run.net, enabled=i + 1 < len(parts)):
                made = task.make_pair(run, part)
                raw = task.forward(run, made)
                run.shared["pair"], run.shared["output"] = made, raw
                output = result(raw).float()
                against = self.discriminator_loss(output, made.y)
                terms = self.generator_terms(output, made.y, made.mask)
                loss = torch.stack(list(terms.values())).sum()
                for method in run.methods:
                    loss = method.loss(run, part, loss)
                run.fabric.backward(loss * share)
            (against * share).backward()
            total += loss.detach() * share
            distance += terms["l1"].detach() * share
        run.each("after_backward")
        if run.trainer.clip:
            run.fabric.clip_gradients(run.net, run.optimizer, max_norm=run.trainer.clip, error_if_nonfinite=False)
        run.optimizer.step()
        self._step(run)
        run.task_loss = distance
        return total

    def _step(self, run: Run) -> None:
        """The discriminator's update, on the mean of all processes' gradients, at its share of the learning rate."""
        assert self.discriminator is not None and self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = run.optimizer.param_groups[0]["lr"] * self.discriminator_lr
        for parameter in self.discriminator.parameters():
            if parameter.grad is not None:
                parameter.grad = run.reduce(parameter.grad, "mean")
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        if self.discriminator is None or self.optimizer is None:
            return {}
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def delta_state(self) -> dict[str, Any]:
        return {}  # the trained generator needs no discriminator

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and self.discriminator is not None and self.optimizer is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])

    def report(self, run: Run) -> dict[str, float | int | str]:
        size = 0 if self.discriminator is None else count(nn.Module.parameters(self.discriminator))
        used = "vgg19" if self.vgg is not None else "none (no perceptual and style terms)"
        return {"discriminator_params": size, "features": used}
