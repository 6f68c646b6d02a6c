"""What a method reads back from a checkpoint or a stored delta goes to where the model is, on a GPU too."""

from __future__ import annotations

from pathlib import Path

import pytest

from filtrun import runner
from filtrun.bench_run import IMAGE_SETTINGS, SETTINGS, BenchRun, probe
from filtrun.callbacks import Ema
from filtrun.checkpoint import Checkpoints, checkpoint_files, load_checkpoint, weights_sha256
from filtrun.conformance_waits import on_stand_in
from filtrun.context import Run
from filtrun.delta import FILE, load_delta, save_delta
from filtrun.waits import Watch

RESNET = ["model=resnet20", *SETTINGS["classify"]["resnet20"], "task=classify"]
METHODS = {
    "mid": ["model=mid", *IMAGE_SETTINGS["mid"]],
    "misf_gan": ["model=misf", *IMAGE_SETTINGS["misf"]],
    "sara": ["model=unet", "model.size=nano"],
    "spt": RESNET,
    "svfit": RESNET,
    "iss_p": RESNET,
    "magnitude": RESNET,
    "masksparsity": RESNET,
    "unlearn_sparse": RESNET,
}


def fresh(bench: BenchRun, folder: Path) -> Run:
    run = bench.fresh(edit=False, fabric=on_stand_in(), steps=4)
    run.dir = folder
    run.model.to(run.device)
    runner.edit(run)
    return run


def begin(run: Run) -> None:
    runner.setup(run)
    ema = Ema(0.9)
    run.callbacks += [ema, Checkpoints(1)]
    ema.start(run)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_stays_behind(method: str, tmp_path: Path) -> None:
    bench = BenchRun(method, METHODS[method], tmp_path)
    with Watch() as watch:
        run = fresh(bench, tmp_path / "run")
        begin(run)
        runner.fit(run)
        sha = weights_sha256(bench.base)
        with run.evaluating():
            save_delta(run, run.dir, sha)
        checkpoint_files(run.dir)[-1].unlink()
        again = fresh(bench, run.dir)
        begin(again)
        assert load_checkpoint(again) and again.step == 3
        runner.fit(again)
        again.each_reversed("finish")
        reloaded = fresh(bench, run.dir)
        load_delta(reloaded, run.dir / FILE, sha)
        reloaded.each_reversed("finish")
        probe(reloaded)
    assert [event for event in watch.events if event.kind != "waits"] == []
