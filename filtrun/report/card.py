"""Paper cards (``conf/paper/<slug>.yaml``): what a paper says, the runs that test it, and the claims to judge.

A card is a mapping with these keys; those marked * may be left out:

    title, link, year, family     the paper; `family` is the package of its method (peft, pruning, ...)
    venue*, abstract              where it appeared; what it claims, in our words
    methods*                      the configs of conf/method that are the paper's own (default: the card's name)
    tables:                       a list of
      name, title, setting        `setting` says in one line what is trained on what
      rows                        {row: [override, ...]}: what is compared
      scales                      {smoke | laptop | paper: {seeds: [int, ...], overrides*: [override, ...]}}
      metrics                     {split/name: lower | higher}: which way is better
      published*                  a list of {setting, source, better: {metric: lower | higher},
                                  rows: {row: {metric: number}}}: the paper's numbers and what they were measured on
    claims:                       a list of
      claim                       "metric(row) better than metric(row) by margin"; the margin is in the metric's unit,
                                  or a percentage of the second value; a negative one allows to be worse by that much
      table, says, source         the table's name; the claim in the paper's terms; where the paper makes it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filtrun.errors import UserError, closest

SCALES = ("smoke", "laptop", "paper")
DIRECTIONS = ("lower", "higher")
_CLAIM = re.compile(
    r"(?P<metric>[a-z]+/[a-z0-9_@]+)\((?P<better>[\w.-]+)\) better than "
    r"(?P<same>[a-z]+/[a-z0-9_@]+)\((?P<than>[\w.-]+)\) by (?P<margin>-?\d+(?:\.\d+)?)(?P<percent> ?%)?"
)


@dataclass(frozen=True)
class Cell:
    """One run of a table: its row, its seed and the overrides that make it."""

    row: str
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """How a table is run at one scale: the seeds of every row, and overrides shared by all rows."""

    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """Numbers as the paper gives them: `rows` maps a row's name to {metric: number}."""

    setting: str
    source: str
    better: dict[str, str]
    rows: dict[str, dict[str, float]]


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

    def cells(self, scale: str) -> list[Cell]:
        """The runs at one scale, row by row; empty when the table has no such scale."""
        if scale not in self.scales:
            return []
        how = self.scales[scale]
        return [
            Cell(row, seed, (*how.overrides, *overrides, f"scale={scale}", f"seed={seed}"))
            for row, overrides in self.rows.items()
            for seed in how.seeds
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

    def table(self, name: str) -> Table:
        """The table of that name."""
        return next(t for t in self.tables if t.name == name)


def make_card(slug: str, values: Any) -> Card:
    """A checked card from what its YAML holds. Raises UserError naming the file and the key that is wrong."""
    node = _Node(values, f"paper/{slug}.yaml")
    tables = tuple(_table(item) for item in node.items("tables"))
    if len({t.name for t in tables}) != len(tables):
        raise node.error("tables", "has two tables of one name")
    claims = tuple(_claim(item, {t.name: t for t in tables}) for item in node.items("claims"))
    made = Card(
        slug=slug, title=node.text("title"), link=node.text("link"), year=node.number("year"),
        family=node.text("family"), abstract=" ".join(node.text("abstract").split()), venue=node.text("venue", ""),
        methods=node.texts("methods", [slug]), tables=tables, claims=claims,
    )  # fmt: skip
    if not made.link.startswith("https://"):
        raise node.error("link", "must start with https://")
    node.done()
    return made


@dataclass
class _Node:
    """A mapping of a card that remembers which keys were read and where it is."""

    values: Any
    where: str
    read: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise UserError(f"{self.where} must be a mapping of keys, not {self.values!r}")

    def error(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.where}: {key} {problem}")

    def get(self, key: str, kind: type | tuple[type, ...], wanted: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.values.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(key, f"must be {wanted}, not {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self.get(key, str, "text", default)

    def number(self, key: str) -> int:
        return self.get(key, int, "a whole number")

    def texts(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        found = self.get(key, list, "a list of texts", default)
        if not all(isinstance(item, str) for item in found):
            raise self.error(key, f"must be a list of texts, not {found!r}")
        return tuple(found)

    def items(self, key: str, default: list[Any] | None = None) -> list[_Node]:
        found = self.get(key, list, "a list", default)
        return [_Node(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(found)]

    def nodes(self, key: str) -> dict[str, _Node]:
        found = self.get(key, dict, "a mapping")
        return {str(name): _Node(item, f"{self.where}: {key}.{name}") for name, item in found.items()}

    def directions(self, key: str) -> dict[str, str]:
        found = self.get(key, dict, "a mapping of metrics to lower or higher")
        for name, better in found.items():
            if better not in DIRECTIONS:
                raise self.error(f"{key}.{name}", f"must be lower or higher, not {better!r}")
        return dict(found)

    def done(self) -> None:
        """Raise UserError when there is a key that nothing reads."""
        for key in self.values:
            if key not in self.read:
                raise self.error(str(key), f"is no key of a card{closest(key, self.read)}")


def _table(node: _Node) -> Table:
    rows = node.get("rows", dict, "a mapping of rows to overrides")
    overrides = _Node(rows, f"{node.where}: rows")
    scales = {}
    for name, inner in node.nodes("scales").items():
        if name not in SCALES:
            raise node.error("scales", f"has {name!r}; choose from {', '.join(SCALES)}{closest(name, SCALES)}")
        seeds = inner.get("seeds", list, "a list of whole numbers")
        if not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
            raise inner.error("seeds", f"must be a list of whole numbers, not {seeds!r}")
        scales[name] = Scale(tuple(seeds), inner.texts("overrides", []))
        inner.done()
    made = Table(
        name=node.text("name"), title=node.text("title"), setting=node.text("setting"),
        rows={str(row): overrides.texts(row) for row in rows}, scales=scales, metrics=node.directions("metrics"),
        published=tuple(_published(item) for item in node.items("published", [])),
    )  # fmt: skip
    node.done()
    return made


def _published(node: _Node) -> Published:
    better, rows = node.directions("better"), {}
    for row, inner in node.nodes("rows").items():
        for name in inner.values:
            inner.get(name, (int, float), "a number")
            if name not in better:
                raise inner.error(str(name), f"has no direction in better{closest(name, better)}")
        rows[row] = {str(name): float(value) for name, value in inner.values.items()}
    made = Published(node.text("setting"), node.text("source"), better, rows)
    node.done()
    return made


def _claim(node: _Node, tables: Mapping[str, Table]) -> Claim:
    text, name = node.text("claim"), node.text("table")
    found = _CLAIM.fullmatch(text)
    if found is None or found["metric"] != found["same"]:
        raise node.error("claim", f"must read 'metric(row) better than metric(row) by margin', not {text!r}")
    if name not in tables:
        raise node.error("table", f"names no table {name!r}{closest(name, tables)}")
    for row in (found["better"], found["than"]):
        if row not in tables[name].rows:
            raise node.error("claim", f"names no row {row!r} of the table{closest(row, tables[name].rows)}")
    metric = found["metric"]
    if metric not in tables[name].metrics:
        raise node.error("claim", f"names no metric {metric!r} of the table{closest(metric, tables[name].metrics)}")
    margin = float(found["margin"]) / (100 if found["percent"] else 1)
    made = Claim(
        text, metric, found["better"], found["than"], margin, bool(found["percent"]), name,
        node.text("says"), node.text("source"),
    )  # fmt: skip
    node.done()
    return made


def read_card(path: Path) -> Card:
    """The card in a YAML file. Raises UserError when it cannot be read or is not as it should be."""
    from filtrun.config_file import read_yaml

    return make_card(path.stem, read_yaml(path))
