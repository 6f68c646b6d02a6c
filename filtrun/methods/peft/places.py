"""Where adapters go: the blocks, projections and convolutions of a model, found by what they are and not by a list.

Works on the own models, timm's, diffusers' and most others: a transformer block is a module that holds ``norm2`` and
``mlp``; an attention module holds ``q`` and ``v`` (or one joint ``qkv``) as linear layers; a spatial convolution has a
kernel above 1x1 and keeps the size of its input up to the stride.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

SEPARATE = {
    "q": ("q", "q_proj", "to_q", "query", "q_linear"),
    "k": ("k", "k_proj", "to_k", "key", "k_linear"),
    "v": ("v", "v_proj", "to_v", "value", "v_linear"),
}
JOINT = {"qkv": ("q", "k", "v"), "qkv_proj": ("q", "k", "v"), "to_qkv": ("q", "k", "v"), "kv": ("k", "v")}
TOKENS = ("cls_token", "token", "class_token", "dist_token")
IMAGE_CHANNELS = 4
"""A convolution with at most this many input channels reads the image: it is the stem or the patch embedding."""


@dataclass(frozen=True)
class Projection:
    """A linear layer of an attention module that makes queries ("q"), keys ("k") or values ("v").

    `start` and `stop` are the rows of its weight that do so (outputs of a joint layer lie one after the other).
    """

    role: str
    name: str
    module: nn.Linear
    start: int
    stop: int


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> block with an MLP (``mlp``) and the norm in front of or behind it (``norm2``), in definition order."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(getattr(m, "norm2", None), nn.Module) and isinstance(getattr(m, "mlp", None), nn.Module)
    }


def mlp_width(block: nn.Module) -> int:
    """Width C of the tokens a block's MLP reads; ValueError when it has no linear layer or 1x1 convolution."""
    for module in block.mlp.modules():  # type: ignore[union-attr]
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError(f"{type(block).__name__}.mlp has no linear layer")


def projections(model: nn.Module, roles: str = "qkv") -> list[Projection]:
    """The projections of every attention module whose role is one of the letters of `roles`, in definition order."""
    found: list[Projection] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for attribute, child in module.named_children():
            if not isinstance(child, nn.Linear):
                continue
            name = prefix + attribute
            if attribute in JOINT and child.out_features % len(JOINT[attribute]) == 0:
                size = child.out_features // len(JOINT[attribute])
                parts = [(role, i * size, (i + 1) * size) for i, role in enumerate(JOINT[attribute])]
            else:
                parts = [(role, 0, child.out_features) for role, names in SEPARATE.items() if attribute in names]
            found += [Projection(role, name, child, start, stop) for role, start, stop in parts if role in roles]
    return found


def spatial_convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Name -> 2-D convolution over features with a kernel above 1x1 whose output has the size of its input / stride.

    Convolutions that read the image (stem, patch embedding) are left out.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: m for name, m in found.items() if m.in_channels > IMAGE_CHANNELS and _keeps_size(m)}


def _keeps_size(conv: nn.Conv2d) -> bool:
    if max(conv.kernel_size) == 1:
        return False
    if isinstance(conv.padding, str):
        return conv.padding == "same"
    shapes = zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)
    return all(2 * padding == dilation * (kernel - 1) for kernel, padding, dilation in shapes)


def image_layers(model: nn.Module) -> list[nn.Module]:
    """The convolutions that read the image, which transfer methods leave alone as they do the patch embedding."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels <= IMAGE_CHANNELS]


def class_tokens(model: nn.Module) -> list[nn.Parameter]:
    """The class token of a vision transformer (and the distillation token of DeiT); empty for other models."""
    return [p for name, p in model._parameters.items() if name in TOKENS and p is not None]
