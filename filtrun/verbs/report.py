"""``filtrun report DIR --out FILE.html``: one page of all runs below a folder, to read in a browser or send on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from filtrun.errors import UserError
from filtrun.report.units import size
from filtrun.verbs import Parser


def main(argv: Sequence[str]) -> int:
    """Write the page; returns 0. Raises UserError when there is nothing to show or the file may not be replaced."""
    parser = Parser("report", __doc__ or "")
    parser.add_argument("folder", metavar="DIR", help="a folder with runs below it, such as outputs")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (default report.html)")
    parser.add_argument(
        "--where", action="append", default=[], metavar="KEY=VALUE,...", help="only these runs, as in filtrun table"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is no filtrun report")
    options = parser.parse(argv)
    folder, out = Path(options.folder).expanduser(), Path(options.out).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    from filtrun import __version__
    from filtrun.report.export import write
    from filtrun.report.page.gather import gather
    from filtrun.report.page.html import check_writable, page

    check_writable(out, options.force)
    data = gather(folder, options.where)
    if not data["runs"]:
        few = f" for which {', '.join(data['where'])}" if data["where"] else ""
        raise UserError(f"there is no run below {folder}{few}")
    content = page(data, f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, filtrun {__version__}")
    write(out, content, overwrite=True)
    more = f", {data['left_out']} sample pictures left out (unreadable, or no room)" if data["left_out"] else ""
    print(f"{out}: {len(data['runs'])} runs, {size(len(content))}{more}")
    return 0
