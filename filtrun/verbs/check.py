"""``filtrun check method=NAME``: the conformance suite on a method, one of this package or of the user's own."""

from __future__ import annotations

import argparse
import logging
import warnings

from filtrun.errors import UserError


def main(argv: list[str]) -> int:
    """Run the suite and print a table; returns 0 when every check passes or is skipped, else 1."""
    parser = argparse.ArgumentParser(prog="filtrun check", description=__doc__)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="method=NAME, and what else the run needs")
    parser.add_argument("--config-dir", help="folder with configurations of your own")
    parser.add_argument("--no-ddp", action="store_true", help="leave out the training on two processes")
    options = parser.parse_intermixed_args(argv)
    names = [word.partition("=")[2] for word in options.overrides if word.startswith("method=")]
    if len(names) != 1 or not names[0] or names[0].startswith("["):
        raise UserError("say which method to check: filtrun check method=NAME")
    rest = [word for word in options.overrides if not word.startswith("method=")]

    from rich.console import Console
    from rich.table import Table

    from filtrun.conformance import conform

    warnings.filterwarnings("ignore", module="lightning_fabric")
    for name in ("lightning.fabric", "lightning_fabric", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    checks = conform(names[0], *rest, ddp=not options.no_ddp, config_dir=options.config_dir)
    colours = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
    settings = list(dict.fromkeys(c.setting for c in checks if c.setting))
    table = Table(title=f"method={names[0]}")
    for heading in ("check", *settings):
        table.add_column(heading)
    for name in dict.fromkeys(c.name for c in checks):
        found = {c.setting: f"[{colours[c.status]}]{c.status}[/]" for c in checks if c.name == name}
        table.add_row(name, *(found.get(s, found.get("", "")) for s in settings))
    console = Console()
    console.print(table)
    for check in checks:
        if check.status != "passed":
            place = f" ({check.setting})" if check.setting else ""
            console.print(f"{check.name}{place} {check.status}: {check.reason}", markup=False, highlight=False)
    count = {status: sum(c.status == status for c in checks) for status in colours}
    console.print(", ".join(f"{number} {status}" for status, number in count.items()), highlight=False)
    return 1 if count["failed"] else 0
