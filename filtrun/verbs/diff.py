"""``filtrun diff RUN RUN``: what differs between two runs: configuration, code, data, environment, cost, result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from filtrun.record import FILE, Record
from filtrun.report.difference import difference
from filtrun.report.select import ABSENT, told
from filtrun.report.sheet import COST
from filtrun.report.units import change, count, flops, metric, plain, short
from filtrun.syntax import MetricFacts
from filtrun.verbs import Parser, print_json, terminal
from filtrun.verbs.show import locate, metrics_of

TITLES = {
    "run": "run", "code": "code version", "config": "configuration", "data": "data", "machine": "where it ran",
    "evaluation": "how it was measured", "environment": "environment", "cost": "cost", "report": "method's report",
    "metrics": "result",
}  # fmt: skip
NUMBERS = ("cost", "report", "metrics")
UNITS = {name: form for name, (_, form) in COST.items()} | {
    "params": count, "nonzero_params": count, "macs": count, "base_macs": count, "effective_macs": count,
    "base_flops": flops, "effective_flops": flops, "latency_seconds": short, "base_latency_seconds": short,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Print the differences; returns 0, also when there are some. Raises UserError when a run is not to be found."""
    parser = Parser("diff", __doc__ or "")
    for name, which in (("a", "first"), ("b", "second")):
        parser.add_argument(
            name, metavar="RUN", help=f"the {which}: a run folder, its {FILE}, or a folder's name in outputs/runs"
        )
    parser.add_json()
    options = parser.parse(argv)
    first, second = (Record.read(locate(run)) for run in (options.a, options.b))
    found = difference(first.to_dict(), second.to_dict())
    if options.json:
        print_json({"a": str(first.folder), "b": str(second.folder)} | found)
    else:
        _print(first, second, found)
    return 0


def _print(first: Record, second: Record, found: Mapping[str, Any]) -> None:
    from rich.text import Text

    console = terminal()
    for side, record in (("a", first), ("b", second)):
        line = f"{side}: {plain(record.name)}, {record.status}, {plain(record.folder)}"
        console.print(Text(line, style="bold", overflow="fold"))
    same = "the same" if found["same_cell"] else "different things"
    console.print(Text(f"They compute {same}.", style="dim"))
    facts = metrics_of(first) | metrics_of(second)
    for part, title in TITLES.items():
        if found[part]:
            console.print()
            console.print(_table(title, part, found[part], facts))
    equal = [f"{TITLES[part]} ({count})" for part, count in found["equal"].items() if count and not found[part]]
    if equal:
        console.print(Text(f"\nEqual in all values: {', '.join(equal)}", style="dim"))


def _table(title: str, part: str, found: Mapping[str, Any], facts: Mapping[str, MetricFacts]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(title, overflow="fold")
    numbers = part in NUMBERS
    for head in ("a", "b", *(("b - a", "relative") if numbers else ())):
        table.add_column(head, justify="right" if numbers else "left", overflow="fold")
    for key, pair in found.items():
        fact = facts.get(key.partition("/")[2]) if part == "metrics" else None
        cells = [_told(pair.get(side, ABSENT), part, key, fact) for side in ("a", "b")]
        if numbers:
            cells += _change(pair, part, key, fact)
        style = _style(pair, fact)
        table.add_row(Text(plain(key)), *(Text(plain(text), style=style if i == 2 else "")
                                          for i, text in enumerate(cells)))  # fmt: skip
    return table


def _told(value: Any, part: str, key: str, fact: MetricFacts | None) -> str:
    if part == "cost" and key in UNITS and isinstance(value, (int, float)):
        return UNITS[key](value)
    if fact is not None and isinstance(value, (int, float)):
        return metric(value, fact.format)
    return told(value)


def _change(pair: Mapping[str, Any], part: str, key: str, fact: MetricFacts | None) -> list[str]:
    step, share = pair["difference"], pair["relative"]
    if step is None:
        return ["-", "-"]
    if part == "cost" and key in UNITS:
        text = ("+" if step >= 0 else "-") + UNITS[key](abs(step))
    else:
        text = change(step, fact.format if fact else ".4g")
    return [text, "-" if share is None else f"{share:+.2%}"]


def _style(pair: Mapping[str, Any], fact: MetricFacts | None) -> str:
    """Green when the second is better by a metric that has a better side, red when it is worse."""
    step = pair.get("difference")
    if not step or fact is None or fact.better not in ("lower", "higher"):
        return ""
    return "green" if (step > 0) == (fact.better == "higher") else "red"
