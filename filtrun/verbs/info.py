"""``filtrun info NAME``: what an entry does, its options with meaning and default, its paper and published numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from filtrun.catalogue import Entry, find
from filtrun.report.evidence import Claims
from filtrun.report.judge import REAL_SCALES, judge_card, verdict_data
from filtrun.source import Option, Source, describe, prose
from filtrun.syntax import module
from filtrun.verbs import Parser, print_json

_STRUCTURE = ("_target_", "needs", "claims", "tasks")
_MODEL_KEYS = {
    "base": ("BASES", "where the weights come from: trained here first, random, a file, or a hub"),
    "checkpoint": (None, "weights file (.safetensors, .pth), with base=checkpoint"),
    "normalize": ("NORMALIZE", "statistics that images are normalised with"),
}
"""Keys of a model that the runner reads itself -> (the constant of filtrun.plan with what is allowed, meaning)."""

_FACTS = {
    "trains": "trains",
    "identity_at_start": "output unchanged before training",
    "exact_finish": "output unchanged by finishing",
    "licence": "licence",
    "image_size": "image size",
    "channels": "channels",
}


def main(argv: Sequence[str]) -> int:
    """Explain every entry called NAME; returns the exit code. Raises UserError with the closest name."""
    parser = Parser("info", __doc__ or "")
    parser.add_argument("name", metavar="NAME", help="a method, model, data set, task, paper, or `trainer`")
    parser.add_json()
    parser.add_config_dir()
    options = parser.parse(argv)
    claims = Claims(options.config_dir)
    found = [details(entry, claims) for entry in find(options.name, options.config_dir)]
    if options.json:
        print_json(found)
    else:
        from filtrun.verbs.info_page import show

        show(found)
    return 0


def details(entry: Entry, claims: Claims) -> dict[str, Any]:
    """Everything known of an entry, as JSON values; keys that do not apply are left out."""
    source = entry.source
    card, paper = claims.card(entry), entry.paper
    made: dict[str, Any] = {
        "kind": entry.kind,
        "name": entry.name,
        "use": "" if entry.kind == "papers" else _use(entry),
        "summary": entry.summary,
        "status": claims.status(entry),
        "family": entry.family,
        "claim": entry.listed.claim if entry.listed else "",
        "file": str(entry.path),
        "notes": entry.header,
        "target": entry.target,
        "doc": prose(source.doc) if source else "",
        "background": prose(source.module_doc) if source and entry.kind == "methods" else "",
        "tasks": list(entry.tasks),
        "picks": entry.picks,
        "sets": entry.sets,
        "facts": _facts(source),
        "hooks": _hooks(source) if entry.kind == "methods" else [],
        "options": options_of(entry),
        "paper": paper._asdict() if paper else None,
        "metrics": _metrics(source) if entry.kind == "tasks" else {},
        "claims": [c for node in entry.nodes.values() for c in node.get("claims") or []],
    }
    if card is not None:
        made["card"] = _card(card, claims)
    return {key: value for key, value in made.items() if value not in ("", [], {}, None)}


def _use(entry: Entry) -> str:
    return "trainer.KEY=VALUE" if entry.kind == "trainer" else f"{entry.group}={entry.name}"


def options_of(entry: Entry) -> list[dict[str, Any]]:
    """The options of an entry: key, default (the config's value), meaning, what is allowed, and where it is from."""
    found = []
    for place, node in entry.nodes.items():
        source = entry.source if node is entry.node else _source(node)
        declared = dict(source.options) if source else {}
        keys = [k for k in declared if k in node] + [k for k in declared if k not in node]
        keys += [k for k in node if k not in declared and k not in _STRUCTURE]
        for key in keys:
            option = declared.get(key) or _undeclared(entry, key)
            found.append(
                {
                    "key": f"{place}.{key}",
                    "default": node[key] if key in node else option.default,
                    "required": option.required and key not in node,
                    "type": option.type,
                    "meaning": (option.help or entry.notes.get(key, "")).replace("``", ""),
                    "allowed": allowed(option),
                    "source": option.source,
                }
            )
    return found


def _source(node: dict[str, Any]) -> Source | None:
    return describe(str(node["_target_"])) if node.get("_target_") else None


def _undeclared(entry: Entry, key: str) -> Option:
    """A key the class does not declare: one the runner reads, or one that is passed on."""
    if entry.kind != "models" or key not in _MODEL_KEYS:
        return Option(key)
    constant, meaning = _MODEL_KEYS[key]
    plan = module("filtrun.plan")
    choices = plan.value(plan.constants[constant]) if plan and constant else None
    return Option(key, help=meaning, choices=choices)


def allowed(option: Option) -> str:
    """What an option may be: its choices, its interval, or its type."""
    if option.choices is not None:
        return ", ".join("true" if c is True else "false" if c is False else str(c) for c in option.choices)
    kind = option.type.replace("str", "text").replace("None", "null")
    low, high = option.low, option.high
    if low is not None and high is not None:
        return f"{low} to {high}" + (" or null" if "null" in kind else "")
    if low is not None or high is not None:
        bound = f">= {low}" if low is not None else f"<= {high}"
        return bound + (" or null" if "null" in kind else "")
    return "" if kind == "Any" else kind.replace(" | ", " or ")


def _facts(source: Source | None) -> dict[str, Any]:
    if source is None:
        return {}
    facts = {title: source.facts[key] for key, title in _FACTS.items() if source.facts.get(key) not in (None, "", 0)}
    classes = source.facts.get("classes")
    if isinstance(classes, (tuple, list)) and classes:
        facts["classes"] = len(classes)
    return facts


def _hooks(source: Source | None) -> list[str]:
    """The hooks a method overrides, in the order the runner calls them."""
    base = module("filtrun.method")
    if source is None or base is None:
        return []
    hooks = base.value(base.constants["HOOKS"])
    return [hook for hook in hooks if source.origin.get(hook, "filtrun.method.Method") != "filtrun.method.Method"]


def _metrics(source: Source | None) -> dict[str, dict[str, str]]:
    found = source.facts.get("metrics") if source else None
    described = found if isinstance(found, dict) else {}
    return {str(name): m._asdict() for name, m in described.items() if hasattr(m, "_asdict")}


def _card(card: Any, claims: Claims) -> dict[str, Any]:
    import dataclasses

    values = dataclasses.asdict(card)
    for table, made in zip(card.tables, values["tables"], strict=True):
        made["runs"] = {scale: len(table.cells(scale)) for scale in table.scales}
    scales = [s for s in REAL_SCALES if any(t.measured_at(s) for t in card.tables)]
    values["verdicts"] = {scale: _verdicts(card, scale) for scale in scales}
    values["runs_done"] = {scale: claims.runs(card, scale)[0] for scale in ("laptop", "paper")}
    return values


def _verdicts(card: Any, scale: str) -> list[dict[str, Any]]:
    """The verdicts of a card's claims by the numbers in it, with what each rests on as a sentence."""
    from filtrun.report.sheet import Number, evidence

    found = []
    for verdict in judge_card(card, scale):
        facts = _described(card.table(verdict.claim.table).metrics)
        numbers = {verdict.claim.metric: Number.of(verdict.claim.metric, facts)}
        measured = card.table(verdict.claim.table).measured_at(scale)
        when = f"{scale}, {len(measured.seeds)} seeds, {measured.date}" if measured else scale
        found.append(verdict_data(verdict) | {"when": when, "evidence": evidence(verdict, numbers)})
    return found


def _described(metrics: Iterable[str]) -> dict[str, Any]:
    """What the task that measures most of the metrics says of them: a card does not name its task."""
    from filtrun.catalogue import entries
    from filtrun.report.sheet import metric_facts

    names = {metric.partition("/")[2] for metric in metrics}
    return max((metric_facts([e.target]) for e in entries("tasks")), key=lambda facts: len(names & set(facts)))


def measured_rows(table: dict[str, Any], measured: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(column titles, rows) of what a card says was measured: mean ± standard deviation over the seeds."""
    from filtrun.report.sheet import Number

    facts = _described(table["metrics"])
    metrics = [m for m in table["metrics"] if any(m in values for values in measured["rows"].values())]
    numbers = {metric: Number.of(metric, facts) for metric in metrics}
    titles = [f"{numbers[m].title}, {table['metrics'][m]} better" for m in metrics]
    rows = [[row, *(numbers[m].values(values.get(m, ())) for m in metrics)] for row, values in measured["rows"].items()]
    return titles, rows


def readable(text: str) -> str:
    """A docstring or comment for the terminal: wrapped lines joined, no double backquotes, no doctest directives."""
    lines: list[str] = []
    wrapped = False
    for line in re.sub(r"[ \t]*# doctest:.*", "", text).replace("``", "`").split("\n"):
        starts = re.match(r"\s*(- |\* |\d+\. |>>> |\.\.\. |$)|    ", line)
        if wrapped and not starts:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
        wrapped = len(line) > 75  # a shorter line ends where its author wanted
    return "\n".join(lines)
