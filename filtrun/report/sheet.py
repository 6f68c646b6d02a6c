"""A table with its caption and footnotes, before it is laid out for a terminal, Markdown, LaTeX or HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from filtrun.report import units
from filtrun.report.judge import NOT_RUN, Verdict
from filtrun.report.statistics import Paired, mean, std
from filtrun.syntax import MetricFacts

BEST, SECOND = "best", "second"


@dataclass(frozen=True)
class Box:
    """What stands in one place of a table; `mark` is best, second or nothing."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """`better` is lower, higher or nothing; columns of one `group` stand together under its name."""

    title: str
    better: str = ""
    group: str = ""
    number: bool = True


@dataclass(frozen=True)
class Judged:
    """A claim as it is printed: the verdict, the claim in the paper's terms, and what the verdict rests on."""

    verdict: str
    says: str
    evidence: str


@dataclass
class Sheet:
    """Everything a table says; `data` is the same as JSON values."""

    title: str
    columns: list[Column]
    rows: list[list[Box]]
    caption: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    claims: list[Judged] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    more: list[Sheet] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def plus_minus(values: Sequence[float], form: str) -> str:
    """``3.10 ± 0.02`` (mean and sample standard deviation), ``97.8 ± 0.3 %``; one value stands alone, none is ``-``."""
    if not values:
        return "-"
    spread = std(values)
    if spread is None:
        return units.metric(values[0], form).replace("%", " %")
    if form.endswith("%"):
        return f"{units.metric(100 * mean(values), form[:-1] + 'f')} ± {units.metric(100 * spread, form[:-1] + 'f')} %"
    return f"{units.metric(mean(values), form)} ± {units.metric(spread, form)}"


def marks(values: Sequence[float | None], better: str) -> list[str]:
    """Which values are best and second best: nothing for a single value, no second among two."""
    there = sorted({v for v in values if v is not None}, reverse=better == "higher")
    count = sum(v is not None for v in values)
    if better not in ("lower", "higher") or count < 2 or len(there) < 2:
        return [""] * len(values)
    second = there[1] if count > 2 else None
    return [BEST if v == there[0] else SECOND if v is not None and v == second else "" for v in values]


COST = {
    "trainable_params": ("trained parameters", units.count), "total_params": ("parameters", units.count),
    "stored_bytes": ("stored", units.size), "flops": ("FLOPs of a sample", units.flops),
    "peak_memory_bytes": ("peak memory", units.size), "saved_bytes": ("kept for backward", units.size),
    "optimizer_bytes": ("optimizer state", units.size), "train_seconds": ("training time", units.duration),
    "total_seconds": ("total time", units.duration), "images_per_second": ("images per second", units.rate),
    "steps": ("steps", units.count), "nfe": ("network calls", units.count),
}  # fmt: skip


def metric_facts(tasks: Sequence[str]) -> dict[str, MetricFacts]:
    """What tasks (their classes' dotted paths) say of their metrics, read from the source."""
    from filtrun.source import describe

    found: dict[str, MetricFacts] = {}
    for target in tasks:
        source = describe(target)
        facts = source.facts.get("metrics") if source else None
        if isinstance(facts, dict):
            found |= {str(k): v for k, v in facts.items() if isinstance(v, MetricFacts) and k not in found}
    return found


@dataclass(frozen=True)
class Number:
    """How a metric of a table is written: its name for people and the form of its values."""

    title: str
    form: str
    cost: str = ""

    @classmethod
    def of(cls, metric: str, facts: Mapping[str, MetricFacts]) -> Number:
        """That of a table's metric, such as ``test/fid`` or ``cost/flops``."""
        split, _, name = metric.partition("/")
        if split == "cost" and name in COST:
            return cls(COST[name][0], ".4g", name)
        fact = facts.get(name) if split not in ("cost", "report") else None
        title = fact.title if fact else name.replace("_", " ")
        return cls(
            title if split in ("test", "cost", "report") else f"{title} ({split})", fact.format if fact else ".4g"
        )

    def values(self, values: Sequence[float]) -> str:
        """Mean ± standard deviation."""
        if self.cost and values:
            form, spread = COST[self.cost][1], std(values)
            same = not spread or form(mean(values)) == form(mean(values) + spread)
            return form(mean(values)) if same or spread is None else f"{form(mean(values))} ± {form(spread)}"
        return plus_minus(values, self.form)

    def change(self, value: float) -> str:
        """A difference with its sign."""
        if self.cost:
            return ("+" if value >= 0 else "-") + COST[self.cost][1](abs(value))
        return units.change(value, self.form)


def evidence(verdict: Verdict, numbers: Mapping[str, Number]) -> str:
    """What a verdict rests on, in one sentence."""
    claim, number = verdict.claim, numbers[verdict.claim.metric]
    if verdict.verdict == NOT_RUN or verdict.gain is None or verdict.beyond is None:
        return claim.text + (f" ({verdict.note})" if verdict.note else "")
    values = [number.values(list(v.values())) for v in (verdict.better, verdict.than)]
    parts = [f"{claim.text}: {values[0]} against {values[1]}", _paired(verdict.gain, number)]
    if verdict.beyond.p is not None:
        least = " (the least it can be)" if verdict.beyond.p == verdict.beyond.least_p else ""
        parts.append(f"sign-flip p = {verdict.beyond.p:.3g}{least}")
    if verdict.beyond.t_p is not None:
        parts.append(f"paired t-test p = {verdict.beyond.t_p:.2g}")
    if verdict.sure is False:
        parts.append("not beyond the noise of the seeds")
    return "; ".join(parts)


def _paired(gain: Paired, number: Number) -> str:
    seeds = len(gain.differences)
    if seeds == 1:
        return f"gain {number.change(gain.mean)} with one seed: no test"
    assert gain.low is not None and gain.high is not None
    told = (
        f"mean paired gain {number.change(gain.mean)}, 95 % CI [{number.change(gain.low)}, {number.change(gain.high)}]"
    )
    told += f", better in {gain.wins} of {seeds} seeds"
    return told + (f", effect size d = {gain.effect:.1f}" if gain.effect is not None else "")
