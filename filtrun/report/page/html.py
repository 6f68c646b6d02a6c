"""The page itself: one HTML file with its data, styles and scripts inside, which needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
from importlib import resources
from pathlib import Path
from typing import Any

from filtrun.errors import UserError
from filtrun.report.page.gather import embedded

SCRIPTS = ("values.js", "svg.js", "table.js", "curves.js", "scatter.js", "pictures.js", "start.js")
"""In the order in which the page runs them, as one script."""
SIGN = '<meta name="generator" content="filtrun report">'
"""How a page is known again."""


def page(data: dict[str, Any], made: str) -> bytes:
    """A page about what `gather` found; `made` says when and by what. Nothing of a record is read as HTML or script."""
    files = resources.files("filtrun.report.page").joinpath("assets")
    style, body = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "body.html"))
    script = "\n".join(files.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}\n}})();'
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{SIGN}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(data["title"])} · filtrun report</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{embedded(data | {"made": made})}</script>
<script>{script}</script>
</body>
</html>
"""
    return text.encode("utf-8", "replace")


def check_writable(path: Path, force: bool) -> None:
    """Raise UserError when a page may not be written to `path`: a folder, or a file that is no page of ours."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file in it, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")
    if path.exists() and not force:
        try:
            with path.open("rb") as stream:
                known = SIGN.encode() in stream.read(1000)
        except OSError as error:
            raise UserError(f"--out {path} cannot be read: {error.strerror}") from error
        if not known:
            raise UserError(f"{path} is there and is no filtrun report; choose another --out, or --force to replace it")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
