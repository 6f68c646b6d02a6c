"""Make torchvision importable on a CPU build of torch.

The torchvision wheel on PyPI carries CUDA operators; beside a CPU build of torch its compiled part does not load,
and ``import torchvision`` (so timm and diffusers) stops at "operator torchvision::nms does not exist" because it
registers fake kernels for operators nobody declared. Declaring their schemas first is all the import needs; image
datasets, transforms and model definitions then work, and only calling the missing operators themselves fails.
"""

from __future__ import annotations

import functools
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@functools.cache
def torchvision() -> Any:
    """Import torchvision with its missing operators declared, once; return the module.

    Does nothing but import where the compiled operators load. Call it before importing timm or diffusers.
    """
    try:
        import torchvision as module

        return module
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    return _import_with_schemas()


def _import_with_schemas() -> Any:
    import sys

    import torch

    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]  # the failed import leaves half a package behind
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    globals()["_library"] = library  # operators vanish with the object that declared them
    import torchvision as module

    return module
