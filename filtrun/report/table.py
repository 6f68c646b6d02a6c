"""The result of one run as a table a newcomer can read: what was measured, before and after, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from filtrun.report import units
from filtrun.report.units import plain

SCALE_NOTES = {
    "smoke": "smoke scale: the numbers mean nothing",
    "laptop": "laptop scale, not the paper's setting",
    "paper": "paper scale",
}
_NOTE_NAMES = {"feature_net": "feature net", "samples": "samples per set of classes"}
_WIDTH = 76
"""Columns from which on the table has room for what each row means; below, the meanings come after it."""
_FINISH = 16
"""What the column after finish takes."""


class MetricLike(Protocol):
    """What is read of a task's metric (`filtrun.task.Metric`)."""

    @property
    def title(self) -> str: ...
    @property
    def better(self) -> str: ...
    @property
    def meaning(self) -> str: ...
    @property
    def format(self) -> str: ...


@dataclass(frozen=True)
class _Plain:
    """A metric the task does not describe."""

    title: str
    better: str = ""
    meaning: str = ""
    format: str = ".4g"


def result_table(record: Mapping[str, Any], metrics: Mapping[str, MetricLike]) -> RenderableType:
    """The result table of a run.

    Args:
        record: what ``Record.to_dict()`` gives, with ``folder`` (where the run lies) if it is to be shown. Parts may
            be missing or None: a failed run has no metrics, one from scratch no base.
        metrics: name -> metric of the run's task (``Task.metrics``), which gives order, title, direction and meaning.

    Returns:
        Something rich prints: columns base, fine-tuned, change (and after finish, where finishing changed a metric),
        then what it cost, then how it was measured. Fits 80 columns and needs no colour.
    """
    return _Result(record, metrics)


class _Result:
    """Laid out when printed, as the console's width and characters are known only then."""

    def __init__(self, record: Mapping[str, Any], metrics: Mapping[str, MetricLike]) -> None:
        self.record, self.metrics = record, metrics
        self.values = dict(record.get("metrics") or {})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only = options.ascii_only
        wide = options.max_width >= _WIDTH + (_FINISH if self.finish_differs else 0)
        parts: list[RenderableType] = [self.table(wide, ascii_only), Text(), *self.captions(ascii_only)]
        if not wide:
            parts += self.meanings()
        yield Group(Text(self.title(), style="bold"), *parts)

    # -- rows ------------------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        """The metrics there are, those the task describes first, in its order."""
        there = {name.partition("/")[2]: None for name in self.values}
        return [n for n in self.metrics if n in there] + sorted(n for n in there if n not in self.metrics)

    def at(self, split: str, name: str) -> float | None:
        """A metric before training (base), after it (tuned) or after finishing (test)."""
        return self.values.get(f"{split}/{name}")

    @property
    def has_base(self) -> bool:
        return any(key.startswith("base/") for key in self.values)

    @property
    def finish_differs(self) -> bool:
        """Whether finishing (a merge, say) changed a metric."""
        both = [n for n in self.names() if f"tuned/{n}" in self.values and f"test/{n}" in self.values]
        return any(self.at("tuned", n) != self.at("test", n) for n in both)

    def table(self, wide: bool, ascii_only: bool) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("measured", overflow="fold")
        numbers = ["base"] * self.has_base + [self.tuned_title()] + ["after finish"] * self.finish_differs
        for title in numbers + ["change"] * self.has_base:
            table.add_column(title, justify="right", no_wrap=wide, overflow="fold")
        if wide:
            table.add_column("what it means", style="dim", overflow="fold", ratio=1)
        for name in self.names():
            table.add_row(*self.metric_row(name, wide, ascii_only))
        if self.names():
            table.add_section()
        for title, value, meaning in self.cost_rows():
            empty_before, empty_after = [""] * self.has_base, [""] * (self.finish_differs + self.has_base)
            table.add_row(title, *empty_before, value, *empty_after, *([meaning] * wide))
        return table

    def tuned_title(self) -> str:
        if not (self.record.get("cost") or {}).get("trainable_params", 1):
            return "result"
        return "fine-tuned" if self.has_base else "trained"

    def metric_row(self, name: str, wide: bool, ascii_only: bool) -> list[RenderableType]:
        metric = self.metrics.get(name) or _Plain(plain(name))
        base, tuned, test = (self.at(split, name) for split in ("base", "tuned", "test"))
        arrow = {"lower": "(low)" if ascii_only else "↓", "higher": "(high)" if ascii_only else "↑"}
        row: list[RenderableType] = [Text(f"{plain(metric.title)} {arrow.get(metric.better, '')}".rstrip())]
        if self.has_base:
            row.append(Text(units.metric(base, metric.format)))
        row.append(Text(units.metric(test if tuned is None else tuned, metric.format), style="bold"))
        if self.finish_differs:
            row.append(Text(units.metric(test, metric.format), style="bold"))
        if self.has_base:
            row.append(self.change(metric, base, tuned if test is None else test))
        return [*row, Text(plain(metric.meaning))] if wide else row

    def change(self, metric: MetricLike, base: float | None, last: float | None) -> Text:
        """The difference and whether it is for the better, in words, as colours may be off."""
        if base is None or last is None:
            return Text("-")
        moved = last - base
        text = units.change(moved, metric.format)
        if not any(digit in text for digit in "123456789"):
            return Text("same")
        if metric.better not in ("lower", "higher"):
            return Text(text)
        good = (moved < 0) == (metric.better == "lower")
        return Text(f"{text} {'better' if good else 'worse'}", style="green" if good else "red")

    def cost_rows(self) -> list[tuple[str, str, str]]:
        cost = self.record.get("cost") or {}
        trained, total = cost.get("trainable_params"), cost.get("total_params")
        share = f"{trained / total:.2%} of the model's {total:,}" if trained is not None and total else "of the model"
        rows = []
        if trained is not None:
            rows.append(("trained parameters", units.count(trained), share))
        named = (
            ("stored_bytes", "stored file", units.size, "what has to be kept beside the base"),
            ("peak_memory_bytes", "peak memory", units.size, "most memory in use while training"),
            ("train_seconds", "training time", units.duration, self.steps(cost)),
            ("images_per_second", "images per second", units.rate, "training speed"),
            ("nfe", "network calls", units.count, "evaluations of the network for one sample"),
        )
        for key, title, form, meaning in named:
            if cost.get(key) is not None and not (key == "train_seconds" and not cost.get("steps")):
                rows.append((title, form(cost[key]), meaning))
        return rows + self.saved_rows(cost)

    def saved_rows(self, cost: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        """What pruning saves: rows only where the finished model needs less than its base."""
        rows: list[tuple[str, str, str]] = []
        for key, base, title, form, meaning in (
            ("params", "total_params", "parameters left", units.count, "in the finished model"),
            ("nonzero_params", "params", "not zero", units.count, "parameters that are not zero"),
            ("macs", "base_macs", "multiply-adds", units.count, "of convolutions and linear layers, one sample"),
            ("effective_macs", "macs", "effective", units.count, "multiply-adds by the method's own formula"),
            ("latency_seconds", "base_latency_seconds", "forward pass", units.short, "of one batch, median"),
        ):
            now, was = cost.get(key), cost.get(base)
            slim = key != "latency_seconds" or any(row[0] == "multiply-adds" for row in rows)
            if now is not None and was and slim and (now < 0.99 * was or key == "latency_seconds"):
                rows.append((title, form(now), f"{meaning}; {now / was:.1%} of {form(was)}"))
        return rows

    def steps(self, cost: Mapping[str, Any]) -> str:
        steps = cost.get("steps")
        return f"{steps:,} optimizer steps" if steps is not None else "without evaluation"

    def meanings(self) -> list[Text]:
        """The metrics' meanings as lines, where the table has no column for them."""
        known = [self.metrics[name] for name in self.names() if name in self.metrics]
        return [Text(f"{plain(m.title)}: {plain(m.meaning)}", style="dim", overflow="fold") for m in known if m.meaning]

    # -- around the table ------------------------------------------------------------------------------------------
    def title(self) -> str:
        record = self.record
        parts = {
            "method": " + ".join(record.get("methods") or []) or "none", "data": record.get("data"),
            "model": record.get("model"), "task": record.get("task"),
        }  # fmt: skip
        title = ", ".join(f"{key} {plain(value)}" for key, value in parts.items() if value)
        status = record.get("status")
        return title if status in (None, "finished") else f"{title} ({plain(status)})"

    def captions(self, ascii_only: bool) -> list[Text]:
        lines = []
        if any(m.better in ("lower", "higher") for n, m in self.metrics.items() if n in self.names()):
            low, high = ("(low)", "(high)") if ascii_only else ("↓", "↑")
            lines.append(f"{low} lower is better, {high} higher is better")
        notes = self.record.get("evaluation") or {}
        measured = [f"{_NOTE_NAMES.get(key, key.replace('_', ' '))}: {plain(value)}" for key, value in notes.items()]
        if measured and self.values:
            lines.append("measured with " + "; ".join(measured))
        config = self.record.get("config") or {}
        scale = config.get("scale")
        how = [SCALE_NOTES.get(str(scale), f"scale {plain(scale)}")] if scale else []
        if self.record.get("seed") is not None:
            how.append(f"seed {self.record['seed']}")
        if how:
            lines.append("; ".join(how))
        if self.record.get("folder"):
            lines.append(f"results: {plain(self.record['folder'])}")
        return [Text(line, style="dim", overflow="fold") for line in lines]
