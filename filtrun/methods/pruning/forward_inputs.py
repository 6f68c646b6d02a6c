"""What a run's model is called with, and the tensor it gives: what tracing a model for pruning needs to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from filtrun.context import Run


def example_inputs(run: Run, forward: Callable[[], Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs (args, kwargs) the run's model is called with, the first sample of the task's probe batch."""
    caught: list[Any] = []

    def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not caught:
            caught.append((args, kwargs))

    hook = run.model.register_forward_pre_hook(catch, with_kwargs=True)
    net, training = run.net, run.model.training
    run.net = run.model
    try:
        with torch.no_grad():
            run.model.eval()
            (forward or (lambda: run.task.probe(run)))()
    finally:
        hook.remove()
        run.net = net
        run.model.train(training)
    args, kwargs = caught[0]
    size = max((len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim), default=1)

    def first(value: Any) -> Any:
        return value[:1].detach().clone() if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    return tuple(first(a) for a in args), {key: first(value) for key, value in kwargs.items()}


def output_of(model: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """The first tensor that ``model(*args, **kwargs)`` gives, however it is packed."""
    out = model(*args, **kwargs)
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return out
