"""What a person sees while a run runs: stage lines and a progress bar, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(quiet: bool) -> Iterator[tuple[Any, Callable[[str], None]]]:
    """(progress bar or None, function that prints a line above it)."""
    if quiet:
        yield None, lambda line: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description:>10}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s"), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    bar = Named(Progress(*columns, console=console))
    try:
        yield bar, lambda line: console.print(f"[dim]{line}[/dim]")
    finally:
        bar.bar.stop()


class Named:
    """A rich progress bar that appears with its first task; tasks start with empty fields."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def add_task(self, label: str, total: int) -> Any:
        """A new line of the bar."""
        self.bar.start()
        return self.bar.add_task(label, total=total, loss="-", rate="-")

    def update(self, task: Any, **fields: Any) -> None:
        """New values for a line."""
        self.bar.update(task, **fields)
