"""Publications as they are named in comments and class facts: title, link and year."""

from __future__ import annotations

import re
from typing import NamedTuple


class Paper(NamedTuple):
    """A publication; `link` is empty and `year` None where the source does not say."""

    title: str
    link: str = ""
    year: int | None = None


_ID = re.compile(r"arXiv[:\s]*(\d{4}\.\d{4,5})|(https?://[^\s,)]+)|doi[:\s]+(10\.\S+?)(?=[),.]*(?:\s|$))", re.I)


def parse_paper(text: str) -> Paper:
    """Title, link and year from a line such as ``SaRA, arXiv 2409.06633 (ICLR 2025)``."""
    found = _ID.search(text)
    title = (text[: found.start()] if found else text).strip(" ,;(")
    if not found:
        title = re.sub(r",? *\(?\b(?:19|20)\d\d\)?$", "", title)
    title += ")" * (title.count("(") - title.count(")"))
    years = re.findall(r"(?<![\d.:/])((?:19|20)\d\d)(?![\d.]*\d)", text)
    link, year = "", int(years[-1]) if years else None
    if found:
        arxiv, address, doi = found.groups()
        link = f"https://arxiv.org/abs/{arxiv}" if arxiv else address or f"https://doi.org/{doi}"
        if year is None and arxiv:
            year = 2000 + int(arxiv[:2])
    return Paper(title, link, year)


def cited(header: str) -> Paper | None:
    """The first publication with an arXiv number or doi named in a comment, licence lines aside."""
    text = " ".join(line for line in header.splitlines() if not line.startswith("Licence"))
    found = _ID.search(text)
    if not found:
        return None
    start = max((m.end() for m in re.finditer(r"(?<!al)\. |; |: ", text[: found.start()])), default=0)
    end = re.compile(r"[;]|\.(?:\s|$)").search(text, found.end())
    return parse_paper(text[start : end.start() if end else len(text)])
