"""Claims judged by paired differences over seeds: a verdict, and how sure one can be of it.

A verdict is about the mean: the claim *holds* when the better row beats the other by the margin on average over the
seeds. Three seeds cannot make a p-value small, so beside it stand the confidence interval of the mean difference, the
effect size, a sign-flip permutation test and the paired t-test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from filtrun.report.card_parts import Card, Claim
from filtrun.report.statistics import Paired, paired

HOLDS, FAILS, NOT_RUN = "holds", "does not hold", "not run"
REAL_SCALES = ("paper", "laptop")
"""The scales at which numbers mean something, the more telling one first."""


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    `better` and `than` are the rows' values by seed, `gain` the paired gains of the better row, in the metric's unit
    and before the margin; `beyond` the same with the margin taken off, which is what the verdict is about.
    """

    claim: Claim
    verdict: str
    better: dict[int, float]
    than: dict[int, float]
    gain: Paired | None = None
    beyond: Paired | None = None
    note: str = ""

    @property
    def sure(self) -> bool | None:
        """Whether the confidence interval lies on one side of the margin; None when there is no interval."""
        if self.beyond is None or self.beyond.low is None or self.beyond.high is None:
            return None
        return self.beyond.low > 0 or self.beyond.high < 0


def judge(
    claim: Claim, direction: str, better: Mapping[int, float], than: Mapping[int, float], seeds: Sequence[int]
) -> Verdict:
    """Judge a claim.

    Args:
        direction: lower or higher, which is better of the claim's metric.
        better, than: the metric of the two rows by seed.
        seeds: those it is to be judged by; the verdict is "not run" while one of them is missing.
    """
    ours, theirs = ({s: v for s, v in values.items() if s in seeds} for values in (better, than))
    common = [s for s in seeds if s in ours and s in theirs]
    if len(common) < len(seeds) or not seeds:
        done = f"{len(common)} of {len(seeds)} seeds" if common else ""
        return Verdict(claim, NOT_RUN, ours, theirs, note=done)
    sign = 1.0 if direction == "higher" else -1.0
    gains = [sign * (ours[s] - theirs[s]) for s in common]
    margins = [claim.margin * abs(theirs[s]) if claim.relative else claim.margin for s in common]
    beyond = paired([g - m for g, m in zip(gains, margins, strict=True)])
    # "better by 0" asks for more than a draw; "by 0.5" and "by -0.2" (at most 0.2 worse) are met by what they name
    holds = beyond.mean > 0 if claim.margin == 0 else beyond.mean >= -1e-12
    return Verdict(claim, HOLDS if holds else FAILS, ours, theirs, paired(gains), beyond)


def judge_card(card: Card, scale: str) -> list[Verdict]:
    """The verdicts of a card's claims by the numbers in it."""
    verdicts = []
    for claim in card.claims:
        table = card.table(claim.table)
        found = table.measured_at(scale)
        better, than = (found.values(row, claim.metric) if found else {} for row in (claim.better, claim.than))
        verdicts.append(judge(claim, table.metrics[claim.metric], better, than, found.seeds if found else ()))
    return verdicts


def measured_scale(card: Card) -> str | None:
    """The most telling scale at which a claim of the card can be judged by the numbers in it."""
    return next((s for s in REAL_SCALES if any(v.verdict != NOT_RUN for v in judge_card(card, s))), None)


def count_verdicts(verdicts: Sequence[Verdict]) -> str:
    """``2/2``, ``1/2``, ``0/2, 1 not run``: how many hold; ``-`` when nothing is claimed."""
    if not verdicts:
        return "-"
    held, unknown = (sum(v.verdict == kind for v in verdicts) for kind in (HOLDS, NOT_RUN))
    return f"{held}/{len(verdicts)}" + (f", {unknown} not run" if unknown else "")


def verdict_data(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values."""
    claim, gain, beyond = verdict.claim, verdict.gain, verdict.beyond
    made: dict[str, Any] = {
        "claim": claim.text, "says": claim.says, "source": claim.source, "table": claim.table,
        "verdict": verdict.verdict, "better": verdict.better, "than": verdict.than,
    }  # fmt: skip
    if gain is None or beyond is None:
        return made
    return made | {
        "mean_gain": gain.mean, "ci95": None if gain.low is None else [gain.low, gain.high], "wins": gain.wins,
        "effect_size": gain.effect, "margin": claim.margin, "relative": claim.relative,
        "mean_beyond_margin": beyond.mean, "p_sign_flip": beyond.p, "least_p": beyond.least_p, "p_t": beyond.t_p,
        "sure": verdict.sure,
    }  # fmt: skip
