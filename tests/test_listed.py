from __future__ import annotations

import json
import re

import pytest

from filtrun.catalogue import CATALOGUE, conf_dir
from filtrun.errors import UserError
from filtrun.listed import read_listed

KINDS = {"method", "model", "analysis", "theory", "loss", "search", "data", "measurement", "sampler", "optimizer",
         "metric"}  # fmt: skip


def test_the_catalogue():
    papers = read_listed(conf_dir() / CATALOGUE)
    assert len(papers) == 285 and list(papers) == sorted(papers)
    for name, paper in papers.items():
        assert re.fullmatch(r"[a-z0-9_]+", name) and re.fullmatch(r"[a-z0-9_]+", paper.family), name
        assert paper.title and paper.about and paper.claim and paper.kind in KINDS, name
        assert paper.link == "" or re.fullmatch(r"https://[\w./-]+", paper.link), name
        assert paper.year is None or 1980 < paper.year < 2030, name
    assert len({p.title for p in papers.values()}) == 285


def test_no_file_is_no_catalogue(tmp_path):
    assert read_listed(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("second", ["{", '{"id": "b"}', "3"])
def test_a_broken_line_is_told(tmp_path, second):
    good = {"id": "a", "title": "A", "family": "f", "kind": "k", "about": "x", "claim": "y"}
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(good) + "\n" + second + "\n")
    with pytest.raises(UserError, match="c.jsonl, line 2 is no paper"):
        read_listed(path)
    path.write_text(json.dumps(good) + "\n" + json.dumps(good) + "\n")
    with pytest.raises(UserError, match="line 2: a is there twice"):
        read_listed(path)
