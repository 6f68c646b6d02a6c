"""Denoising networks of the diffusers library (github.com/huggingface/diffusers) behind filtrun's denoiser contract.

Three classes: UNet2DModel (the DDPM U-Net, Ho et al. 2020), UNet2DConditionModel (with cross-attention, Rombach et al.
2022; the class enters as learned tokens) and DiTTransformer2DModel (Peebles & Xie, ICCV 2023, arXiv 2212.09748).
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from filtrun.errors import UserError, closest, unknown
from filtrun.models.hub import hub_cache_if_offline

CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
TOKENS = 4  # learned tokens per class that cross-attention reads
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
}


class DiffusersDenoiser(nn.Module):
    """A diffusers network called as ``forward(x, t, y)``.

    Attributes:
        net: the diffusers model.
        time_input: "timestep": the second argument of `forward` is a time of the discrete schedule.
        num_classes: K; the id K is the null class. A network without classes ignores `y`.
        conditional: whether the network reads `y`.
        schedule: the discrete schedule the weights were trained with (num_train_timesteps, beta_schedule, beta_start,
            beta_end, prediction_type), DDPM's linear one if the weights' folder does not say.
    """

    time_input = "timestep"

    def __init__(self, net: nn.Module, num_classes: int, image_size: int, schedule: dict[str, Any] | None = None):
        super().__init__()
        self.net, self.num_classes, self.image_size = net, num_classes, image_size
        self.schedule = {**SCHEDULE, **(schedule or {})}
        self.kind = type(net).__name__
        config: Any = net.config
        self.in_channels: int = config.in_channels
        self.tokens: nn.Embedding | None = None
        self.conditional = True
        if self.kind == "DiTTransformer2DModel":
            self.multiple = config.patch_size
            for module in net.modules():  # labels are dropped by the training loss, not a second time in here
                if hasattr(module, "dropout_prob"):
                    setattr(module, "dropout_prob", 0.0)  # noqa: B010 (Module's __setattr__ is typed for tensors)
        else:
            self.multiple = 2 ** (len(config.block_out_channels) - 1)
            self.conditional = config.num_class_embeds is not None
        if self.kind == "UNet2DConditionModel":
            self.width = config.cross_attention_dim
            self.tokens = nn.Embedding(num_classes + 1, TOKENS * self.width)
            nn.init.normal_(self.tokens.weight, std=0.5)
            self.conditional = True

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the network.

        Args:
            x: (N, C, H, W) state as the network was trained on it (variance-preserving for a discrete schedule);
                padded inside to a size the network can halve.
            t: (N,) or scalar, time in [0, num_train_timesteps), also between two steps.
            y: (N,) int64 class ids in [0, K], K for no class; None means K for all.

        Returns:
            (N, C, H, W): the first C channels of the network's ``.sample`` (a learned variance is left out).
        """
        n, channels, height, width = x.shape
        y = torch.full((n,), self.num_classes, device=x.device) if y is None else y
        below, right = -height % self.multiple, -width % self.multiple
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        t = t.reshape(-1).expand(n)
        if self.tokens is not None:
            words = self.tokens(y).view(n, TOKENS, self.width)
            out = self.net(x, t, encoder_hidden_states=words).sample
        else:
            out = self.net(x, timestep=t, class_labels=y if self.conditional else None).sample
        return out[:, :channels, :height, :width]


def diffusers_denoiser(
    cls: str = "UNet2DModel",
    weights: str | None = None,
    subfolder: str | None = None,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
    pretrained: bool = False,
    **config: Any,
) -> DiffusersDenoiser:
    """Build a diffusers network as a denoiser, from a config or from published weights.

    Args:
        cls: UNet2DModel | UNet2DConditionModel | DiTTransformer2DModel.
        weights: local folder with ``config.json`` and safetensors, or a hub id such as ``google/ddpm-cifar10-32``.
            None starts from scratch with a small config that suits `image_size`.
        subfolder: the network's place in a pipeline (``unet``, ``transformer``); found by itself in a local folder.
        in_channels, num_classes: of the data. A class-conditional network has num_classes + 1 embeddings.
        image_size: side in pixels.
        pretrained: insist on `weights`.
        config: arguments of the diffusers class that replace those of the small config (not with `weights`).

    Raises:
        UserError: unknown class or config key, weights that are missing, are not safetensors or do not match the data,
            or no network for a hub id.
    """
    from filtrun.compat import torchvision

    torchvision()  # diffusers imports it
    import diffusers

    if cls not in CLASSES:
        raise unknown("model.cls", cls, CLASSES)
    target = getattr(diffusers, cls)
    if pretrained and weights is None:
        raise UserError("model.base=hub needs model.weights: a hub id of the form OWNER/NAME, or a local folder")
    if weights is not None:
        if config:
            raise UserError(f"model.{next(iter(config))} cannot be set beside model.weights, which fix the config")
        net, schedule = _load(target, weights, subfolder)
        _check_loaded(net, weights, in_channels, num_classes)
        return DiffusersDenoiser(net, num_classes, image_size, schedule)
    allowed = [name for name in inspect.signature(target.__init__).parameters if name != "self"]
    for key in config:
        if key not in allowed:
            raise UserError(f"unknown key model.{key} of {cls}{closest(key, allowed)}")
    values = small_config(cls, image_size, num_classes)
    values |= {"in_channels": in_channels, "out_channels": in_channels}
    values |= {k: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in config.items()}
    try:
        net = target(**values)
    except (ValueError, TypeError, NotImplementedError, ZeroDivisionError) as error:
        raise UserError(f"{cls} cannot be built: {str(error).strip().splitlines()[0][:200]}") from error
    return DiffusersDenoiser(net, num_classes, image_size)


def small_config(cls: str, image_size: int, num_classes: int) -> dict[str, Any]:
    """A config of a few hundred thousand parameters for images of `image_size` pixels.

    U-Nets: two resolutions below 16 pixels, three from there on, attention at the lowest. DiT: patches that leave at
    most 64 tokens.
    """
    if cls == "DiTTransformer2DModel":
        patch = next(p for p in (1, 2, 4, 8, 16, 32, 64) if -(-image_size // p) <= 8 or p == 64)
        side = -(-image_size // patch) * patch
        return {
            "sample_size": side,
            "patch_size": patch,
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 24,
            "num_embeds_ada_norm": num_classes,
        }
    kind = "CrossAttn" if cls == "UNet2DConditionModel" else "Attn"
    channels = [32, 64] if image_size < 16 else [32, 64, 64]
    plain = len(channels) - 1
    values: dict[str, Any] = {
        "sample_size": image_size,
        "block_out_channels": channels,
        "down_block_types": ["DownBlock2D"] * plain + [f"{kind}DownBlock2D"],
        "up_block_types": [f"{kind}UpBlock2D"] + ["UpBlock2D"] * plain,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    if cls == "UNet2DConditionModel":
        return values | {"cross_attention_dim": 64, "attention_head_dim": 4}
    return values | {"num_class_embeds": num_classes + 1, "attention_head_dim": 32}


def _load(target: Any, weights: str, subfolder: str | None) -> tuple[nn.Module, dict[str, Any]]:
    folder = Path(weights).expanduser()
    local = folder.is_dir()
    if not local and (weights.startswith(("/", ".", "~")) or weights.count("/") != 1):
        raise UserError(f"model.weights={weights} is neither a folder here nor a hub id of the form OWNER/NAME")
    if local and subfolder is None and not (folder / "config.json").is_file():
        inside = [name for name in ("unet", "transformer") if (folder / name / "config.json").is_file()]
        if not inside:
            raise UserError(f"model.weights={weights} has no config.json, also not in unet/ or transformer/")
        subfolder = inside[0]
    where = {} if subfolder is None else {"subfolder": subfolder}
    online = True
    try:
        with contextlib.nullcontext(True) if local else hub_cache_if_offline() as online:
            said = target.load_config(str(folder) if local else weights, **where).get("_class_name", target.__name__)
            if said != target.__name__:
                raise UserError(f"model.weights={weights} is a {said}; model.cls is {target.__name__}")
            # low_cpu_mem_usage would build on the meta device, which needs accelerate
            net = target.from_pretrained(
                str(folder) if local else weights, use_safetensors=True, low_cpu_mem_usage=False, **where
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if not online:
            raise UserError(
                f"model.weights={weights}: the hub cannot be reached and its cache has no copy\n"
                "give a local folder with config.json and safetensors"
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"model.weights={weights} cannot be loaded (only safetensors are read): {reason}") from error
    return net, _schedule(folder) if local else {}


def _schedule(folder: Path) -> dict[str, Any]:
    """What a scheduler config beside the weights says about the discrete schedule; nothing if there is none."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            said = json.loads(path.read_text())
            return {key: said[key] for key in SCHEDULE if key in said}
    return {}


def _check_loaded(net: Any, weights: str, in_channels: int, num_classes: int) -> None:
    config = net.config
    if config.in_channels != in_channels:
        raise UserError(f"model.weights={weights} is for {config.in_channels} channels, the images have {in_channels}")
    count = config.num_embeds_ada_norm if hasattr(config, "num_embeds_ada_norm") else config.num_class_embeds
    wanted = num_classes if hasattr(config, "num_embeds_ada_norm") else num_classes + 1
    if count is not None and count != wanted:
        raise UserError(f"model.weights={weights} has {count} class embeddings, the data need {wanted}")
