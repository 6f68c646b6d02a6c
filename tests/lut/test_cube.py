""".cube files: what is read, round trips, and a clear line for every way a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from filtrun.errors import UserError
from filtrun.lut.cube import Cube, read_cube, write_cube
from filtrun.lut.interpolation import apply_lut, identity_lut

ROWS = "\n".join(f"{r} {g} {b}" for b in (0, 1) for g in (0, 1) for r in (0, 1))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "look.cube"
    path.write_text(text)
    return path


def test_reads_what_colour_tools_write(tmp_path: Path) -> None:
    text = (
        '# made by hand\r\nTITLE "warm look"\r\n\r\nLUT_3D_SIZE 2\r\nDOMAIN_MIN 0 0 0\r\nDOMAIN_MAX 1.0 2.0 4e0\r\n'
        "# the table\r\n" + ROWS.replace("\n", "\r\n") + "\r\n\r\n# end\r\n"
    )
    cube = read_cube(write(tmp_path, "\ufeff" + text))
    assert cube.title == "warm look" and cube.domain_max == (1.0, 2.0, 4.0)
    assert torch.equal(cube.table, identity_lut(2, dtype=torch.float64))  # red changes fastest
    half = cube.apply(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(1, 3, 1, 1))
    assert half.flatten().tolist() == [0.5, 0.5, 0.5]


def test_resolve_range_and_tabs(tmp_path: Path) -> None:
    cube = read_cube(write(tmp_path, f"LUT_3D_SIZE\t2\nLUT_3D_INPUT_RANGE -0.5 1.5\n{ROWS}  # last\n"))
    assert cube.domain_min == (-0.5,) * 3 and cube.domain_max == (1.5,) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(3, 5, 5, 5, dtype=dtype) * torch.tensor(10.0).pow(torch.randint(-8, 3, (3, 5, 5, 5)))
    cube = Cube(table.to(dtype), "a look", (-1.0, 0.0, 0.1), (1.0, 2.0, 0.7))
    write_cube(tmp_path / "a.cube", cube)
    back = read_cube(tmp_path / "a.cube")
    assert torch.equal(back.table.to(dtype), cube.table)
    assert (back.title, back.domain_min, back.domain_max) == (cube.title, cube.domain_min, cube.domain_max)
    assert [p.name for p in tmp_path.iterdir()] == ["a.cube"]


def test_printed_digits(tmp_path: Path) -> None:
    table = torch.rand(3, 3, 3, 3, dtype=torch.float64)
    write_cube(tmp_path / "a.cube", table, title="six", digits=6)
    back = read_cube(tmp_path / "a.cube")
    assert (back.table - table).abs().max() <= 5.1e-7
    write_cube(tmp_path / "b.cube", back, digits=6)
    assert (tmp_path / "a.cube").read_text() == (tmp_path / "b.cube").read_text()
    assert "LUT_3D_SIZE 3\n" in (tmp_path / "a.cube").read_text()


def test_curves(tmp_path: Path) -> None:
    torch.manual_seed(1)
    curves = torch.rand(3, 7, dtype=torch.float64)
    write_cube(tmp_path / "c.cube", Cube(curves))
    cube = read_cube(tmp_path / "c.cube")
    assert torch.equal(cube.table, curves)
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 1.2 - 0.1
    y = cube.apply(image)
    for n, c, i, j in ((0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 2, 2)):
        place = min(max(float(image[n, c, i, j]), 0.0), 1.0) * 6
        cell = min(int(place), 5)
        expected = (1 - place + cell) * curves[c, cell] + (place - cell) * curves[c, cell + 1]
        assert float(y[n, c, i, j]) == pytest.approx(float(expected), abs=1e-14)
    separable = torch.stack(
        [curves[0].expand(7, 7, 7), curves[1].view(7, 1).expand(7, 7, 7), curves[2].view(7, 1, 1).expand(7, 7, 7)]
    )
    assert torch.allclose(y, apply_lut(image, separable), atol=1e-14)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no LUT_3D_SIZE"),
        ('TITLE "x"\n# nothing else\n', "has no LUT_3D_SIZE"),
        (ROWS, r"line 1: the table starts before LUT_3D_SIZE"),
        (f"LUT_3D_SIZ 2\n{ROWS}", r"line 1: unknown keyword 'LUT_3D_SIZ'; did you mean 'LUT_3D_SIZE'"),
        (f"LUT_3D_SIZE 1\n{ROWS}", "line 1: LUT_3D_SIZE must be a whole number from 2 to 256, not 1"),
        (f"LUT_3D_SIZE 2.5\n{ROWS}", "line 1: LUT_3D_SIZE must be a whole number from 2 to 256, not 2.5"),
        (f"LUT_3D_SIZE\n{ROWS}", "line 1: LUT_3D_SIZE must be a whole number from 2 to 256, not empty"),
        (f"LUT_3D_SIZE 2\nLUT_3D_SIZE 2\n{ROWS}", "line 2: LUT_3D_SIZE was given on line 1 already"),
        (f"LUT_3D_SIZE 2\nLUT_1D_SIZE 4\n{ROWS}", "line 2: LUT_1D_SIZE beside LUT_3D_SIZE"),
        (f"LUT_3D_SIZE 2\n{ROWS}\n1 1 1\n", "line 10: more than the 8 rows"),
        ("LUT_3D_SIZE 2\n0 0 0\n1 0 0\n", "line 3: the file ends after 2 rows of the 8"),
        (f"LUT_3D_SIZE 2\n0 0\n{ROWS}", r"line 2: expected 3 numbers, found 2: '0 0'"),
        (f"LUT_3D_SIZE 2\n0 0 0 0\n{ROWS}", "line 2: expected 3 numbers, found 4"),
        (f"LUT_3D_SIZE 2\n0 0 0x\n{ROWS}", "line 2: '0x' is not a number"),
        (f"LUT_3D_SIZE 2\nnan 0 0\n{ROWS}", "line 2: 'nan' is not a finite number"),
        (f"LUT_3D_SIZE 2\n0 inf 0\n{ROWS}", "line 2: 'inf' is not a finite number"),
        (f"LUT_3D_SIZE 2\nDOMAIN_MIN 0 0 1\n{ROWS}", "line 2: the domain's start"),
        (f"LUT_3D_SIZE 2\nDOMAIN_MAX 1 1\n{ROWS}", "line 2: expected 3 numbers, found 2"),
        (f"LUT_3D_SIZE 2\n{ROWS}\nDOMAIN_MAX 1 1 1\n", "line 10: DOMAIN_MAX must stand before the table"),
        (f"TITLE warm\nLUT_3D_SIZE 2\n{ROWS}", "line 1: the title must stand in double quotes, not warm"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_cube(write(tmp_path, text))


def test_what_is_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "bad.cube").write_bytes(b"LUT_3D_SIZE 2\n\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a text file"):
        read_cube(tmp_path / "bad.cube")
    for path in (tmp_path / "none.cube", tmp_path):
        with pytest.raises(UserError, match="there is no such .cube file"):
            read_cube(path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    table = identity_lut(2)
    with pytest.raises(UserError, match="must not hold double quotes"):
        write_cube(tmp_path / "a.cube", table, title='a "look"')
    with pytest.raises(UserError, match="values that are not finite"):
        write_cube(tmp_path / "a.cube", table / 0)
    with pytest.raises(UserError, match="does not exist"):
        write_cube(tmp_path / "none" / "a.cube", table)
    with pytest.raises(UserError, match=r"not \(3, 2, 2\)"):
        Cube(torch.zeros(3, 2, 2))
    with pytest.raises(UserError, match="must be below domain_max"):
        Cube(table, domain_min=(0.0, 0.0, 1.0))
    assert not list(tmp_path.iterdir())
