"""Hole masks: exact area, connected strokes, boxes, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from filtrun.degrade.masks import MaskFiles, box_masks, ratio_bins, read_mask, stroke_masks
from filtrun.errors import UserError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_strokes_cover_what_is_asked() -> None:
    ratio = torch.tensor([0.0, 0.05, 0.2, 0.37, 0.6, 1.0])
    masks = stroke_masks(ratio, 64, 80, generator=seeded())
    assert masks.shape == (6, 1, 64, 80) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks.mean((1, 2, 3)) - ratio).abs().max() <= 2 / (64 * 80)
    assert torch.equal(masks, stroke_masks(ratio, 64, 80, generator=seeded()))
    assert not torch.equal(masks[2], stroke_masks(ratio, 64, 80, generator=seeded(1))[2])


def test_one_stroke_is_one_piece() -> None:
    from scipy.ndimage import label

    masks = stroke_masks(torch.full((8,), 0.2), 64, 64, strokes=1, generator=seeded())
    for mask in masks[:, 0]:
        assert label(mask.numpy(), structure=np.ones((3, 3)))[1] <= 3  # in pieces only where it leaves the image


def test_boxes() -> None:
    ratio = torch.tensor([0.05, 0.25, 0.5])
    masks = box_masks(ratio, 100, 120, seeded())
    assert (masks.mean((1, 2, 3)) - ratio).abs().max() < 0.01
    for mask in masks[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)  # a filled rectangle
        assert rows.max() - rows.min() + 1 == len(rows)


def test_files_white_or_black(tmp_path: Path) -> None:
    for i in range(3):
        pixels = np.zeros((8, 8), np.uint8)
        pixels[: i + 1] = 255
        Image.fromarray(pixels).save(tmp_path / f"m{i}.png")
    files = MaskFiles(str(tmp_path))
    assert [float(files.at(i, 16, 16).mean()) for i in range(4)] == [0.125, 0.25, 0.375, 0.125]
    assert float(MaskFiles(str(tmp_path), "black").at(0, 8, 8).mean()) == 0.875
    chosen = files.choose(20, 8, 8, torch.device("cpu"), seeded())
    assert chosen.shape == (20, 1, 8, 8) and {round(float(m.mean()), 3) for m in chosen} == {0.125, 0.25, 0.375}
    one_bit = Image.fromarray(np.eye(4, dtype=bool))
    one_bit.save(tmp_path / "bit.png")
    assert torch.equal(read_mask(tmp_path / "bit.png", 4, 4), torch.eye(4, dtype=torch.bool))


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task.mask_root is not set"):
        MaskFiles(None)
    with pytest.raises(UserError, match="has no images"):
        MaskFiles(str(tmp_path))
    with pytest.raises(UserError, match=r"task.ratios=\[0.4, 0.2\] must be ascending"):
        ratio_bins([0.4, 0.2])
    assert ratio_bins([0, 0.2, 0.6]) == [(0, 0.2), (0.2, 0.6)]
