"""Sheets as Markdown, LaTeX (booktabs) and HTML; `filtrun.report.terminal` lays them out for a terminal."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from itertools import groupby

from filtrun.report.sheet import BEST, SECOND, Box, Column, Sheet

ARROWS = {"lower": "↓", "higher": "↑"}
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
    "×": r"$\times$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
STYLE = """\
:root { color-scheme: light dark }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: .8rem 0 }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text, th.text { text-align: left }
thead tr:last-child th { border-bottom: 1px solid; border-top: 0 }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 1px solid }
tbody th { font-weight: 400 }
p.small, ul { font-size: .9rem }
.second { text-decoration: underline }
"""


def heading(column: Column) -> str:
    """A column's title with the arrow that says which way is better."""
    return f"{column.title} {ARROWS.get(column.better, '')}".strip()


def groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """(name, number of columns) of columns that stand together; empty when none has a name."""
    found = [(name, len(list(members))) for name, members in groupby(columns, lambda c: c.group)]
    return found if any(name for name, _ in found) else []


def text_sections(sheet: Sheet) -> list[tuple[str, list[str]]]:
    """(title, lines) of what stands around a table, in order; sections without lines are left out."""
    sections = [
        ("", [*sheet.caption, *sheet.notes]),
        ("Claims", [f"{c.verdict}: {c.says}; {c.evidence}" for c in sheet.claims]),
        ("Mind", sheet.warnings),
        ("Not run", sheet.missing),
    ]
    return [(title, lines) for title, lines in sections if lines]


def markdown(sheets: Sequence[Sheet]) -> str:
    """GitHub Markdown: best bold, second underlined."""
    return "\n\n".join(_markdown(sheet) for sheet in sheets) + "\n"


def _markdown(sheet: Sheet) -> str:
    def escaped(text: str) -> str:
        return re.sub(r"([|<>*_`\[\]])", r"\\\1", text)

    def told(box: Box) -> str:
        text = escaped(box.text)
        return f"**{text}**" if box.mark == BEST else f"<u>{text}</u>" if box.mark == SECOND else text

    titles = [escaped(heading(c) + (f" ({c.group})" if c.group and len(groups(sheet.columns)) > 2 else ""))
              for c in sheet.columns]  # fmt: skip
    parts = [f"**{escaped(sheet.title)}**", ""]
    parts += [f"| {' | '.join(titles)} |", "|" + "|".join("---:" if c.number else "---" for c in sheet.columns) + "|"]
    parts += [f"| {' | '.join(map(told, row))} |" for row in sheet.rows]
    for title, lines in text_sections(sheet):
        parts += ["", *([f"{title}:", ""] if title else []), *(f"- {escaped(line)}" for line in lines)]
    return "\n".join(parts) + "".join("\n\n" + _markdown(each) for each in sheet.more)


def latex(sheets: Sequence[Sheet]) -> str:
    r"""LaTeX with booktabs: best ``\textbf``, second ``\underline``; the claims follow as comments."""
    return "\n\n".join(_latex(sheet) for sheet in sheets) + "\n"


def _latex(sheet: Sheet) -> str:
    def escaped(text: str) -> str:
        return "".join(LATEX.get(c, c) for c in text)

    def told(box: Box) -> str:
        text = escaped(box.text)
        return rf"\textbf{{{text}}}" if box.mark == BEST else rf"\underline{{{text}}}" if box.mark == SECOND else text

    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}", "\\centering"]
    words = [f"{line}." for line in (sheet.title, *sheet.caption, *sheet.notes, *sheet.warnings)]
    lines += [f"\\caption{{{escaped(' '.join(words))}}}"]
    lines += [f"\\begin{{tabular}}{{{''.join('r' if c.number else 'l' for c in sheet.columns)}}}", "\\toprule"]
    found = groups(sheet.columns)
    if len(found) > 1:
        lines.append(" & ".join(rf"\multicolumn{{{n}}}{{c}}{{{escaped(name)}}}" for name, n in found) + r" \\")
        ends = [sum(n for _, n in found[: i + 1]) for i in range(len(found))]
        rules = zip(found, ends, strict=True)
        lines.append(" ".join(rf"\cmidrule(lr){{{end - n + 1}-{end}}}" for (name, n), end in rules if name))
    lines += [" & ".join(escaped(heading(c)) for c in sheet.columns) + r" \\", "\\midrule"]
    lines += [" & ".join(map(told, row)) + r" \\" for row in sheet.rows]
    lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}"]
    for title, said in text_sections(sheet):
        lines += [f"% {title}: {line}" for line in said if title in ("Claims", "Not run")]
    return "\n".join(lines) + "".join("\n\n" + _latex(each) for each in sheet.more)


def page(sheets: Sequence[Sheet]) -> str:
    """One HTML page that needs nothing else; wide tables scroll."""
    title = html.escape(sheets[0].title if sheets else "filtrun")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(_section(sheet) for sheet in sheets)
    head += f"<style>\n{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _section(sheet: Sheet) -> str:
    escaped = html.escape

    def told(box: Box, column: Column, tag: str) -> str:
        text = escaped(box.text)
        text = f"<strong>{text}</strong>" if box.mark == BEST else text
        text = f'<span class="second">{text}</span>' if box.mark == SECOND else text
        kind = (' scope="row"' if tag == "th" else "") + ("" if column.number else ' class="text"')
        return f"<{tag}{kind}>{text}</{tag}>"

    found = groups(sheet.columns)
    head = ""
    if len(found) > 1:
        head = (
            "<tr>" + "".join(f'<th colspan="{n}" scope="colgroup">{escaped(name)}</th>' for name, n in found) + "</tr>"
        )
    head += "<tr>" + "".join(f'<th scope="col">{escaped(heading(c))}</th>' for c in sheet.columns) + "</tr>"
    rows = [
        "".join(told(box, c, "td" if i else "th") for i, (box, c) in enumerate(zip(row, sheet.columns, strict=True)))
        for row in sheet.rows
    ]
    table = f"<table><caption>{escaped(sheet.title)}</caption><thead>{head}</thead><tbody>\n"
    table += "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</tbody></table>"
    parts = [f'<div class="wide">{table}</div>']
    for title, lines in text_sections(sheet):
        items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
        parts.append((f'<p class="small">{escaped(title)}:</p>' if title else "") + f"<ul>{items}</ul>")
    return f"<section>{chr(10).join(parts)}</section>\n" + "\n".join(_section(each) for each in sheet.more)


FORMATS: dict[str, Callable[[Sequence[Sheet]], str]] = {"md": markdown, "latex": latex, "html": page}
