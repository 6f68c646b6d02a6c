"""PNG files for people: grids of images with a name for each row."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def save_grid(
    images: Tensor,
    path: Path,
    *,
    columns: int,
    rows: list[str] | None = None,
    titles: list[str] | None = None,
    scale: int = 0,
) -> None:
    """Write images (N, C, H, W) in [0, 1] as one PNG, row by row, names at the left; replaced at once when it exists.

    Args:
        columns: images per row.
        rows: one name per row.
        titles: one name per column, above the first row.
        scale: whole factor small images are enlarged by (nearest neighbour); 0 chooses one for about 48 pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    n, channels, height, width = images.shape
    scale = scale or max(1, 48 // max(height, width))
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width, gap = height * scale, width * scale, 2
    lines = -(-n // columns)
    font = ImageFont.load_default(size=14)
    margin = 8 + max((int(font.getlength(name)) for name in rows), default=0) if rows else 0
    top = 22 if titles else 0
    sheet = Image.new("RGB", (margin + columns * (width + gap) + gap, top + lines * (height + gap) + gap), "white")
    for i in range(n):
        array = pixels[i].permute(1, 2, 0).numpy()
        tile = Image.fromarray(array[..., 0] if channels == 1 else array[..., :3])
        corner = (margin + gap + i % columns * (width + gap), top + gap + i // columns * (height + gap))
        sheet.paste(tile.convert("RGB"), corner)
    draw = ImageDraw.Draw(sheet)
    for line, name in enumerate(rows or []):
        draw.text((4, top + gap + line * (height + gap) + height // 2), name, fill="black", font=font, anchor="lm")
    for column, name in enumerate(titles or []):
        centre = margin + gap + column * (width + gap) + width // 2
        draw.text((centre, 12), name, fill="black", font=font, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    sheet.save(work, format="PNG")
    os.replace(work, path)
