"""``filtrun show RUN``: what a run did, from its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import UserError, closest
from filtrun.record import FILE, Record
from filtrun.report import units
from filtrun.report.units import plain
from filtrun.source import describe
from filtrun.syntax import MetricFacts
from filtrun.verbs import Parser, print_json, terminal


def main(argv: Sequence[str]) -> int:
    """Print a record; returns the exit code. Raises UserError when there is none or it is broken."""
    parser = Parser("show", __doc__ or "")
    parser.add_argument("run", metavar="RUN", help=f"a run folder, its {FILE}, or the name of a folder in outputs/runs")
    parser.add_json()
    options = parser.parse(argv)
    record = Record.read(locate(options.run))
    if options.json:
        print_json(record.to_dict() | {"folder": str(record.folder)})
    else:
        _print(record)
    return 0


def locate(run: str) -> Path:
    """The path of a run given as a folder, a record file, or a folder's name below ``outputs``.

    Raises UserError that names the closest run, or the runs in the folder when it holds several.
    """
    places = [Path(run).expanduser(), *(Path("outputs", kind, run) for kind in ("runs", "sweeps"))]
    there = next((p for p in places if p.exists()), None) if run else None
    if there is None:
        names = [p.parent.name for p in Path("outputs").glob("*/*/" + FILE)]
        raise UserError(f"there is no run {run!r}{closest(Path(run).name, names)}")
    if there.is_dir() and not (there / FILE).exists():
        inside = sorted(p.parent.name for p in there.glob("*/" + FILE))
        if inside:
            more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
            raise UserError(f"{run} holds several runs; show one of them: {', '.join(inside[:3])}{more}")
    return there


def metrics_of(record: Record) -> dict[str, MetricFacts]:
    """The metrics that the run's task describes, read from its source; empty when the task is not to be found."""
    node = record.config.get("task")
    target = node.get("_target_") if isinstance(node, dict) else None
    source = describe(target) if isinstance(target, str) else None
    found = source.facts.get("metrics") if source else None
    return {k: v for k, v in found.items() if isinstance(v, MetricFacts)} if isinstance(found, dict) else {}


def _print(record: Record) -> None:
    from rich.table import Table
    from rich.text import Text

    from filtrun.report.table import result_table

    console = terminal()
    console.print(Text(f"{plain(record.name or record.folder.name)}: {record.status}", style="bold"))
    if record.error:
        console.print(Text(f"error: {plain(record.error)}", style="red"))
    console.print()
    console.print(result_table(record.to_dict() | {"folder": str(record.folder)}, metrics_of(record)))
    console.print()
    grid = Table.grid(padding=(0, 2))
    for title, lines in _details(record).items():
        for i, line in enumerate(lines):
            grid.add_row(Text("" if i else title, style="dim"), Text(plain(line), overflow="fold"))
    console.print(grid)


def _details(record: Record) -> dict[str, list[str]]:
    """What the table does not say, title -> lines."""
    cost, environment = record.cost, record.environment
    more = {
        "total time": units.duration(cost.get("total_seconds")),
        "one sample's forward pass": units.flops(cost.get("flops")),
        "multiply-adds": units.count(cost.get("macs")),
        "of the base": units.count(cost.get("base_macs")),
        "by the method's formula": units.count(cost.get("effective_macs")),
        "latency": units.short(cost.get("latency_seconds")),
        "latency of the base": units.short(cost.get("base_latency_seconds")),
    }
    first = ("device", "threads", "python", "torch", "filtrun", "git", "platform")
    places = {str(k): environment[k] for k in first if k in environment} | {k: environment[k] for k in environment}
    where = ", ".join(f"{key} {value}" for key, value in places.items() if value is not None)
    return {
        "command": ["filtrun " + " ".join(record.overrides)],
        "key": [record.key] if record.key else [],
        "cost": [f"{title}: {value}" for title, value in more.items() if value != "-"],
        "method's report": [
            f"{slug}: " + ", ".join(f"{key} {_number(value)}" for key, value in values.items())
            for slug, values in record.report.items()
            if isinstance(values, dict)
        ],
        "stages": [f"{s['name']} {s['key']} ({'cached' if s['cached'] else 'made here'})" for s in record.stages],
        "artifacts": [f"{a['kind']}: {a['path']}{_missing(record, a)}" for a in record.artifacts],
        "environment": [where] if where else [],
    }


def _missing(record: Record, artifact: dict[str, Any]) -> str:
    return "" if (record.folder / artifact["path"]).exists() else " (no longer there)"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
