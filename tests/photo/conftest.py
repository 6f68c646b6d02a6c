"""A photograph, EXIF tags and colour profiles to write files with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def cat() -> np.ndarray:
    """uint8 (60, 80, 3), a cut-out of a photograph."""
    from skimage import data

    return np.ascontiguousarray(data.chelsea()[100:160, 150:230])


@pytest.fixture
def tags() -> Any:
    """EXIF as cameras write it: text, rationals, an Exif block with the old size, GPS."""
    from PIL import Image
    from PIL.TiffImagePlugin import IFDRational

    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0132] = "Maker", "Model 7", "2024:05:06 07:08:09"
    exif[0x8769] = {
        0x9003: "2024:05:06 07:08:09", 0x829A: IFDRational(1, 250), 0x9000: b"0232", 0xA002: 999, 0xA003: 888,
        0x927C: b"own \x00\x01 bytes",
    }  # fmt: skip
    exif[0x8825] = {1: "N", 2: (IFDRational(47), IFDRational(30), IFDRational(12, 5))}
    return exif


@pytest.fixture(scope="session")
def srgb() -> bytes:
    """An ICC profile for RGB."""
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
