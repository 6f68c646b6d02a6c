"""Numbers for people: counts with separators, bytes, durations."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal


def count(value: float | None) -> str:
    """A whole number with thousands separators: ``31,482``; ``-`` for None."""
    return "-" if value is None else f"{value:,.0f}"


def aligned(values: Sequence[float | None]) -> list[str]:
    """Numbers of one column as they were given, up to six figures: thousands separators, and as many decimals for all
    as one of them has; ``-`` for None. Whole numbers have none: ``23,059,166``."""
    places = [Decimal(f"{v:.6g}").as_tuple().exponent for v in values if v is not None]
    digits = max((-place for place in places if isinstance(place, int)), default=0)
    return ["-" if v is None else f"{v:,.{max(0, digits)}f}" for v in values]


def size(value: float | None) -> str:
    """Bytes in decimal units: ``812 B``, ``53.1 KB``, ``2.0 GB``; ``-`` for None."""
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:.0f} B"
    for unit in ("KB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def duration(seconds: float | None) -> str:
    """Seconds as ``0.84 s``, ``12.3 s``, ``2 min 5 s`` or ``3 h 20 min``; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def short(seconds: float | None) -> str:
    """Seconds of something brief: ``0.42 ms``, ``12.3 ms``; from a second on as `duration`; ``-`` for None."""
    if seconds is None or seconds >= 1:
        return duration(seconds)
    return f"{seconds * 1000:.3g} ms"


def rate(value: float | None) -> str:
    """Something per second: three digits below 100, whole numbers above; ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def flops(value: float | None) -> str:
    """Floating-point operations: ``1.23 MFLOP``; ``-`` for None."""
    if value is None:
        return "-"
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TFLOP"


def metric(value: float | None, form: str = ".3f") -> str:
    """A metric by its format; ``-`` for None (not measured, or not finite); an unusable format gives ``.4g``."""
    if value is None:
        return "-"
    try:
        return format(value, form)
    except (ValueError, TypeError):
        return f"{value:.4g}"


def change(value: float | None, form: str = ".3f") -> str:
    """A difference with its sign; of percentages in percentage points (``+2.1 pts``)."""
    if value is None:
        return "-"
    if form.endswith("%"):
        return f"{metric(value * 100, '+' + form[:-1] + 'f')} pts"
    return metric(value, form if form.startswith("+") else f"+{form}")


def plain(text: object) -> str:
    """Text from a file, fit to print: control characters (a terminal would obey them) become ``?``."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in str(text))
