"""Read one photograph with everything it carries: all bits of its pixels, alpha, EXIF, colour profile."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from filtrun.data.hdr import read_image
from filtrun.data.images import MAX_PIXELS, check_size, orient
from filtrun.data.png16 import png16_values
from filtrun.data.wide_tiff import read_wide_tiff
from filtrun.errors import UserError
from filtrun.photo import exif as exif_tags

TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass
class Photo:
    """A photograph, upright.

    Attributes:
        pixels: (H, W, C), C = 1 grey or 3 RGB; uint8, uint16, or float32 as stored (linear light, above 1 too).
        alpha: (H, W, 1) of the same type, float in [0, 1]; None when there is none.
        exif: tags, see `filtrun.photo.exif.take`; the orientation is that of the file, not of `pixels`.
        icc: the colour profile the pixels are in.
        dpi: pixels per inch, horizontally and vertically.
        notes: what a person should know about how it was read.
    """

    path: Path
    pixels: np.ndarray
    alpha: np.ndarray | None = None
    exif: dict[int, Any] = field(default_factory=dict)
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def peak(self) -> float:
        """The value that stands for white in whole-number pixels; 1 for float ones."""
        return 1.0 if self.pixels.dtype == np.float32 else float(np.iinfo(self.pixels.dtype).max)


def read_photo(path: Path) -> Photo:
    """Read an image file of any size.

    8-bit images of all kinds Pillow knows (palettes, CMYK and other colour spaces become RGB, of an animation the
    first frame counts), PNG and TIFF with 16 bits, float TIFF, Radiance and OpenEXR.

    Raises:
        UserError: naming the file and the reason: empty, cut short, no image, too large, NaN or infinite pixels.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(path)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read {path}: permission denied") from error
    except MemoryError as error:
        raise UserError(f"{path} does not fit in memory") from error
    except Exception as error:  # decoders fail with OSError, SyntaxError, ValueError, struct.error, ...
        if type(error).__name__ == "UnidentifiedImageError":
            raise UserError(f"{path} is no image, or of a kind that is not known") from error
        if type(error).__name__ == "DecompressionBombError":
            raise UserError(f"{path} has more than {MAX_PIXELS:,} pixels, the most that is read") from error
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is not an image that can be read ({reason or type(error).__name__})") from error


def _read(path: Path) -> Photo:
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(8192)
    if suffix in (".hdr", ".pic", ".exr"):
        return _read_hdr(path, head)
    if head.startswith(TIFF_MARKS):
        import tifffile

        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages[0]
            check_size(path, page.imagewidth, page.imagelength)
            if page.dtype is not None and page.dtype.itemsize > 1 and page.dtype != np.bool_:
                return _read_tiff(path, page, len(tiff.pages))
    return _read_pillow(path, wide=head.startswith(b"\x89PNG\r\n\x1a\n") and head[24:25] == b"\x10")


def _read_pillow(path: Path, *, wide: bool) -> Photo:
    from PIL import Image

    with Image.open(path) as image:
        check_size(path, *image.size)
        frames = getattr(image, "n_frames", 1)
        icc = image.info.get("icc_profile") or None
        if not wide:
            image.load()
        tags, turn, lost = _tags(image)
        dpi = image.info.get("dpi")
        notes = [*lost, *([f"only the first of its {frames} images"] if frames > 1 and image.format != "MPO" else [])]
        if wide:
            pixels, alpha = split_alpha(png16_values(path, upright=False))
        else:
            pixels, alpha, same_colours = _eight_bit(image, icc)
            icc = icc if same_colours else None
    upright = [None if a is None else np.ascontiguousarray(orient(a, turn)) for a in (pixels, alpha)]
    assert upright[0] is not None
    return Photo(path, upright[0], upright[1], tags, icc, _dpi(dpi, turn), notes)


def split_alpha(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W, 1 to 4) as (pixels of 1 or 3 channels, alpha or None)."""
    return (values[..., :-1], values[..., -1:]) if values.shape[-1] in (2, 4) else (values, None)


def _tags(image: Any) -> tuple[dict[int, Any], int, list[str]]:
    """(EXIF tags, the orientation its pixels still have, notes); no tags when they are broken."""
    try:
        tags = exif_tags.take(image)
        turn = image.getexif().get(exif_tags.ORIENTATION, 1)  # a TIFF is turned by Pillow itself, which drops the tag
    except Exception:  # damaged EXIF is frequent, and no reason to give up the image
        return {}, 1, ["its EXIF data is damaged and left out"]
    return tags, turn if turn in range(1, 9) else 1, []


def _dpi(value: Any, turn: int) -> tuple[float, float] | None:
    try:
        across, down = (float(v) for v in value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not (0 < across < 1e6 and 0 < down < 1e6):
        return None
    return (down, across) if turn >= 5 else (across, down)


def _eight_bit(image: Any, icc: bytes | None) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """(pixels, alpha, whether they are still in the image's own colour space) of a loaded Pillow image."""
    if image.mode == "F":
        return np.asarray(image, dtype=np.float32)[..., None], None, True
    if image.mode.startswith("I"):  # 16-bit grey, which some formats open as 32-bit integers
        return np.asarray(image).astype(np.int64).clip(0, 65535).astype(np.uint16)[..., None], None, True
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        grey = image.mode in ("LA", "La", "L", "1")
        both = np.array(image.convert("LA" if grey else "RGBA"))
        return both[..., :-1], both[..., -1:], True
    if image.mode in ("1", "L"):
        return np.array(image.convert("L"))[..., None], None, True
    if image.mode in ("CMYK", "LAB") and icc is not None:
        return np.array(_to_srgb(image, icc)), None, False
    return np.array(image.convert("RGB")), None, image.mode in ("RGB", "P", "RGBX", "YCbCr", "HSV")


def _to_srgb(image: Any, icc: bytes) -> Any:
    import io

    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):  # a damaged profile, or one of another kind of pixels
        return image.convert("RGB")


def _read_tiff(path: Path, page: Any, count: int) -> Photo:
    from PIL import Image

    pixels, alpha = read_wide_tiff(path, page)
    _check_finite(path, pixels)
    tag = {t.code: t.value for t in page.tags}
    turn, icc = int(tag.get(exif_tags.ORIENTATION, 1)), tag.get(34675)
    notes = [f"only the first of its {count} images"] if count > 1 else []
    try:
        with Image.open(path) as image:
            tags, dpi = exif_tags.take(image), image.info.get("dpi")
    except Exception:  # Pillow does not know every TIFF that tifffile reads
        tags = {code: value for code, value in tag.items() if code in exif_tags.TEXTS and isinstance(value, str)}
        dpi = _tiff_dpi(tag)
        notes += ["its Exif block is left out"] if exif_tags.SUB in tag else []
    upright = [None if a is None else np.ascontiguousarray(orient(a, turn)) for a in (pixels, alpha)]
    assert upright[0] is not None
    return Photo(path, upright[0], upright[1], tags, icc and bytes(icc), _dpi(dpi, turn), notes)


def _tiff_dpi(tag: dict[int, Any]) -> tuple[float, float] | None:
    factor = {2: 1.0, 3: 2.54}.get(int(tag.get(296, 2)))
    if factor is None or not all(isinstance(tag.get(code), tuple) and tag[code][1] for code in (282, 283)):
        return None
    across, down = (factor * tag[code][0] / tag[code][1] for code in (282, 283))
    return across, down


def _read_hdr(path: Path, head: bytes) -> Photo:
    alpha = None
    if path.suffix.lower() == ".exr":
        alpha = _exr_alpha(path)
    elif (size := re.search(rb"\n[-+]Y (\d+) \+X (\d+)\n", head)) is not None:
        check_size(path, int(size[2]), int(size[1]))
    pixels = read_image(path, None).permute(1, 2, 0).contiguous().numpy()
    return Photo(path, pixels, alpha)


def _exr_alpha(path: Path) -> np.ndarray | None:
    """Alpha (H, W, 1) of an OpenEXR image that is not too large; None without one."""
    try:
        import OpenEXR
    except ImportError:
        return None  # read_image says what to install
    low, high = OpenEXR.File(str(path), header_only=True).header()["dataWindow"]
    check_size(path, int(high[0]) - int(low[0]) + 1, int(high[1]) - int(low[1]) + 1)
    channels = OpenEXR.File(str(path)).channels()
    name = next((n for n in ("RGBA", "A") if n in channels), None)
    if name is None:
        return None
    values = np.asarray(channels[name].pixels, dtype=np.float32)
    return np.nan_to_num(values[..., None] if values.ndim == 2 else values[..., 3:]).clip(0, 1)


def _check_finite(path: Path, pixels: np.ndarray) -> None:
    if pixels.dtype == np.float32 and not np.isfinite(pixels).all():
        count = int((~np.isfinite(pixels)).any(-1).sum())
        raise UserError(f"{path} has {count} pixels that are NaN or infinite")
