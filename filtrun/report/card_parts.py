"""What a paper card holds; `filtrun.report.card` reads one from its YAML and says what the keys mean."""

from __future__ import annotations

from dataclasses import dataclass, field

SCALES = ("smoke", "laptop", "paper")


@dataclass(frozen=True)
class Cell:
    """One run of a table: its row, its seed and the overrides that make it."""

    row: str
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """How a table is run at one scale: the seeds of every row, overrides of all rows, and more of single rows."""

    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """Numbers as the paper gives them: `rows` maps a row's name to {metric: number}."""

    setting: str
    source: str
    better: dict[str, str]
    rows: dict[str, dict[str, float]]
    same: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What was measured of a table at one scale: `rows` maps a row to {metric: a value for each seed}."""

    scale: str
    date: str
    device: str
    seeds: tuple[int, ...]
    rows: dict[str, dict[str, tuple[float, ...]]]
    note: str = ""

    def values(self, row: str, metric: str) -> dict[int, float]:
        """A metric of a row by seed; empty when it was not measured."""
        return dict(zip(self.seeds, self.rows.get(row, {}).get(metric, ()), strict=False))


@dataclass(frozen=True)
class GalleryCell:
    """A paper's line in the table of all papers: a row and its baseline, compared by one metric of a table."""

    table: str
    row: str
    metric: str
    baseline: str


@dataclass(frozen=True)
class Table:
    """A grid of runs: every row with every seed, at each of its scales."""

    name: str
    title: str
    setting: str
    rows: dict[str, tuple[str, ...]]
    scales: dict[str, Scale]
    metrics: dict[str, str]
    published: tuple[Published, ...] = ()
    measured: tuple[Measured, ...] = ()
    tuning: str = ""

    def measured_at(self, scale: str) -> Measured | None:
        """What the card says was measured at a scale."""
        return next((m for m in self.measured if m.scale == scale), None)

    def overrides(self, row: str, scale: str) -> tuple[str, ...]:
        """What makes the runs of a row at a scale, but for the seed."""
        how = self.scales[scale]
        return (*how.overrides, *self.rows[row], *how.rows.get(row, ()), f"scale={scale}")

    def cells(self, scale: str) -> list[Cell]:
        """The runs at one scale, row by row; empty when the table has no such scale."""
        if scale not in self.scales:
            return []
        return [
            Cell(row, seed, (*self.overrides(row, scale), f"seed={seed}"))
            for row in self.rows
            for seed in self.scales[scale].seeds
        ]


@dataclass(frozen=True)
class Claim:
    """`metric` of row `better` beats that of row `than` by `margin` (of the metric's unit, or `relative`: a share)."""

    text: str
    metric: str
    better: str
    than: str
    margin: float
    relative: bool
    table: str
    says: str
    source: str


@dataclass(frozen=True)
class Card:
    """A paper; `slug` is the file's name."""

    slug: str
    title: str
    link: str
    year: int
    family: str
    abstract: str
    methods: tuple[str, ...]
    tables: tuple[Table, ...]
    claims: tuple[Claim, ...]
    venue: str = ""
    tuning: str = ""
    gallery: GalleryCell | None = None

    def table(self, name: str) -> Table:
        """The table of that name."""
        return next(t for t in self.tables if t.name == name)
