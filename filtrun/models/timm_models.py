"""Any classifier of timm (Wightman, "PyTorch Image Models", github.com/huggingface/pytorch-image-models)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from filtrun.errors import UserError
from filtrun.models.checkpoint import read_state
from filtrun.models.hub import hub_cache_if_offline


def timm_classifier(
    name: str = "resnet18",
    pretrained: bool = False,
    weights: str | None = None,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
    **options: Any,
) -> nn.Module:
    """Build a timm classifier for images of a given size.

    Args:
        name: a timm model, with or without the tag of its weights: ``resnet18``, ``resnet18.a1_in1k``.
        pretrained: take the weights that timm publishes, from its cache or over the network.
        weights: local file to take them from instead (``.safetensors``, or a PyTorch file that holds tensors only).
            Either way timm adapts a first convolution of other channels and position embeddings of another size, and a
            head of another number of classes starts afresh.
        in_channels, num_classes: images have shape (N, in_channels, H, W), logits (N, num_classes).
        image_size: side in pixels; passed on as ``img_size`` where the architecture is built for one size.
        options: further arguments of the architecture, e.g. ``patch_size=2``, ``drop_path_rate=0.1``.

    Returns:
        The model, in training mode. It is run once on a blank image, so that a size it cannot take shows here.

    Raises:
        UserError: unknown name, an option the architecture does not have, weights that are missing, damaged or do not
            fit, no network for published weights, or images too small for the architecture.
    """
    from filtrun.compat import torchvision

    torchvision()  # timm imports it
    import timm

    base = name.split(".")[0].split("/")[-1]
    if not timm.is_model(base):
        raise _unknown_name(base, timm.list_models())
    arguments: dict[str, Any] = {"in_chans": in_channels, "num_classes": num_classes, **_plain(options)}
    if weights is not None:
        # built with the file's own head, so that every name must fit; timm would let all pass for another head
        state = read_state(weights)
        arguments["num_classes"] = _classes_in(state, base)
        arguments["pretrained_cfg_overlay"] = {
            "state_dict": state,
            "custom_load": False,
            "num_classes": arguments["num_classes"],
        }
    elif pretrained and not timm.is_model_pretrained(name):
        raise UserError(f"timm publishes no weights for model.name={name}; start from model.base=scratch or pretrain")
    source = weights or ("published weights" if pretrained else None)
    with hub_cache_if_offline() if pretrained and weights is None else contextlib.nullcontext():
        model = _create(name, bool(source), arguments, image_size, source)
    if arguments["num_classes"] != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    _try_out(model, name, in_channels, image_size)
    return model


def _classes_in(state: Mapping[str, torch.Tensor], base: str) -> int:
    """Number of classes of the weights in `state`: rows of the head, or what timm publishes where names differ."""
    import timm

    config = timm.get_pretrained_cfg(base)
    heads = getattr(config, "classifier", None) or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        if f"{head}.weight" in state:
            return len(state[f"{head}.weight"])
    return 1000 if config is None else config.num_classes


def _create(name: str, pretrained: bool, arguments: dict[str, Any], image_size: int, source: str | None) -> nn.Module:
    """Call timm, with the image size first and without where the architecture takes any."""
    import timm

    sized: list[dict[str, Any]] = [{**arguments, "img_size": image_size}, arguments]
    for values in sized:
        try:
            return timm.create_model(name, pretrained=pretrained, **values)
        except TypeError as error:
            if "img_size" in str(error):
                continue
            raise UserError(f"model.name={name} cannot be built with these options: {_line(error)}") from error
        except (OSError, ConnectionError) as error:  # the hub's and urllib's failures derive from OSError
            raise UserError(
                f"model.name={name}: the published weights could not be fetched ({type(error).__name__})\n"
                "without a network set model.weights=FILE, or start from model.base=scratch"
            ) from error
        except (RuntimeError, ValueError, KeyError, AssertionError, ZeroDivisionError) as error:
            what = f"{image_size}-pixel images" + (f" from {source}" if source else "")
            raise UserError(f"model.name={name} cannot be built for {what}: {_line(error)}") from error
    raise UserError(f"model.name={name} takes no image size and cannot be built")


def _try_out(model: nn.Module, name: str, in_channels: int, image_size: int) -> None:
    """Run one blank image through, so that a mismatch of sizes is told before any training."""
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, in_channels, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"model.name={name} cannot take {image_size}-pixel images: {_line(error)}") from error
    model.train()


def _unknown_name(name: str, known: Sequence[str]) -> UserError:
    """timm has more than a thousand models: say the three nearest, not all."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near = near or [model for model in known if name and name in model][:3]
    if not near:
        return UserError(f"unknown timm model {name!r}; timm.list_models() has the {len(known)} names")
    hint = ", ".join(map(repr, near))
    return UserError(f"unknown timm model {name!r}; closest of {len(known)}: {hint}")


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Config lists as tuples, which is what the architectures take."""
    return {
        key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in options.items()
    }


def _line(error: BaseException) -> str:
    """An error's text on one line, cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
