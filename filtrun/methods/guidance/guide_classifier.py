"""An ordinary classifier, trained on clean images, made fit to guide: built or loaded, trained as a stage, smoothed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from filtrun.constants import constant
from filtrun.errors import UserError
from filtrun.method import parent_of

if TYPE_CHECKING:
    from filtrun.context import Run

GUIDE_SEED = 5003
"""Not the seed of the judge or of the feature network: what guides must not be what measures."""

INPUTS = ("unit", "imagenet", "signed")


class Guide:
    """A classifier of images in [-1, 1]: `guide(x)` with x (N, C, H, W) float32 -> logits (N, K), with gradients to x.

    Args:
        net: the classifier, smoothed or not; set to evaluation mode, its parameters to need no gradient.
        inputs: what it reads: "unit" [0, 1]; "imagenet" the same minus ImageNet's mean over its deviation; "signed"
            the images as they are, which is what the official EluCD code feeds to networks trained on "imagenet".
    """

    def __init__(self, net: nn.Module, inputs: str = "unit") -> None:
        self.net, self.inputs = net.eval().requires_grad_(False), inputs

    def __call__(self, x: Tensor) -> Tensor:
        if self.inputs != "signed":
            x = (x + 1) / 2
        if self.inputs == "imagenet":
            mean, std = (constant(row, x.dtype, x.device) for row in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            if x.shape[1] == 1:
                mean, std = mean.mean(), std.mean()
            x = (x - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
        return self.net(x)


def soften(net: nn.Module, beta: float) -> int:
    """Replace every ``nn.ReLU`` in `net` by ``nn.Softplus(beta)``, in place; returns how many there were.

    softplus(x) = ln(1 + exp(beta x)) / beta goes to relu(x) as beta grows. A ReLU used in several places is one module
    and counts once for each of its names.
    """
    names = [name for name, module in net.named_modules(remove_duplicate=False) if isinstance(module, nn.ReLU)]
    for name in names:
        parent, attribute = parent_of(net, name)
        setattr(parent, attribute, nn.Softplus(beta=beta))
    return len(names)


def tempered_log_prob(logits: Tensor, y: Tensor, joint: float = 1.0, denominator: float = 1.0) -> Tensor:
    """ln( exp(joint z_y) / sum_j exp(denominator z_j) ), (N,), of logits z (N, K) and classes y (N,).

    joint = denominator = 1 is the log-probability; denominator = 0 leaves the logit alone (EluCD, section 4.3).
    """
    chosen = logits.gather(1, y[:, None])[:, 0]
    return joint * chosen - torch.logsumexp(denominator * logits, 1)


def classifier_gradient(classifier: Any, x: Tensor, y: Tensor, joint: float = 1.0, denominator: float = 1.0) -> Tensor:
    """Gradient of the tempered log-probability of `y` (N,) at the images x (N, C, H, W) in [-1, 1], in x's type.

    Nothing is propagated into whatever made x. Samples whose class is none of the classifier's (the null class) get 0.
    Computed in float32, also under autocast.
    """
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        image = x.detach().float().requires_grad_(True)
        logits = classifier(image)
        known = y < logits.shape[1]
        chosen = tempered_log_prob(logits, torch.where(known, y, 0), joint, denominator)
        (gradient,) = torch.autograd.grad((chosen * known).sum(), image)
    return gradient.to(x.dtype)


def guide_classifier(run: Run, name: str, weights: str | None, steps: int, inputs: str) -> nn.Module:
    """The classifier that guides: from a weights file, or trained on clean training images of all classes (a stage).

    Args:
        name: "small_cnn", or a timm model such as resnet18.
        weights: local file; None trains.
        steps: optimizer steps of the training.
        inputs: see `Guide`; a classifier trained here reads "unit".

    Raises:
        UserError: unknown model or unreadable weights; another input than "unit" without weights.
    """
    from filtrun.tasks.classify import Classify
    from filtrun.train_stage import train_stage
    from filtrun.trainer import Trainer

    sizes: dict[str, Any] = {
        "num_classes": run.data.num_classes, "in_channels": run.data.channels, "image_size": run.data.image_size,
    }  # fmt: skip

    def make() -> nn.Module:
        if name == "small_cnn":
            from filtrun.metrics.small_cnn import SmallCNN

            return SmallCNN(**sizes)
        from filtrun.models.timm_models import timm_classifier

        return timm_classifier(name, weights=weights, **sizes)

    if weights is not None:
        net = make()
        if name == "small_cnn":
            from filtrun.models.checkpoint import load_weights

            load_weights(net, weights)
        return net.to(run.device)
    if inputs == "imagenet":
        raise UserError(
            "method.elucd.classifier_input=imagenet is for method.elucd.classifier_weights=FILE; a classifier trained "
            "here reads unit"
        )
    batch = min(128, len(run.data.split("train")))
    trainer = Trainer(steps=steps, batch_size=batch, lr=3e-3, warmup=min(40, steps // 10), clip=0.0, log_every=50)
    net, _ = train_stage(
        run, "guide-classifier", make, parts={"net": name, **sizes}, task=Classify(), trainer=trainer, seed=GUIDE_SEED,
        normalize="none",
    )  # fmt: skip
    return net


def softened(net: nn.Module, beta: float | None) -> nn.Module:
    """A copy of `net` with Softplus in place of every ReLU; `beta` None keeps them.

    Raises UserError when there is no ``nn.ReLU`` to replace (one called as a function cannot be).
    """
    made = copy.deepcopy(net)
    if beta is not None and not soften(made, beta):
        raise UserError(
            f"method.elucd.softplus_beta={beta:g}: {type(net).__name__} has no nn.ReLU to smooth; choose another "
            "classifier, or softplus_beta=null"
        )
    return made
