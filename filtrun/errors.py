"""The ways a command ends badly, and the near-match hint that goes with the first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: exit code 2, one clear message, no traceback."""

    exit_code = 2


class Unfit(UserError):
    """Parts that do not go together: a method on a model it cannot edit, say. A sweep skips such a cell."""


class RunFailure(Exception):
    """A run that could not finish (NaN loss, no memory, no disk space): exit code 1."""

    exit_code = 1


class Busy(UserError):
    """Another process is at work in the folder: later it may be free, or the run done."""


class Interrupted(RunFailure):
    """Ctrl-C, or a scheduler that ends the job: the run can go on later."""


class Stopped(RunFailure):
    """A search has seen enough of the run: its intermediate results are worse than those of others."""


def closest(word: object, options: Iterable[object]) -> str:
    """Return ``"; did you mean 'x'?"`` for the option nearest to `word`, else an empty string."""
    names = {str(option).casefold(): str(option) for option in sorted(options, key=str)}
    wanted = str(word).casefold()
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.55)
    if not near:  # a name cut short is a frequent slip that the ratio misses
        near = [name for name in names if wanted and name.startswith(wanted)][:1]
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def unknown(what: str, word: object, options: Iterable[object]) -> UserError:
    """Build the error for a name that is not among `options`: names it, the closest and all of them."""
    names = sorted({str(option) for option in options})
    return UserError(f"unknown {what} {str(word)!r}{closest(word, names)}\nallowed: {', '.join(names) or '(none)'}")
