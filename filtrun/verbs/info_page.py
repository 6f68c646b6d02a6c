"""How ``filtrun info`` lays an entry out on a terminal."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from filtrun.listed import PLANNED
from filtrun.report.units import aligned, plain
from filtrun.verbs import terminal
from filtrun.verbs.info import measured_rows, readable

_KINDS = {"methods": "method", "models": "model", "data": "data set", "tasks": "task", "papers": "paper"}

_TRAINS = {"part": "a part of the parameters", "all": "all parameters", "nothing": "nothing"}


def show(found: list[dict[str, Any]]) -> None:
    """Print the details of entries, one after the other."""
    console = terminal()
    papers = {item["name"] for item in found if item["kind"] == "papers"}
    for position, item in enumerate(found):
        if position:
            console.rule(style="dim")
        if item["kind"] != "papers" and item.get("card", {}).get("slug") in papers:
            item = {key: value for key, value in item.items() if key not in ("card", "claims")}  # comes with the paper
        _Page(console, item).print()


class _Page:
    """One entry; every part is left out where there is nothing to say."""

    def __init__(self, console: Console, item: dict[str, Any]) -> None:
        self.console, self.item = console, item

    def print(self) -> None:
        item = self.item
        kind = _KINDS.get(item["kind"], item["kind"].removesuffix("s"))
        self.line(f"{item['name']} ({kind})" if item["name"] != kind else kind, style="bold")
        self.line(item.get("notes") or item["summary"])
        if item["status"] == PLANNED:
            self.line(f"Planned, not implemented. It claims: {item['claim']}", before=True)
        self.line(item.get("doc", ""), before=True)
        self.line(item.get("background", ""), before=True)
        self.facts()
        self.options()
        self.metrics()
        self.card()
        self.own_claims()

    def line(self, text: str, *, style: str = "", before: bool = False, indent: int = 0) -> None:
        if text:
            if before:
                self.console.print()
            self.console.print(Padding(Text(plain(readable(text)), style=style), (0, 0, 0, indent)))

    def facts(self) -> None:
        item = self.item
        grid = Table.grid(padding=(0, 2))
        rows: dict[str, Any] = {"use": f"filtrun {item['use']}" if "use" in item else ""}
        paper = item.get("paper")
        if paper:
            title, year = paper["title"], paper["year"]
            title += f" ({year})" if year and str(year) not in title else ""
            rows |= {"paper": title, "link": paper["link"]}
        rows |= {"family": item.get("family"), "status": item["status"]}
        rows |= {"works with": ", ".join(f"task={t}" for t in item.get("tasks", ()))}
        if item["kind"] == "tasks":
            rows.pop("works with")
        chosen = [f"{group}={name}" for group, name in item.get("picks", {}).items()]
        rows["also chooses"] = ", ".join(chosen)
        rows["also sets"] = ", ".join(_flat(item.get("sets", {})))
        rows |= {title: _TRAINS.get(value, _value(value)) for title, value in item.get("facts", {}).items()}
        rows |= {"hooks": ", ".join(item.get("hooks", ())), "code": item.get("target"), "config": item["file"]}
        for title, value in rows.items():
            if value:
                grid.add_row(Text(title, style="dim"), Text(plain(value), overflow="fold"))
        self.console.print()
        self.console.print(grid)

    def options(self) -> None:
        options = self.item.get("options", ())
        if not options:
            return
        places = list(dict.fromkeys(o["key"].rpartition(".")[0] for o in options))
        for place in places:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left", title_style="bold")
            table.title = f"Options, set as {place}.OPTION=VALUE"
            table.add_column("option", no_wrap=True)
            table.add_column("default", overflow="fold", max_width=16)
            table.add_column("allowed", overflow="fold", max_width=22)
            table.add_column("meaning", overflow="fold")
            for option in (o for o in options if o["key"].rpartition(".")[0] == place):
                meaning = option["meaning"] + (f" [{option['source']}]" if option["source"] else "")
                default = "(must be set)" if option["required"] else _value(option["default"])
                name = option["key"].rpartition(".")[2]
                table.add_row(*(Text(plain(cell)) for cell in (name, default, option["allowed"], meaning)))
            self.console.print()
            self.console.print(table)
        if self.item["kind"] == "methods":
            self.line("In brackets: where the default or the range is from; without, it is a choice of this program.")

    def metrics(self) -> None:
        described = self.item.get("metrics", {})
        if not described:
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Metrics", title_justify="left", title_style="bold")
        for column in ("name", "shown as", "better", "meaning"):
            table.add_column(column, overflow="fold")
        for name, metric in described.items():
            table.add_row(*(Text(plain(c)) for c in (name, metric["title"], metric["better"], metric["meaning"])))
        self.console.print()
        self.console.print(table)

    def card(self) -> None:
        card = self.item.get("card")
        if not card:
            return
        self.line("What the paper claims", style="bold", before=True)
        self.line(card["abstract"], indent=2)
        for position, claim in enumerate(card["claims"]):
            self.line(f"- {claim['says']} [{claim['source']}]", indent=2)
            for verdict in (found[position] for found in card["verdicts"].values()):
                self.line(f"{verdict['verdict']} ({verdict['when']}): {verdict['evidence']}", indent=4)
            if not card["verdicts"]:
                self.line(f"tested as: {claim['text']}", indent=4)
        done = card["runs_done"]
        for table in card["tables"]:
            self.line(f"{table['title']}: {table['setting']}", style="bold", before=True)
            counts = {scale: n for scale, n in table["runs"].items() if scale in done}
            self.line("; ".join(f"{scale}: {done[scale]} of {n} runs done" for scale, n in counts.items()), indent=2)
            for row, overrides in table["rows"].items():
                self.line(f"{row}: {' '.join(overrides)}", indent=2)
            for measured in table["measured"]:
                self.console.print()
                self.console.print(_measured(table, measured))
            for published in table["published"]:
                self.console.print()
                self.console.print(_published(published))

    def own_claims(self) -> None:
        if self.item.get("card") and self.item["card"]["tables"]:
            return  # the card has the numbers in full
        for claim in self.item.get("claims", ()):
            self.line("Published: " + ", ".join(_flat(claim)) if isinstance(claim, dict) else str(claim), before=True)


def _measured(table: dict[str, Any], measured: dict[str, Any]) -> Table:
    titles, rows = measured_rows(table, measured)
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", title_style="")
    seeds = ", ".join(map(str, measured["seeds"]))
    note = f"; {measured['note']}" if measured["note"] else ""
    made.title = Text(
        plain(f"Measured at {measured['scale']} scale, seeds {seeds}, {measured['date']}, {measured['device']}{note}")
    )
    made.add_column("")
    for title in titles:
        made.add_column(Text(title), justify="right", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def _published(published: dict[str, Any]) -> Table:
    better = published["better"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", title_style="")
    table.title = Text(f"Published: {published['setting']} [{published['source']}]")
    table.add_column("")
    for name, direction in better.items():
        table.add_column(Text(f"{name}, {direction} better"), justify="right", overflow="fold")
    rows = published["rows"]
    columns = [aligned([values.get(name) for values in rows.values()]) for name in better]
    for row, cells in zip(rows, zip(*columns, strict=True), strict=True):
        table.add_row(Text(row), *map(Text, cells))
    return table


def _value(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str).replace(", ", ",")


def _flat(values: dict[str, Any], before: str = "") -> list[str]:
    parts = []
    for key, value in values.items():
        if isinstance(value, dict):
            parts += _flat(value, f"{before}{key}.")
        else:
            parts.append(f"{before}{key}={_value(value)}")
    return parts
