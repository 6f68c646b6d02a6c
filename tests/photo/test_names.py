from __future__ import annotations

import os
from pathlib import Path

import pytest

from filtrun.errors import UserError
from filtrun.photo.names import check, find, plan


@pytest.fixture
def tree(tmp_path):
    for name in ("a.png", "a.jpg", "sub/deep/b.PNG", "sub/c.exr", "sub/notes.txt", ".hidden/d.png", "out/old.png",
                 "odd[1].png", "scan"):  # fmt: skip
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "in"


def names(found):
    return sorted(str(name) for _, name in found[0])


def test_folders_are_searched_with_all_below(tree):
    assert names(find([str(tree)])) == ["a.jpg", "a.png", "odd[1].png", "out/old.png", "sub/c.exr", "sub/deep/b.PNG"]
    assert "out/old.png" not in names(find([str(tree)], [tree / "out"]))
    assert names(find([str(tree)], [tree])) == names(find([str(tree)]))  # results beside the images


def test_files_and_patterns(tree):
    assert names(find([str(tree / "scan"), str(tree / "odd[1].png")])) == ["odd[1].png", "scan"]
    assert names(find([str(tree / "*.png")])) == ["a.png", "odd[1].png"]
    assert names(find([str(tree / "**/*")], [tree / "out"])) == names(find([str(tree)], [tree / "out"]))
    assert names(find([str(tree / "su*")])) == ["sub/c.exr", "sub/deep/b.PNG"]
    assert names(find([str(tree / "a.png"), str(tree), str(tree / "a.png")])).count("a.png") == 1


def test_what_is_not_there_is_told(tree):
    (tree / "bare").mkdir()
    words = [str(tree / "none.png"), str(tree / "bare"), str(tree / "*.webp")]
    found, problems = find(words)
    assert found == [] and problems == [
        f"there is no file {words[0]!r}", f"{words[1]} has no images", f"no image fits {words[2]!r}"
    ]  # fmt: skip


def targets(names, format=None, display=False):
    jobs = plan([(Path("in", n), Path(n)) for n in names], Path("out"), format, display=display)
    return [(str(job.target.relative_to("out")), job.format) for job in jobs]


def test_formats_and_names_of_results():
    given = ["a.JPG", "b.gif", "c.tiff", "d.exr", "e.hdr", "scan", "v1.2"]
    assert targets(given) == [
        ("a.JPG", "jpeg"), ("b.png", "png"), ("c.tiff", "tiff"), ("d.exr", "exr"), ("e.hdr", "hdr"),
        ("scan.png", "png"), ("v1.2.png", "png"),
    ]  # fmt: skip
    assert targets(["d.exr", "a.jpg"], display=True) == [("d.png", "png"), ("a.jpg", "jpeg")]
    assert targets(["d.exr", "s/a.jpg"], "tiff") == [("d.tif", "tiff"), ("s/a.tif", "tiff")]


def test_results_of_one_name_are_numbered():
    assert [t for t, _ in targets(["a.png", "a.jpg", "A.webp", "a-2.png"], "png")] == [
        "a.png", "a-3.png", "A-4.png", "a-2.png"
    ]  # fmt: skip
    assert [t for t, _ in targets(["a.png", "s/a.png", "a.jpg"])] == ["a.png", "s/a.png", "a.jpg"]


def test_nothing_is_written_over(tree):
    jobs = plan(find([str(tree / "a.png")])[0], tree, None, display=False)
    for force in (False, True):
        with pytest.raises(UserError, match="is one of the images or masks given"):
            check(jobs, [], force=force)
    (tree.parent / "same").symlink_to(tree)
    with pytest.raises(UserError, match="is one of the images"):
        check(plan(find([str(tree / "a.png")])[0], tree.parent / "same", None, display=False), [], force=True)
    out = tree.parent / "results"
    jobs = plan(find([str(tree)])[0], out, None, display=False)
    check(jobs, [], force=False)
    out.mkdir()
    (out / "a.png").touch()
    with pytest.raises(UserError, match=r"a.png exists; .* --force"):
        check(jobs, [], force=False)
    os.symlink("nowhere", out / "a.jpg")
    with pytest.raises(UserError, match="a.jpg and 1 more exist already"):
        check(jobs, [], force=False)
    check(jobs, [], force=True)
    with pytest.raises(UserError, match="images or masks"):
        check(jobs, [out / "a.png"], force=True)
