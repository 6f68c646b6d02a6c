"""A paper's table at one scale as a sheet: ours from the records beside the published numbers, every claim judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from filtrun.report import units
from filtrun.report.caption import caption, warnings
from filtrun.report.card import Claim, Published
from filtrun.report.grid import Grid
from filtrun.report.judge import NOT_RUN, Verdict, judge, verdict_data
from filtrun.report.sheet import Box, Column, Judged, Number, Sheet, evidence, marks, metric_facts
from filtrun.report.statistics import mean, std
from filtrun.report.tuning import Budget, Searches, read_searches, trained, tuning_line, unlike_tuning


def paper_sheet(grid: Grid, *, only_rows: bool = False) -> Sheet:
    """The table of a grid; with `only_rows` without rows that are published and not run here."""
    card, table = grid.card, grid.table
    numbers = numbers_of(grid)
    claims = [
        c for c in card.claims if c.table == table.name and (not only_rows or {c.better, c.than} <= set(grid.rows))
    ]
    verdicts = [judge_claim(claim, grid) for claim in claims]
    published = [p for p in table.published if not only_rows or set(p.rows) & set(grid.rows)]
    names = list(grid.rows)
    if published and not only_rows:
        names += [row for row in published[0].rows if row not in names]
    ours = f"ours, {grid.scale} scale, {len(grid.seeds)} seed{'s' * (len(grid.seeds) != 1)}"
    columns = [Column("", number=False)] + [Column(numbers[m].title, b, ours) for m, b in table.metrics.items()]
    rows = [[Box(name)] for name in names]
    for metric, better in table.metrics.items():
        values = [list(grid.values(row, metric).values()) for row in names]
        marked = marks([mean(v) if v else None for v in values], better)
        for row, value, mark in zip(rows, values, marked, strict=True):
            row.append(Box(_ours(grid, row[0].text, numbers[metric], value), mark))
    _trained(grid, columns, rows, names, ours)
    searches = searches_of(grid)
    budgets = budgets_of(grid, searches)
    _tuned(budgets, columns, rows, names, ours)
    sheet = Sheet(f"{card.title}: {table.title}", columns, rows, caption(grid, tuning_line(budgets)))
    for position, block in enumerate(published):
        told = _published_note(block, grid.scale)
        if position == 0:
            sheet.notes.append(f"[1] {told}")
            group = "published [1]" if grid.scale in block.same else "published [1] ≠"
            _add_published(block, columns, rows, names, group)
        else:
            sheet.more.append(_published_sheet(block, f"Published [{position + 1}]: {told}", names, only_rows))
    sheet.claims = [Judged(v.verdict, f"{v.claim.says} [{v.claim.source}]", evidence(v, numbers)) for v in verdicts]
    sheet.warnings = warnings(grid) + unlike_tuning(tunable(grid, budgets))
    sheet.missing = missing_lines(grid)
    sheet.notes += searches.problems()
    known = table.measured_at(grid.scale)
    if known is not None and grid.missing:
        sheet.notes.append(
            f"the card has numbers measured at {known.scale} scale on {known.date} (`filtrun info {card.slug}`); this "
            "table shows records of runs only"
        )
    sheet.data = _data(grid, sheet, verdicts, budgets)
    return sheet


def numbers_of(grid: Grid) -> dict[str, Number]:
    """How the metrics of a grid's table are written."""
    tasks = {str(s.job.config.get("task", {}).get("_target_")): None for s in grid.slots}
    facts = metric_facts(list(tasks))
    return {metric: Number.of(metric, facts) for metric in grid.table.metrics}


def judge_claim(claim: Claim, grid: Grid) -> Verdict:
    """The verdict of a claim of the grid's table, from its records."""
    better = grid.table.metrics[claim.metric]
    ours, theirs = (grid.values(row, claim.metric) for row in (claim.better, claim.than))
    return judge(claim, better, ours, theirs, grid.seeds)


def missing_lines(grid: Grid) -> list[str]:
    """The cells that are not run, row by row, with what they would cost by earlier runs."""
    lines, total, unknown = [], 0.0, 0
    for row in grid.rows:
        slots = [s for s in grid.missing if s.row == row]
        if row in grid.problems:
            lines.append(f"{row}: cannot be composed: {grid.problems[row]}")
        if not slots:
            continue
        each = grid.estimate(row)
        total, unknown = total + (each.seconds if each else 0) * len(slots), unknown + (each is None) * len(slots)
        cost = "cost unknown"
        if each is not None:
            cost = f"about {units.duration(each.seconds)} each" + (f", {each.basis}" if each.basis else "")
        lines.append(f"{row}: seed {', '.join(str(s.seed) for s in slots)} ({cost})")
        for slot in slots:
            if slot.state not in (NOT_RUN, "running"):
                lines.append(f"{row} seed={slot.seed} {slot.state}: {slot.error}")
    if grid.missing:
        cost = f"about {units.duration(total)}" if total else "cost unknown"
        cost += f", {unknown} of unknown cost" if unknown and total else ""
        count = len(grid.missing)
        lines.append(f"{count} of {len(grid.slots)} cells {'is' if count == 1 else 'are'} not run ({cost}); --run does")
    return lines


def _ours(grid: Grid, row: str, number: Number, values: Sequence[float]) -> str:
    """Mean ± standard deviation, with the number of seeds where some are missing; `not run` without a record."""
    if not values:
        return NOT_RUN if row in grid.rows and not grid.records(row) else number.values(values)
    count = len(grid.seeds)
    return number.values(values) + (f" ({len(values)} of {count})" if len(values) < count else "")


def _trained(grid: Grid, columns: list[Column], rows: list[list[Box]], names: Sequence[str], group: str) -> None:
    """Add how much is trained, where the rows differ in it."""
    told = []
    for row in names:
        cost = next(((r.get("cost") or {}) for r in grid.records(row)), {})
        count, total = cost.get("trainable_params"), cost.get("total_params")
        share = f" ({count / total:.1%})" if count and total else ""
        told.append("-" if count is None else f"{count:,}{share}")
    if "cost/trainable_params" not in grid.table.metrics and len(set(told) - {"-"}) > 1:
        columns.append(Column("trained parameters", "", group))
        for boxes, text in zip(rows, told, strict=True):
            boxes.append(Box(text))


def _published_note(block: Published, scale: str) -> str:
    told = f"{block.setting} [{block.source}]"
    return told if scale in block.same else f"{told}; ≠ another setting than ours, not to be compared"


def _add_published(
    block: Published, columns: list[Column], rows: list[list[Box]], names: Sequence[str], group: str
) -> None:
    for metric, better in block.better.items():
        values = [block.rows.get(name, {}).get(metric) for name in names]
        columns.append(Column(metric, better, group))
        for row, text, mark in zip(rows, units.aligned(values), marks(values, better), strict=True):
            row.append(Box(text, mark))


def _published_sheet(block: Published, title: str, names: Sequence[str], only_rows: bool) -> Sheet:
    shown = [row for row in block.rows if not only_rows or row in names]
    columns, rows = [Column("", number=False)], [[Box(row)] for row in shown]
    _add_published(block, columns, rows, shown, "")
    return Sheet(title, columns, rows)


def _basis(grid: Grid, row: str) -> str | None:
    found = grid.estimate(row)
    return None if found is None else found.basis or "by its row"


def searches_of(grid: Grid) -> Searches:
    """The searches beside the folder of the grid's cells."""
    return read_searches(*dict.fromkeys(slot.job.folder.parent for slot in grid.slots))


def budgets_of(grid: Grid, searches: Searches) -> dict[str, Budget]:
    """What was spent on tuning each row."""
    found = {}
    for row in grid.rows:
        slot = next((s for s in grid.slots if s.row == row), None)
        if slot is not None:
            config = slot.job.config
            found[row] = searches.at(config.get("method") or (), slot.job.choices, config.get("scale"))
    return found


def tunable(grid: Grid, budgets: Mapping[str, Budget]) -> dict[str, Budget]:
    """Those of rows that have records, and train something."""
    return {row: b for row, b in budgets.items() if grid.records(row) and trained(grid.records(row))}


def _tuned(
    budgets: Mapping[str, Budget], columns: list[Column], rows: list[list[Box]], names: Sequence[str], group: str
) -> None:
    """Add how many trials each row had, where one had some; the caption has the rest."""
    if any(budget.trials for budget in budgets.values()):
        columns.append(Column("tuning", "", group, number=False))
        for boxes, name in zip(rows, names, strict=True):
            boxes.append(Box(budgets[name].short if name in budgets else "-"))


def _data(grid: Grid, sheet: Sheet, verdicts: Sequence[Verdict], budgets: Mapping[str, Budget]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for row in grid.rows:
        values = {metric: grid.values(row, metric) for metric in grid.table.metrics}
        rows[row] = {
            "n": len(grid.records(row)),
            "tuning": budgets.get(row, Budget()).data(),
            "metrics": {
                metric: {"mean": mean(list(v.values())), "std": std(list(v.values())), "values": v}
                for metric, v in values.items()
                if v
            },
            "records": [r["folder"] for r in grid.records(row)],
        }
    return {
        "paper": grid.card.slug, "table": grid.table.name, "title": sheet.title, "scale": grid.scale,
        "setting": grid.table.setting, "seeds": list(grid.seeds), "metrics": dict(grid.table.metrics), "rows": rows,
        "published": [
            {"setting": p.setting, "source": p.source, "better": p.better, "rows": p.rows,
             "same_setting": grid.scale in p.same} for p in grid.table.published
        ],
        "claims": [verdict_data(v) for v in verdicts],
        "missing": [
            {"row": s.row, "seed": s.seed, "state": s.state, "error": s.error or None,
             "overrides": list(s.job.overrides), "folder": str(s.job.folder),
             "seconds": grid.seconds(s.row), "estimate": _basis(grid, s.row)}
            for s in grid.missing
        ],
        "problems": grid.problems, "caption": sheet.caption, "warnings": sheet.warnings,
    }  # fmt: skip
