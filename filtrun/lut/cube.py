"""Tables in .cube files, as colour tools read and write them.

Source: Adobe, "Cube LUT Specification", version 1.0 (2013): keywords TITLE, LUT_1D_SIZE, LUT_3D_SIZE, DOMAIN_MIN,
DOMAIN_MAX, lines of three numbers with red changing fastest, ``#`` before comments. DaVinci Resolve's own
LUT_3D_INPUT_RANGE is read as well. Both kinds, 1D and 3D, are read and written; a file holds one of them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from filtrun.constants import constant
from filtrun.errors import UserError, closest
from filtrun.lut.curves import apply_curves
from filtrun.lut.interpolation import apply_lut

SIZES = {"LUT_3D_SIZE": (2, 256), "LUT_1D_SIZE": (2, 65536)}
KEYWORDS = (*SIZES, "TITLE", "DOMAIN_MIN", "DOMAIN_MAX", "LUT_3D_INPUT_RANGE", "LUT_1D_INPUT_RANGE")


@dataclass(frozen=True)
class Cube:
    """A table and what its file says of it.

    `table` is (3, D, D, D) as ``[c, b, g, r]`` for a 3D file, (3, D) for a 1D one (a curve per channel).
    """

    table: Tensor
    title: str = ""
    domain_min: tuple[float, float, float] = (0.0, 0.0, 0.0)
    domain_max: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        shape = tuple(self.table.shape)
        if len(shape) not in (2, 4) or shape[0] != 3 or len(set(shape[1:])) != 1 or shape[1] < 2:
            raise UserError(f"a cube table is (3, D, D, D) or (3, D) with D >= 2, not {shape}")
        if any(not low < high for low, high in zip(self.domain_min, self.domain_max, strict=True)):
            raise UserError(f"domain_min={self.domain_min} must be below domain_max={self.domain_max} in each channel")

    def apply(self, image: Tensor, interpolation: str = "trilinear") -> Tensor:
        """Colours of `image` (N, 3, H, W) through the table; a 1D table interpolates linearly in each channel."""
        if self.table.dim() == 4:
            table, low, high = self.table.to(image.device), self.domain_min, self.domain_max
            return apply_lut(image, table, interpolation, domain_min=low, domain_max=high)
        curves = self.table.to(image.device, torch.promote_types(image.dtype, torch.float32))
        start, end = (
            constant(tuple(ends), curves.dtype, curves.device).view(1, 3, 1, 1)
            for ends in (self.domain_min, self.domain_max)
        )
        return apply_curves((image - start) / (end - start), curves).to(image.dtype)


def read_cube(path: str | os.PathLike[str]) -> Cube:
    """Read a .cube file; the table is float64 on the CPU.

    Raises:
        UserError: no such file, or a line that breaks the format, named by its number.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: there is no such .cube file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file, so it is no .cube file") from error
    return _Parser(str(path)).parse(text)


class _Parser:
    """State of a file being read; `number` is the line for messages."""

    def __init__(self, name: str):
        self.name, self.number = name, 0
        self.seen: dict[str, int] = {}
        self.kind, self.size, self.title = "", 0, ""
        self.low, self.high = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.rows: list[tuple[float, float, float]] = []

    def error(self, message: str) -> UserError:
        return UserError(f"{self.name}, line {self.number}: {message}")

    def parse(self, text: str) -> Cube:
        for self.number, raw in enumerate(text.splitlines(), 1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            if line[0].isalpha() and not line.lower().startswith(("nan", "inf")):
                self.keyword(line)
            else:
                self.row(line)
        return self.finish()

    def keyword(self, line: str) -> None:
        word, _, rest = line.partition(" ") if " " in line else line.partition("\t")
        if word not in KEYWORDS:
            raise self.error(f"unknown keyword {word!r}{closest(word, KEYWORDS)}")
        if self.rows:
            raise self.error(f"{word} must stand before the table")
        if word in self.seen:
            raise self.error(f"{word} was given on line {self.seen[word]} already")
        self.seen[word] = self.number
        rest = rest.strip()
        if word == "TITLE":
            if len(rest) < 2 or rest[0] != '"' or rest[-1] != '"':
                raise self.error(f"the title must stand in double quotes, not {rest or 'empty'}")
            self.title = rest[1:-1]
        elif word in SIZES:
            self.set_size(word, rest.split("#")[0].strip())
        elif word.startswith("DOMAIN"):
            values = self.numbers(rest, 3)
            self.low, self.high = (values, self.high) if word == "DOMAIN_MIN" else (self.low, values)
        else:
            start, end = self.numbers(rest, 2)
            self.low, self.high = (start,) * 3, (end,) * 3

    def set_size(self, word: str, rest: str) -> None:
        if self.kind:
            raise self.error(f"{word} beside {self.kind}: a file holds one table")
        least, most = SIZES[word]
        if not rest.isascii() or not rest.isdigit() or not least <= int(rest) <= most:
            raise self.error(f"{word} must be a whole number from {least} to {most}, not {rest or 'empty'}")
        self.kind, self.size = word, int(rest)

    def numbers(self, line: str, count: int) -> tuple:
        words = line.split("#")[0].split()
        if len(words) != count:
            raise self.error(f"expected {count} numbers, found {len(words)}: {line[:40]!r}")
        values = []
        for word in words:
            try:
                values.append(float(word))
            except ValueError:
                raise self.error(f"{word[:40]!r} is not a number") from None
            if not math.isfinite(values[-1]):
                raise self.error(f"{word!r} is not a finite number")
        return tuple(values)

    def row(self, line: str) -> None:
        if not self.kind:
            raise self.error("the table starts before LUT_3D_SIZE (or LUT_1D_SIZE) is given")
        self.rows.append(self.numbers(line, 3))
        if len(self.rows) > self.expected():
            raise self.error(f"more than the {self.expected()} rows that {self.kind} {self.size} asks for")

    def expected(self) -> int:
        return self.size**3 if self.kind == "LUT_3D_SIZE" else self.size

    def finish(self) -> Cube:
        if not self.kind:
            raise UserError(f"{self.name} has no LUT_3D_SIZE (or LUT_1D_SIZE) line, so it is no .cube file")
        if len(self.rows) != self.expected():
            wanted = f"{self.expected()} that {self.kind} {self.size} asks for"
            raise self.error(f"the file ends after {len(self.rows)} rows of the {wanted}")
        if any(not low < high for low, high in zip(self.low, self.high, strict=True)):
            self.number = max((n for w, n in self.seen.items() if "DOMAIN" in w or "RANGE" in w), default=0)
            raise self.error(f"the domain's start {self.low} must be below its end {self.high} in each channel")
        flat = torch.tensor(self.rows, dtype=torch.float64).t().contiguous()
        cube = flat.view(3, self.size, self.size, self.size) if self.kind == "LUT_3D_SIZE" else flat
        return Cube(cube, self.title, self.low, self.high)


def write_cube(path: str | os.PathLike[str], cube: Cube | Tensor, title: str = "", digits: int | None = None) -> None:
    """Write a table as a .cube file.

    Args:
        path: the file; its folder must exist. It is replaced in one step.
        cube: a `Cube`, or its table alone.
        title: for a table alone; no double quotes or line ends.
        digits: places after the point; None writes as many as give the table's dtype back exactly.

    Raises:
        UserError: a title that cannot be quoted, values that are not finite, or a folder that is not there.
    """
    cube = cube if isinstance(cube, Cube) else Cube(cube, title)
    if any(sign in cube.title for sign in '"\r\n'):
        raise UserError(f"title={cube.title!r} must not hold double quotes or line ends")
    if not bool(torch.isfinite(cube.table).all()):
        raise UserError("the table holds values that are not finite; a .cube file cannot")
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist")
    kind = "LUT_3D_SIZE" if cube.table.dim() == 4 else "LUT_1D_SIZE"
    lines = [f'TITLE "{cube.title}"'] if cube.title else []
    lines.append(f"{kind} {cube.table.shape[1]}")
    for word, ends in (("DOMAIN_MIN", cube.domain_min), ("DOMAIN_MAX", cube.domain_max)):
        lines.append(" ".join([word, *(repr(float(v)) for v in ends)]))
    rows = cube.table.detach().cpu().double().flatten(1).t().tolist()
    if digits is not None:
        lines += [f"{r:.{digits}f} {g:.{digits}f} {b:.{digits}f}" for r, g, b in rows]
    elif cube.table.dtype == torch.float64:
        lines += [f"{r!r} {g!r} {b!r}" for r, g, b in rows]
    else:
        lines += [f"{r:.9g} {g:.9g} {b:.9g}" for r, g, b in rows]  # nine digits tell any two float32 values apart
    part = path.with_name(path.name + ".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path)
