"""The commands beside a run: ``filtrun VERB ...``; each module has ``main(argv) -> exit code``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from filtrun.errors import UserError, closest

if TYPE_CHECKING:
    from rich.console import Console


class Parser(argparse.ArgumentParser):
    """Arguments of a verb; what is wrong with them is a UserError with the closest option."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"filtrun {verb}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}\n{self.format_usage().strip()}")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; raise UserError for anything that is not an option."""
        options, rest = self.parse_known_args(list(argv))
        if rest:
            known = [name for action in self._actions for name in action.option_strings]
            raise UserError(f"{self.prog}: {rest[0]} is no option{closest(rest[0].partition('=')[0], known)}")
        return options

    def add_json(self) -> None:
        """Add ``--json``."""
        self.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else")

    def add_config_dir(self) -> None:
        """Add ``--config-dir``, which may be given several times."""
        self.add_argument(
            "--config-dir", action="append", default=[], metavar="DIR", help="a folder of your own configs"
        )


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout; what JSON has no form for is printed as text."""
    json.dump(value, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


def terminal() -> Console:
    """The console a verb prints on; a character its encoding lacks becomes ``?``."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(ValueError, OSError):
            sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)
