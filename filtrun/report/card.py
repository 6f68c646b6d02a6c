"""Paper cards (``conf/paper/<slug>.yaml``): what a paper says, the runs that test it, and the claims to judge.

A card is a mapping with these keys; those marked * may be left out:

    title, link, year, family     the paper; `family` is the package of its method (peft, pruning, ...)
    venue*, abstract              where it appeared; what it claims, in our words
    methods*                      the configs of conf/method that are the paper's own (default: the card's name)
    tuning*                       how the options of the rows were chosen, and whether all had the same effort
    gallery*                      {table*, row*, metric*, baseline*}: the paper's line in the table of all papers
                                  (default: the first table, its row named like the card or first row, its first
                                  metric, the first other row)
    tables:                       a list of
      name, title, setting        `setting` says in one line what is trained on what
      rows                        {row: [override, ...]}: what is compared
      scales                      {smoke | laptop | paper: {seeds: [int, ...], overrides*: [override, ...],
                                  rows*: {row: [override, ...]}}}; `rows` adds to single rows at this scale only
      metrics                     {split/name: lower | higher}: which way is better; besides the metrics of a run,
                                  cost/NAME and report/NAME are what its record holds under cost and report
      tuning*                     as above, for this table
      published*                  a list of {setting, source, better: {metric: lower | higher},
                                  rows: {row: {metric: number}}, same*: [scale, ...]}: the paper's numbers, what they
                                  were measured on, and the scales of this table whose setting is the same
      measured*                   a list of {scale, date, device, seeds: [int, ...], note*,
                                  rows: {row: {metric: [value per seed, ...]}}}: what was measured here, written by
                                  `filtrun table PAPER --write-card`
    claims:                       a list of
      claim                       "metric(row) better than metric(row) by margin"; the margin is in the metric's unit,
                                  or a percentage of the second value; a negative one allows to be worse by that much
      table, says, source         the table's name; the claim in the paper's terms; where the paper makes it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import closest
from filtrun.report.card_parts import (
    SCALES,
    Card,
    Cell,
    Claim,
    GalleryCell,
    Measured,
    Published,
    Scale,
    Table,
)  # fmt: skip
from filtrun.report.node import Node

__all__ = ["SCALES", "Card", "Cell", "Claim", "GalleryCell", "Measured", "Published", "Scale", "Table", "make_card",
           "read_card"]  # fmt: skip

_CLAIM = re.compile(
    r"(?P<metric>[a-z]+/[a-z0-9_@]+)\((?P<better>[\w.-]+)\) better than "
    r"(?P<same>[a-z]+/[a-z0-9_@]+)\((?P<than>[\w.-]+)\) by (?P<margin>-?\d+(?:\.\d+)?)(?P<percent> ?%)?"
)


def make_card(slug: str, values: Any) -> Card:
    """A checked card from what its YAML holds. Raises UserError naming the file and the key that is wrong."""
    node = Node(values, f"paper/{slug}.yaml")
    tables = tuple(_table(item) for item in node.items("tables"))
    if len({t.name for t in tables}) != len(tables):
        raise node.error("tables", "has two tables of one name")
    claims = tuple(_claim(item, {t.name: t for t in tables}) for item in node.items("claims"))
    made = Card(
        slug=slug, title=node.text("title"), link=node.text("link"), year=node.number("year"),
        family=node.text("family"), abstract=" ".join(node.text("abstract").split()), venue=node.text("venue", ""),
        methods=node.texts("methods", [slug]), tables=tables, claims=claims, tuning=_line(node, "tuning"),
        gallery=_gallery(node, slug, tables),
    )  # fmt: skip
    if not made.link.startswith("https://"):
        raise node.error("link", "must start with https://")
    node.done()
    return made


def _table(node: Node) -> Table:
    rows = node.get("rows", dict, "a mapping of rows to overrides")
    overrides = Node(rows, f"{node.where}: rows")
    scales = {}
    for name, inner in node.nodes("scales").items():
        if name not in SCALES:
            raise node.error("scales", f"has {name!r}; choose from {', '.join(SCALES)}{closest(name, SCALES)}")
        own = Node(inner.get("rows", dict, "a mapping of rows to overrides", {}), f"{inner.where}: rows")
        for row in own.values:
            if row not in rows:
                raise inner.error("rows", f"names no row {row!r} of the table{closest(row, rows)}")
        more = {str(row): own.texts(row) for row in own.values}
        scales[name] = Scale(inner.seeds("seeds"), inner.texts("overrides", []), more)
        inner.done()
    if not rows:
        raise node.error("rows", "is empty")
    made_rows, metrics = {str(row): overrides.texts(row) for row in rows}, node.directions("metrics")
    measured = tuple(_measured(item, scales, made_rows, metrics) for item in node.items("measured", []))
    if len({m.scale for m in measured}) != len(measured):
        raise node.error("measured", "has two entries of one scale")
    made = Table(
        name=node.text("name"), title=node.text("title"), setting=node.text("setting"), rows=made_rows, scales=scales,
        metrics=metrics, published=tuple(_published(item) for item in node.items("published", [])), measured=measured,
        tuning=_line(node, "tuning"),
    )  # fmt: skip
    node.done()
    return made


def _line(node: Node, key: str) -> str:
    return " ".join(node.text(key, "").split())


def _measured(node: Node, scales: Iterable[str], rows: Iterable[str], metrics: Iterable[str]) -> Measured:
    import datetime

    date = node.get("date", (str, datetime.date), "a date such as 2026-01-31")
    seeds = node.seeds("seeds")
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for row, inner in node.nodes("rows").items():
        if row not in rows:
            raise node.error("rows", f"names no row {row!r} of the table{closest(row, rows)}")
        found[row] = {}
        for name in inner.values:
            values = inner.get(name, list, "a list of numbers")
            if name not in metrics:
                raise inner.error(str(name), f"is no metric of the table{closest(name, metrics)}")
            if len(values) != len(seeds) or not all(type(v) in (int, float) for v in values):
                raise inner.error(str(name), f"must hold {len(seeds)} numbers, one for each seed, not {values!r}")
            found[row][str(name)] = tuple(map(float, values))
    scale = node.name_of("scale", "scale of the table", scales)
    made = Measured(scale, str(date), node.text("device"), seeds, found, _line(node, "note"))
    node.done()
    return made


def _gallery(node: Node, slug: str, tables: Sequence[Table]) -> GalleryCell | None:
    if not tables:
        return None
    inner = Node(node.get("gallery", dict, "a mapping", {}), f"{node.where}: gallery")
    name = inner.name_of("table", "table", [t.name for t in tables], tables[0].name)
    table = next(t for t in tables if t.name == name)
    row = inner.name_of("row", "row of the table", table.rows, slug if slug in table.rows else next(iter(table.rows)))
    metric = inner.name_of("metric", "metric of the table", table.metrics, next(iter(table.metrics), ""))
    other = next((r for r in table.rows if r != row), row)
    made = GalleryCell(name, row, metric, inner.name_of("baseline", "row of the table", table.rows, other))
    inner.done()
    return made


def _published(node: Node) -> Published:
    better, rows = node.directions("better"), {}
    for row, inner in node.nodes("rows").items():
        for name in inner.values:
            inner.get(name, (int, float), "a number")
            if name not in better:
                raise inner.error(str(name), f"has no direction in better{closest(name, better)}")
        rows[row] = {str(name): float(value) for name, value in inner.values.items()}
    same = node.texts("same", [])
    for scale in same:
        if scale not in SCALES:
            raise node.error("same", f"has {scale!r}; choose from {', '.join(SCALES)}{closest(scale, SCALES)}")
    made = Published(node.text("setting"), node.text("source"), better, rows, same)
    node.done()
    return made


def _claim(node: Node, tables: Mapping[str, Table]) -> Claim:
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
