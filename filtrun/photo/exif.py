"""EXIF tags as plain values: taken from an image of any format, put right for the new pixels, packed again."""

from __future__ import annotations

from typing import Any

ORIENTATION = 0x0112
SUB, GPS, INTEROP, MAKER_NOTE = 0x8769, 0x8825, 0xA005, 0x927C
WIDTH, HEIGHT = 0xA002, 0xA003
STRUCTURE = frozenset((
    *range(254, 260), 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, *range(288, 294), 297, 301, 317,
    *range(318, 326), 330, 332, 333, 334, 336, 337, 338, 339, 340, 341, 342, 343, 347, *range(512, 522), 529, 530, 531,
    532, 700, 33723, 34377, 34675,
))  # fmt: skip
"""Tags of a TIFF file that say how its pixels lie, and blocks that are no EXIF (XMP, IPTC, Photoshop, ICC)."""
TEXTS = (270, 271, 272, 305, 306, 315, 33432)
"""Description, maker, model, software, date, artist and copyright."""
LIMIT = 65000
"""Bytes of EXIF a JPEG can hold, a little rounded down."""


def take(image: Any) -> dict[int, Any]:
    """Tags of an opened Pillow image, {tag: value}; those of the Exif and GPS blocks in dicts of their own.

    The thumbnail is left out: it shows the old image. Raises whatever Pillow does for broken ones.
    """
    exif = image.getexif()
    tags = {tag: value for tag, value in exif.items() if tag not in STRUCTURE}
    for block in (SUB, GPS):
        if block in tags:
            tags[block] = dict(exif.get_ifd(block))
    if INTEROP in tags.get(SUB, {}):
        tags[SUB][INTEROP] = dict(exif.get_ifd(INTEROP))
    return {tag: value for tag, value in tags.items() if value != {}}


def renewed(tags: dict[int, Any], width: int, height: int) -> dict[int, Any]:
    """The tags for upright pixels of the given size."""
    new = dict(tags)
    if ORIENTATION in new:
        new[ORIENTATION] = 1
    if isinstance(new.get(SUB), dict):
        size = {WIDTH: width, HEIGHT: height}
        new[SUB] = {tag: size.get(tag, value) for tag, value in new[SUB].items()}
    return new


def packed(tags: dict[int, Any]) -> tuple[dict[int, Any], bytes, list[str]]:
    """(tags that can be kept, the same as an EXIF block with its ``Exif`` mark, names of what had to be left out).

    A value that cannot be packed, and the maker's own block where everything together is too long for a JPEG, is left
    out.
    """
    from PIL import ExifTags

    kept, lost = dict(tags), []
    for tag in list(kept):
        try:
            _pack({tag: kept[tag]})
        except Exception:  # Pillow fails in many ways for values it read but cannot write
            lost.append(ExifTags.TAGS.get(tag, hex(tag)))
            del kept[tag]
    if kept and len(_pack(kept)) > LIMIT and isinstance(kept.get(SUB), dict):
        kept[SUB] = {tag: value for tag, value in kept[SUB].items() if tag != MAKER_NOTE}
        lost.append("MakerNote")
    if kept and len(_pack(kept)) > LIMIT:
        return {}, b"", ["all of it"]
    return kept, (_pack(kept) if kept else b""), lost


def _pack(tags: dict[int, Any]) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes()
