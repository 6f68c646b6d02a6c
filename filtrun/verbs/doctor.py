"""``filtrun doctor``: what this machine has, what is missing and how to get it."""

from __future__ import annotations

from collections.abc import Sequence

from filtrun.errors import UserError, closest
from filtrun.verbs import Parser, print_json, terminal
from filtrun.verbs.doctor_checks import Check, all_checks

_KEYS = ("data.root", "stages.root")
_SIGNS = {"ok": "ok", "missing": "missing", "broken": "BROKEN"}


def main(argv: Sequence[str]) -> int:
    """Check the machine and print what was found; returns 1 when the embedded main job cannot run, else 0."""
    parser = Parser("doctor", __doc__ or "")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="data.root=DIR, stages.root=DIR")
    parser.add_json()
    options = parser.parse(argv)
    given = dict(_override(word) for word in options.overrides)
    checks = all_checks(data_root=given.get("data.root"), stages_root=given.get("stages.root"))
    broken = [c for c in checks if c.state == "broken"]
    if options.json:
        print_json({"ok": not broken, "checks": [c.to_dict() for c in checks]})
    else:
        _print(checks, broken)
    return 1 if broken else 0


def _override(word: str) -> tuple[str, str]:
    key, sign, value = word.partition("=")
    if key not in _KEYS or not sign or not value:
        raise UserError(f"filtrun doctor: {word!r} is not one of data.root=DIR, stages.root=DIR{closest(key, _KEYS)}")
    return key, value


def _print(checks: Sequence[Check], broken: Sequence[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    from filtrun.report.units import plain

    console = terminal()
    styles = {"ok": "green", "missing": "yellow", "broken": "bold red"}
    groups = list(dict.fromkeys(c.group for c in checks))
    for group in groups:
        console.print(Text(group, style="bold"))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for check in (c for c in checks if c.group == group):
            detail = check.detail + (f"\n-> {check.fix}" if check.fix and check.state != "ok" else "")
            grid.add_row(Text(f"  {_SIGNS[check.state]}", style=styles[check.state]), check.name, Text(plain(detail)))
        console.print(grid)
    console.print()
    if broken:
        names = ", ".join(c.name for c in broken)
        console.print(Text(f"The embedded main job cannot run: {plain(names)}", style="bold red"))
    else:
        console.print("The embedded main job (`filtrun` without arguments) can run here.", markup=False)
