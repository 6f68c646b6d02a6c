"""The conformance suite: what every method must keep, whatever its paper, checked on tiny models in seconds.

>>> for check in conform("sara"):  # doctest: +SKIP
...     print(check)

It knows methods by their name in the configuration (also a user's own, with `config_dir` and ``trust=[package]``) or as
a callable that makes one. Each check passes, fails with a reason, or is skipped with a reason.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from filtrun import conformance_checks as checks
from filtrun import runner
from filtrun.bench_run import ANY, IMAGE_SETTINGS, SETTINGS, BenchRun, tiny
from filtrun.conformance_checks import Failed, Skip
from filtrun.conformance_waits import steps_do_not_wait
from filtrun.errors import Unfit, UserError
from filtrun.method import Method


@dataclass(frozen=True)
class Check:
    """One result: `status` is passed, failed or skipped; `setting` the task and model, or empty where it needs none."""

    name: str
    setting: str
    status: str
    reason: str = ""
    seconds: float = 0.0


MODEL_CHECKS: dict[str, Callable[[BenchRun], None]] = {
    "trains only what it says": checks.trains_what_it_says,
    "identity at start": checks.identity_at_start,
    "exact finish": checks.exact_finish,
    "delta reloads": checks.delta_reloads,
    "stated numbers": checks.numbers_are_stated_exactly,
    "finite in fp32": lambda bench: checks.finite(bench, "32"),
    "finite in bf16": lambda bench: checks.finite(bench, "bf16"),
    "works under no_grad": checks.works_without_gradients,
    "resumes": checks.resumes,
    "gradient accumulation": checks.accumulates,
    "steps do not wait": steps_do_not_wait,
}


def conform(
    method: str | Callable[[], Method],
    *overrides: str,
    ddp: bool = True,
    config_dir: Path | str | None = None,
) -> list[Check]:
    """Run the suite on one method, in every tiny setting of the tasks it works with.

    Args:
        method: its name in the configuration, or a callable without arguments that makes one.
        overrides: further configuration; with ``model=`` or ``task=`` among them only that setting is used.
        ddp: also train on two processes (some seconds).
        config_dir: folder with the user's own configurations.

    Raises:
        UserError: there is no such method, or the overrides are wrong.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return list(_suite(method, list(overrides), Path(scratch), ddp, Path(config_dir) if config_dir else None))
    finally:
        torch.set_num_threads(threads)


def _suite(
    method: str | Callable[[], Method], overrides: list[str], folder: Path, ddp: bool, config_dir: Path | None
) -> Iterator[Check]:
    made, node, trust, kinds, picked = _described(method, overrides, config_dir)
    yield _result("names its source", "", checks.names_its_source, made)
    yield _result("refuses bad options", "", checks.refuses_bad_options, made, node, trust)
    settings = _settings(node, kinds, picked, overrides)
    if not settings:
        for kind in kinds:
            yield Check("composes", kind, "skipped", f"no tiny setting for task={kind}; name one with model=")
    twice = not ddp
    for words in settings:
        try:
            started = time.perf_counter()
            bench = BenchRun(method, words, folder, config_dir)
            runner.setup(bench.fresh())
        except Unfit as error:
            yield Check("composes", " ".join(words[:1]), "skipped", str(error))
            continue
        except Exception as error:
            setting = " ".join(words[:1])
            yield Check("composes", setting, "failed", _told(error), time.perf_counter() - started)
            continue
        yield Check("composes", bench.name, "passed", "", time.perf_counter() - started)
        for name, check in MODEL_CHECKS.items():
            yield _result(name, bench.name, check, bench)
        if not twice and not bench.has_batch_norm:
            twice = True
            yield _result("two processes", bench.name, checks.runs_on_two_processes, bench, words, config_dir)


def settings_of(method: str) -> list[list[str]]:
    """The overrides of every tiny setting the suite tries a method of the configuration in."""
    _, node, _, kinds, picked = _described(method, [], None)
    return _settings(node, kinds, picked, [])


def _settings(node: dict[str, Any], kinds: list[str], picked: str, overrides: list[str]) -> list[list[str]]:
    if any(word.startswith(("model=", "task=")) for word in overrides):
        return [tiny(overrides, picked)]
    known = [kind for kind in kinds if kind in SETTINGS]
    if known:
        models = (node.get("needs") or {}).get("models")  # the method's config may say which models it is for
        return [
            [f"model={name}", *small, *overrides]
            for kind in known
            for name, small in SETTINGS[kind].items()
            if models is None or name in models
        ]
    picked = "mid" if "denoise" in kinds and picked not in IMAGE_SETTINGS else picked
    return [[f"model={picked}", *IMAGE_SETTINGS[picked], *overrides]] if picked in IMAGE_SETTINGS else []


def _described(
    method: str | Callable[[], Method], overrides: list[str], config_dir: Path | None
) -> tuple[Method, dict[str, Any], list[str], list[str], str]:
    """One instance, its config node, the trusted packages, the tasks it names and the model it picks."""
    if not isinstance(method, str):
        made: Any = method()
        kind = type(made)
        made.slug = made.slug or kind.__name__.lower()
        node = {"_target_": f"{kind.__module__}.{kind.__qualname__}"}
        return made, node, [kind.__module__.split(".")[0]], list(made.tasks or ANY), ""
    from filtrun.api import compose
    from filtrun.plan import make_methods

    config, choices, _ = compose(f"method={method}", *overrides, config_dir=config_dir)
    trust = list(config.get("trust") or [])
    nodes = config["method"]
    made = make_methods(nodes, trust)[0]
    tasks = (nodes[made.slug].get("needs") or {}).get("tasks") or made.tasks or ANY
    return made, dict(nodes[made.slug]), trust, list(tasks), choices.get("model", "")


def _result(name: str, setting: str, check: Callable[..., None], *arguments: Any) -> Check:
    started = time.perf_counter()
    status, reason = "passed", ""
    try:
        check(*arguments)
    except Skip as skip:
        status, reason = "skipped", str(skip)
    except Exception as error:
        status, reason = "failed", _told(error)
    return Check(name, setting, status, reason, time.perf_counter() - started)


def _told(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, (Failed, UserError)) else f"{type(error).__name__}: {text}"
