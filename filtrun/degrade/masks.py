"""Holes for inpainting: irregular strokes of a wanted area, boxes, and masks from files. 1 = hole."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from filtrun.constants import constant
from filtrun.degrade.noise import rand
from filtrun.errors import UserError


def stroke_masks(
    ratio: Tensor,
    height: int,
    width: int,
    *,
    strokes: int = 4,
    points: int = 5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random brush strokes that cover exactly the wanted share of each image (to a pixel, apart from ties).

    Up to `strokes` broken lines of `points` points wander over the image; the brush is then made as wide as it takes:
    the distance to the nearest line is thresholded at the quantile `ratio`. In the manner of the free-form masks of
    Yu et al., ICCV 2019 (arXiv 1806.03589), whose area comes out at random.

    Args:
        ratio: (N,) share of the pixels in [0, 1]; its device is where the masks are made.

    Returns:
        (N, 1, height, width) float32 of 0 and 1.
    """
    n, device = len(ratio), ratio.device
    draws = rand((n, strokes, 2 * points + 3), device, generator)
    start = draws[..., :2] * constant((height, width), torch.int64, device)
    angle = 2 * math.pi * (draws[..., 2:3] + (draws[..., 3 : points + 2] - 0.5).cumsum(-1))
    step = (0.1 + 0.3 * draws[..., points + 2 : 2 * points + 1]) * math.hypot(height, width) / 2
    moves = torch.stack([step * angle.sin(), step * angle.cos()], -1).cumsum(-2)
    corners = torch.cat([start[..., None, :], start[..., None, :] + moves], -2)
    brush = 0.5 + draws[..., -2]
    used = torch.arange(strokes, device=device) < 1 + (draws[:, :1, -1] * strokes).floor()
    y = torch.arange(height, device=device, dtype=torch.float32).view(1, -1, 1) + 0.5
    x = torch.arange(width, device=device, dtype=torch.float32).view(1, 1, -1) + 0.5
    field = torch.full((n, height, width), math.inf, device=device)
    for s in range(strokes):
        for p in range(points - 1):
            (ay, ax), (by, bx) = (corners[:, s, q].T.reshape(2, n, 1, 1) for q in (p, p + 1))
            dy, dx = by - ay, bx - ax
            t = (((y - ay) * dy + (x - ax) * dx) / (dy**2 + dx**2).clamp(min=1e-6)).clamp(0, 1)
            far = torch.hypot(y - ay - t * dy, x - ax - t * dx) / brush[:, s].view(-1, 1, 1)
            field = torch.minimum(field, torch.where(used[:, s].view(-1, 1, 1), far, math.inf))
    count = (ratio * height * width).round().long()
    ordered = field.flatten(1).sort(1).values
    limit = ordered.gather(1, (count - 1).clamp(min=0)[:, None]).view(-1, 1, 1)
    return ((field <= limit) & (count > 0).view(-1, 1, 1)).float()[:, None]


def box_masks(ratio: Tensor, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """One box per image that covers about the wanted share, of random place and shape (sides differ by up to 2:1).

    Returns:
        (N, 1, height, width) float32 of 0 and 1.
    """
    n, device = len(ratio), ratio.device
    draws = rand((3, n), device, generator)
    stretch = 2 ** (draws[0] - 0.5)
    high = (height * (ratio.sqrt() * stretch)).round().clamp(1, height)
    wide = (ratio * height * width / high).round().clamp(1, width)
    top, left = (draws[1] * (height - high + 1)).floor(), (draws[2] * (width - wide + 1)).floor()
    y, x = torch.arange(height, device=device)[None], torch.arange(width, device=device)[None]
    rows = (y >= top[:, None]) & (y < (top + high)[:, None])
    columns = (x >= left[:, None]) & (x < (left + wide)[:, None])
    return (rows[:, :, None] & columns[:, None, :]).float()[:, None]


class MaskFiles:
    """Mask images of a folder, sorted by path; white (or black) is the hole.

    ``masks.at(i, height, width)`` is (1, 1, height, width), resized to the nearest pixel.

    Raises:
        UserError: a folder that is missing or has no images, or a file that cannot be read.
    """

    def __init__(self, folder: str | None, hole: str = "white") -> None:
        from filtrun.data.images_folder import existing_folder, find_images

        self.paths = find_images(existing_folder(folder, "task.mask_root"))
        self.hole = hole
        self._kept: dict[tuple[int, int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def check(self) -> None:
        """Look at the header of every file. Raises UserError naming the first that is empty or no image."""
        from PIL import Image

        from filtrun.data.images import decode

        for path in self.paths:
            try:
                with Image.open(path):
                    pass
            except Exception:
                decode(path, 1)  # says what is wrong; some kinds of files only it can read

    def at(self, number: int, height: int, width: int) -> Tensor:
        key = (number % len(self), height, width)
        if key not in self._kept:
            if len(self._kept) > 1000:
                self._kept.clear()
            self._kept[key] = read_mask(self.paths[key[0]], height, width, self.hole)
        return self._kept[key].float()[None, None]

    def choose(
        self, n: int, height: int, width: int, device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        """`n` masks at random (N, 1, height, width), each mirrored at random both ways."""
        draws = rand((3, n), torch.device("cpu"), generator or _follower(device))
        picked = torch.cat([self.at(int(d * len(self)), height, width) for d in draws[0]])
        for axis, draw in ((2, draws[1]), (3, draws[2])):
            picked = torch.where((draw < 0.5).view(-1, 1, 1, 1), picked.flip(axis), picked)
        return picked.to(device)


def _follower(device: torch.device) -> torch.Generator:
    """A CPU generator seeded from the global one of `device`, which the runner seeds for every step."""
    return torch.Generator().manual_seed(int(torch.randint(0, 2**62, (), device="cpu")))


def read_mask(path: Path, height: int, width: int, hole: str = "white") -> Tensor:
    """One mask file as bool (height, width), True = hole; resized to the nearest pixel.

    Raises:
        UserError: naming the file, when it cannot be read.
    """
    from PIL import Image

    from filtrun.data.images import decode

    grey = Image.fromarray(decode(path, 1)[0])
    if grey.size != (width, height):
        grey = grey.resize((width, height), Image.Resampling.NEAREST)
    white = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(height, width) > 127
    return white if hole == "white" else ~white


def ratio_bins(edges: list[float], key: str = "task.ratios") -> list[tuple[float, float]]:
    """[(low, high), ...] from ascending edges in [0, 1]. Raises UserError when they are not."""
    ascending = all(a < b for a, b in zip(edges, edges[1:], strict=False))
    if len(edges) < 2 or not ascending or edges[0] < 0 or edges[-1] > 1:
        raise UserError(f"{key}={edges} must be ascending edges in [0, 1], such as [0, 0.2, 0.4, 0.6]")
    return list(zip(edges, edges[1:], strict=False))
