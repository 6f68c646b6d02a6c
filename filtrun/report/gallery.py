"""One line for every paper: its method against a baseline by one number, and how many of its claims hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from filtrun.report.grid import Grid
from filtrun.report.judge import Verdict, count_verdicts, verdict_data
from filtrun.report.paper_sheet import budgets_of, judge_claim, missing_lines, numbers_of, searches_of, tunable
from filtrun.report.sheet import Box, Column, Sheet, marks
from filtrun.report.statistics import mean, std
from filtrun.report.table import SCALE_NOTES
from filtrun.report.tuning import Budget, tuning_line, unlike_tuning

TITLES = ("method", "paper", "year", "family", "task, data", "metric", "ours", "baseline", "cost", "claims")
NUMBERS = ("year", "ours", "baseline", "claims")
RATIOS = {"flops": "FLOPs", "nfe": "network calls", "stored_bytes": "stored", "train_seconds": "training time"}
"""Costs that are told as multiples of the baseline's, where they differ."""
LONGEST = 48


def needed(grids: Sequence[Grid]) -> list[Grid]:
    """The grids that hold the gallery's cells, cut down to them: of each paper its row and the baseline."""
    found = []
    for grid in grids:
        cell = grid.card.gallery
        if cell is not None and cell.table == grid.table.name and grid.scale in grid.table.scales:
            rows = tuple(r for r in grid.rows if r in (cell.row, cell.baseline))
            slots = [s for s in grid.slots if s.row in rows]
            problems = {row: told for row, told in grid.problems.items() if row in rows}
            found.append(Grid(grid.card, grid.table, grid.scale, rows, grid.seeds, slots, problems))
    return found


def gallery_sheet(grids: Sequence[Grid], scale: str) -> Sheet:
    """The table of all papers; `grids` are all tables of their cards, for the verdicts."""
    columns = [Column(title, number=title in NUMBERS) for title in TITLES]
    sheet = Sheet(f"All papers at {scale} scale", columns, [], caption=_caption(scale))
    data = []
    for grid in needed(grids):
        verdicts = [
            judge_claim(claim, g)
            for g in grids
            if g.card.slug == grid.card.slug
            for claim in g.card.claims
            if claim.table == g.table.name
        ]
        budgets = budgets_of(grid, searches_of(grid))
        if any(budget.trials for budget in budgets.values()):
            sheet.notes.append(f"{grid.card.slug}: {tuning_line(budgets)}")
            sheet.warnings += [f"{grid.card.slug}: {line}" for line in unlike_tuning(tunable(grid, budgets))]
        sheet.rows.append(_line(grid, verdicts))
        data.append(_data(grid, verdicts, budgets))
        sheet.missing += [f"{grid.card.slug}: {line}" for line in _missing(grid)]
    if not sheet.notes:
        sheet.caption.append(
            "tuning budget: no search on record for any row; `filtrun table PAPER` says what was tuned"
        )
    sheet.data = {"gallery": scale, "caption": sheet.caption + sheet.notes, "warnings": sheet.warnings, "papers": data}
    return sheet


def _missing(grid: Grid) -> list[str]:
    """Why rows cannot be run, what failed, and in one line how much is not run."""
    lines = missing_lines(grid)
    return [line for line in lines if "cannot be composed" in line or " failed: " in line] + lines[-1:]


def _caption(scale: str) -> list[str]:
    return [
        f"{SCALE_NOTES[scale]}; ours and the baseline are mean ± sample standard deviation over seeds (their number)",
        "each line compares two rows of one paper's table; lines are not to be compared with each other",
        "cost: share of the parameters that train, and what differs as a multiple of the baseline's",
        "claims: how many of the paper's hold here, by the mean paired difference over seeds; "
        "`filtrun table PAPER` has the evidence, settings and published numbers",
    ]


def _line(grid: Grid, verdicts: Sequence[Verdict]) -> list[Box]:
    card, cell = grid.card, grid.card.gallery
    assert cell is not None
    number = numbers_of(grid).get(cell.metric)
    better = grid.table.metrics[cell.metric]
    values = [list(grid.values(row, cell.metric).values()) for row in (cell.row, cell.baseline)]
    if cell.row == cell.baseline:
        values[1] = []
    told = [f"{number.values(v)} ({len(v)})" if v and number else "-" for v in values]
    if values[1]:
        told[1] = f"{cell.baseline} {told[1]}"
    marked = marks([mean(v) if v else None for v in values], better)
    title = number.title if number else cell.metric
    arrow = {"lower": "↓", "higher": "↑"}[better]
    texts = [
        cell.row, _short(card.title), str(card.year), card.family, _where(grid), f"{title} {arrow}", told[0], told[1],
        _costs(grid, cell.row, cell.baseline), count_verdicts(verdicts),
    ]  # fmt: skip
    return [Box(text, marked[i - 6] if i in (6, 7) else "") for i, text in enumerate(texts)]


def _short(title: str) -> str:
    """A paper's title up to its colon, cut between words where it is long."""
    first = title.partition(":")[0]
    return first if len(first) <= LONGEST else first[:LONGEST].rpartition(" ")[0].rstrip(" ,;(") + " ..."


def _where(grid: Grid) -> str:
    choices = [s.job.choices for s in grid.slots]
    told = dict.fromkeys(f"{c.get('task')}, {c.get('data')}" for c in choices)
    return "; ".join(told) or "-"


def _share(grid: Grid, row: str) -> float | None:
    cost = next(((r.get("cost") or {}) for r in grid.records(row)), {})
    count, total = cost.get("trainable_params"), cost.get("total_params")
    return count / total if count is not None and total else None


def _ratios(grid: Grid, row: str, baseline: str) -> dict[str, float]:
    """Mean costs of a row over the baseline's; those both rows have."""
    found = {}
    for key in RATIOS:
        means = []
        for name in (row, baseline):
            values = [(r.get("cost") or {}).get(key) or 0.0 for r in grid.records(name)]
            means.append(mean(values) if values else 0.0)
        if all(means) and row != baseline:
            found[key] = means[0] / means[1]
    return found


def _costs(grid: Grid, row: str, baseline: str) -> str:
    share = _share(grid, row)
    told = [] if share is None else [f"{100 * share:.3g} % trained"]
    for key, ratio in _ratios(grid, row, baseline).items():
        if f"{ratio:.2f}" != "1.00":
            told.append(f"{RATIOS[key]} {ratio:.2f} ×")
    return ", ".join(told) or "-"


def _data(grid: Grid, verdicts: Sequence[Verdict], budgets: Mapping[str, Budget]) -> dict[str, Any]:
    card, cell = grid.card, grid.card.gallery
    assert cell is not None
    rows = {}
    for name, row in (("ours", cell.row), ("baseline", cell.baseline)):
        values = grid.values(row, cell.metric)
        numbers = list(values.values())
        rows[name] = {
            "row": row, "values": values, "mean": mean(numbers) if numbers else None, "std": std(numbers),
            "tuning": budgets.get(row, Budget()).data(),
        }  # fmt: skip
    return {
        "paper": card.slug, "title": card.title, "year": card.year, "family": card.family, "table": cell.table,
        "metric": cell.metric, "better": grid.table.metrics[cell.metric], **rows,
        "trained_share": _share(grid, cell.row), "cost_ratios": _ratios(grid, cell.row, cell.baseline),
        "claims": [verdict_data(v) for v in verdicts],
        "missing": [{"row": s.row, "seed": s.seed, "state": s.state} for s in grid.missing], "problems": grid.problems,
    }  # fmt: skip
