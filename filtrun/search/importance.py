"""How much each searched key matters, by PED-ANOVA (Watanabe, Bansal, Hutter 2023; Optuna's evaluator)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LEAST = 10
"""Complete trials below which shares would be noise."""


def importance(optuna: Any, study: Any, keys: Sequence[str]) -> tuple[dict[str, float] | None, str]:
    """({key: share, together 1}, "") with the greatest first, or (None, why there are none)."""
    complete = (optuna.trial.TrialState.COMPLETE,)
    trials = study.get_trials(deepcopy=False, states=complete)
    if len(keys) < 2:
        return None, "only one key is searched"
    if len(trials) < LEAST:
        return None, f"{len(trials)} of at least {LEAST} complete trials"
    if len({t.value for t in trials}) == 1:
        return None, "all complete trials have the same value"
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError) as error:
        return None, str(error).partition("\n")[0]
    if not all(math.isfinite(v) for v in found.values()):
        return None, "it cannot be told apart from these trials"
    return {key: float(value) for key, value in found.items()}, ""
