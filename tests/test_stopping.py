"""A signal ends a training after its step, with a checkpoint; elsewhere a process is stopped at once, and once only."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from filtrun import stopping
from filtrun.record import Record
from filtrun.stopping import stop_asked, stops_at, training

TERM = [signal.SIGTERM]


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_the_first_signal_stops_and_later_ones_do_not_disturb() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stops_at([signal.SIGTERM, signal.SIGUSR2]):
        assert not stop_asked()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGUSR2)
        send()
        send(signal.SIGUSR2)
        assert stop_asked()
        with stops_at(TERM):  # what is there already stays
            assert stop_asked()
        assert stop_asked()
    assert signal.getsignal(signal.SIGTERM) is before and not stop_asked()


def test_a_training_is_asked_first_and_stopped_where_it_is_when_it_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stops_at(TERM):
        with pytest.raises(KeyboardInterrupt), training():  # it came after the last step
            send()
            last = True
        assert last
    monkeypatch.setattr(stopping, "GRACE", 0.05)
    with stops_at(TERM), pytest.raises(KeyboardInterrupt):
        with training():
            send()
            threading.Event().wait(30)
            raise AssertionError("nobody insisted")


def test_handlers_are_left_alone_outside_the_main_thread() -> None:
    seen: list[Any] = []

    def other() -> None:
        with stops_at(TERM):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.slow
@pytest.mark.parametrize("every", [1000, 0])
def test_a_stopped_training_leaves_a_checkpoint_of_its_last_step(
    tmp_path: Path, smoke: Any, cli: Any, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    from filtrun.callbacks import Log

    after = Log.after_step

    def stops(self: Any, run: Any) -> None:
        after(self, run)
        if run.dir == tmp_path / "run" and run.step == 7 and not stop_asked():
            send()

    words = ["model=resnet20", "model.width=4", "method=full", "model.base=scratch", "trainer.steps=12",
             f"trainer.checkpoint_every={every}"]  # fmt: skip
    monkeypatch.setattr(Log, "after_step", stops)
    stopped = smoke(*words, f"hydra.run.dir={tmp_path / 'run'}")
    assert stopped.code == 1 and "interrupted; go on with" in stopped.err
    assert Record.read(tmp_path / "run").status == "interrupted"
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoints/*"))
    assert found == (["step-000000007.safetensors"] if every else [])
    monkeypatch.setattr(Log, "after_step", after)
    assert cli(f"resume={tmp_path / 'run'}").code == 0
    assert smoke(*words, f"hydra.run.dir={tmp_path / 'whole'}").code == 0
    assert Record.read(tmp_path / "run").metrics == Record.read(tmp_path / "whole").metrics
