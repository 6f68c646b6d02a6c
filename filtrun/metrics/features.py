"""Networks that turn images into feature vectors for the distances in `filtrun.metrics.distribution`.

A feature network is any callable with a `name`; the name goes into records, since numbers under different networks
cannot be compared. Here: any classifier's penultimate layer, and Inception-v3 where a weights file is present.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from filtrun.errors import UserError

INCEPTION_VARIABLE = "FILTRUN_INCEPTION"
_HEADS = ("head", "fc", "classifier", "linear")


class FeatureNet(Protocol):
    """Images (N, C, H, W) in [0, 1] -> features (N, D). `name` says which network and weights."""

    name: str

    def __call__(self, images: Tensor) -> Tensor: ...


@torch.no_grad()
def feature_matrix(net: FeatureNet, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Features (N, D) of a tensor of images (N, C, H, W) in [0, 1], computed `batch_size` at a time."""
    return torch.cat([net(part) for part in images.split(batch_size)])


class ClassifierFeatures:
    """The input of a classifier's last linear layer, as features.

    Args:
        net: the classifier; runs in eval mode without gradients and gets its mode back.
        name: says which classifier and weights.
        head: the layer whose input is taken; None: an attribute head, fc, classifier or linear that is a linear
            layer, else the last linear layer of the network.
        normalize: applied to images in [0, 1] before the network, if it expects something else.

    Raises:
        UserError: no linear layer was found and no head is given.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str,
        *,
        head: nn.Module | None = None,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.net, self.name, self.normalize = net, name, normalize
        self.head = head or _find_head(net)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> features (N, D) float32."""
        taken: list[Tensor] = []

        def take(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            taken.append(inputs[0])

        training = self.net.training
        hook = self.head.register_forward_pre_hook(take)
        try:
            self.net.eval()
            self.net(images if self.normalize is None else self.normalize(images))
        finally:
            hook.remove()
            self.net.train(training)
        return taken[-1].flatten(1).float()


def _find_head(net: nn.Module) -> nn.Module:
    named = [getattr(net, name, None) for name in _HEADS]
    linear = [layer for layer in named if isinstance(layer, nn.Linear)]
    linear = linear or [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1:]
    if not linear:
        raise UserError(f"{type(net).__name__} has no linear layer to take features from; name its head")
    return linear[0]


class InceptionFeatures:
    """2048 pooled features of Inception-v3 (torchvision's network), images resized to 299 x 299 bilinearly.

    Args:
        path: a plain state dict, .safetensors or .pth (read without running code). Two kinds are known by the size of
            their last layer: torchvision's ImageNet weights (1000 classes), and the converted weights of the original
            FID network (1008 classes), which pools without counting the padding and by maximum in its last block.
        device: where it runs.

    `name` holds the kind and the first 8 digits of the file's sha256. Only the 1008-class kind gives FID values that
    may be held against published ones (up to the resizing).

    Raises:
        UserError: no such file, or not a state dict of this network.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        path = Path(path).expanduser()
        state = _read_state(path)
        classes = len(state["fc.weight"]) if "fc.weight" in state else 0
        if classes not in (1000, 1008):
            raise UserError(f"{path} is not a state dict of Inception-v3 with 1000 or 1008 classes")
        net = _inception(state, classes, path)
        self.net = net.eval().requires_grad_(False).to(device)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        self.name = f"inception_v3-{'imagenet' if classes == 1000 else 'fid2015'}-{digest}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 1 or 3, H, W) in [0, 1] -> features (N, 2048) float32."""
        x = images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()
        x = nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)


def find_inception() -> Path | None:
    """The Inception weights of this machine: $FILTRUN_INCEPTION, else ~/.cache/filtrun/inception.{safetensors,pth}.

    Raises:
        UserError: the variable is set and names no file.
    """
    named = os.environ.get(INCEPTION_VARIABLE)
    if named:
        if not Path(named).expanduser().is_file():
            raise UserError(f"{INCEPTION_VARIABLE}={named} is not a file")
        return Path(named).expanduser()
    folder = Path.home() / ".cache" / "filtrun"
    return next((p for p in (folder / "inception.safetensors", folder / "inception.pth") if p.is_file()), None)


def inception_features(device: torch.device | str = "cpu") -> InceptionFeatures:
    """Inception features from the weights that `find_inception` finds; UserError says where to put them."""
    path = find_inception()
    if path is None:
        raise UserError(
            f"no Inception weights: set {INCEPTION_VARIABLE}=FILE or put a state dict (torchvision's inception_v3 "
            "or the FID one) at ~/.cache/filtrun/inception.safetensors"
        )
    return InceptionFeatures(path, device)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"Inception weights {path} are not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format fails in its own way, and so does a TorchScript archive
        raise UserError(f"{path} is not a readable state dict: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def _inception(state: dict[str, Tensor], classes: int, path: Path) -> nn.Module:
    from filtrun.compat import torchvision

    torchvision()
    from torchvision.models import inception_v3

    state = {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}  # only used in training
    net = inception_v3(weights=None, num_classes=classes, aux_logits=False, transform_input=False, init_weights=False)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit Inception-v3: {str(error).splitlines()[-1].strip()[:200]}") from error
    net.fc = nn.Identity()
    if classes == 1008:
        for name, block in net.named_children():
            if hasattr(block, "branch_pool"):
                _repool(block, maximum=name == "Mixed_7c")
    return net


def _repool(block: Any, maximum: bool) -> None:
    """Give a block's pooling branch (its last) the pooling of the original FID network."""
    plain = block._forward

    def pool(x: Tensor) -> Tensor:
        if maximum:
            return nn.functional.max_pool2d(x, 3, 1, 1)
        return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    block._forward = lambda x: [*plain(x)[:-1], block.branch_pool(pool(x))]
