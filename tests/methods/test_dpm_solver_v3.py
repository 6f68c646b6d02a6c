"""DPM-Solver-v3 as a method: what its statistics stage depends on, which settings a run gets, and what it costs."""

from __future__ import annotations

import pytest
import torch

from filtrun.bench_run import BenchRun
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.model_statistics import ModelStatistics, estimate
from filtrun.diffusion.noise import noise_levels
from filtrun.errors import UserError
from filtrun.methods.guidance.apg import APG
from filtrun.methods.guidance.cfgpp import CFGpp
from filtrun.methods.guidance.dpm_solver_v3 import DPMSolverV3Sampler
from filtrun.methods.guidance.elucd import elucd
from filtrun.stages import digest

SMALL = ["model=unet", "model.size=nano", "task.sample_steps=5", "task.samples=8", "task.guidance=1.0"]
FEW = ["method.dpm_solver_v3.statistics_levels=12", "method.dpm_solver_v3.draws=8"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return BenchRun("dpm_solver_v3", [*SMALL, *FEW], tmp_path_factory.mktemp("v3"))


def drawn(run, count=4):
    with run.evaluating():
        return run.task.generate(run, torch.arange(count), seed=3)


def stages(run):
    return [(s["name"], s["cached"]) for s in run.stages.used if s["name"] == "dpm-solver-v3"]


def test_a_run_samples_with_its_own_statistics(bench):
    run = bench.fresh()
    images, nfe = drawn(run)
    assert images.shape == (4, 1, 8, 8) and 0 <= images.min() and images.max() <= 1
    assert nfe == run.task.sample_steps  # the statistics are not counted, the corrector is free
    solver = run.methods[0].sampler(run)
    assert solver.order == 3 and solver.pseudo_corrector is False
    assert stages(run) == [("dpm-solver-v3", False)]  # one stage, however often the sampler is asked for

    # the same by hand
    task, levels = run.task, noise_levels("edm")
    split = run.data.split("train", "all")
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:8].sort().values
    batch = split.batch(rows)
    with run.evaluating():
        denoiser = task.denoiser(run)
        ladder = levels.sigmas(12, "log", zero=False)
        by_hand = estimate(denoiser, batch.x * 2 - 1, ladder, batch.y, draws=8)
        for name in ("sigmas", "l", "s", "b"):
            torch.testing.assert_close(getattr(solver.statistics, name), getattr(by_hand, name))
        again = DPMSolverV3Sampler().solver(by_hand, levels, guided=False)
        noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        x = again(denoiser, 80 * noise, again.grid(levels, 5), torch.arange(4))
    torch.testing.assert_close(((x + 1) / 2).clamp(0, 1), images)


def test_the_stage_belongs_to_weights_guidance_and_counts_and_not_to_the_steps(bench):
    def key(change=lambda run: None):
        run = bench.fresh()
        change(run)
        return digest(run.methods[0].parts(run, noise_levels("edm")))

    def other_weights(run):
        with torch.no_grad():
            next(run.model.parameters()).add_(0.1)

    first = key()
    assert key(lambda run: setattr(run.task, "sample_steps", 8)) == first
    assert key(lambda run: setattr(run.task, "samples", 100)) == first
    assert key(lambda run: setattr(run.methods[0], "order", 1)) == first
    changes = [
        other_weights,
        lambda run: setattr(run.task, "guidance", 2.0),
        lambda run: setattr(run.task, "clip", None),
        lambda run: run.methods.append(CFGpp()),
        lambda run: setattr(run.methods[0], "draws", 9),
        lambda run: setattr(run.methods[0], "statistics_levels", 13),
        lambda run: setattr(run.methods[0], "sigma_min", 0.01),
        lambda run: setattr(run.methods[0], "seed", 1),
    ]
    assert len({first, *(key(change) for change in changes)}) == len(changes) + 1

    drawn(bench.fresh(), 1)
    run = bench.fresh()
    run.task.sample_steps = 8
    drawn(run, 1)
    assert stages(run) == [("dpm-solver-v3", True)]


def test_guided_runs_take_the_guided_settings(bench):
    run = bench.fresh()
    run.task.guidance = 2.0
    assert run.methods[0].report(run)["order"] == 2
    _, nfe = drawn(run)
    assert nfe == 2 * run.task.sample_steps
    solver = run.methods[0].sampler(run)
    assert (solver.order, solver.corrector, solver.pseudo_corrector, solver.pseudo_predictor) == (
        2,
        "full",
        True,
        False,
    )


def test_options_reach_the_solver():
    levels, sigmas = noise_levels("linear"), noise_levels("linear").sigmas(20, "log", zero=False)
    statistics = ModelStatistics.degenerate(sigmas, (1, 2, 2))
    method = DPMSolverV3Sampler(order=1, corrector="late", pseudo_corrector=True, pseudo_predictor=True,
                                lower_order_final=False, spacing="uniform_t")  # fmt: skip
    solver = method.solver(statistics, levels, guided=True)
    assert (solver.order, solver.corrector, solver.spacing) == (1, "late", "uniform_t")
    assert solver.pseudo_predictor and solver.pseudo_corrector and not solver.lower_order_final
    # the halves of sampling meet in the middle of the schedule's time
    half = levels.sigma_to_t(torch.tensor(solver.half_sigma, dtype=torch.float64)).item()
    assert half == pytest.approx(499.5, abs=0.6)
    assert DPMSolverV3Sampler().solver(statistics, noise_levels("edm"), False).half_sigma == pytest.approx(
        0.4, rel=1e-3
    )
    ladder = method.ladder(levels)
    assert len(ladder) == 61 and ladder[0].item() == pytest.approx(levels.sigma_max, rel=1e-3)
    assert ladder.log().diff().std() < 1e-6


def test_too_many_steps_for_the_grid_are_refused(bench):
    run = bench.fresh()
    run.task.sample_steps = 13
    with pytest.raises(UserError, match="13 steps are too many for statistics at 13 noise levels"):
        drawn(run)


def test_bad_options_are_named():
    with pytest.raises(UserError, match="method.dpm_solver_v3.order=4 is out of range"):
        DPMSolverV3Sampler(order=4)
    with pytest.raises(UserError, match="method.dpm_solver_v3.corrector=half is not allowed"):
        DPMSolverV3Sampler(corrector="half")
    with pytest.raises(UserError, match="method.dpm_solver_v3.spacing"):
        DPMSolverV3Sampler(spacing="linear")


def test_a_rule_with_momentum_is_measured_without_it(bench):
    run = bench.fresh()
    run.methods.insert(0, APG())
    images, nfe = drawn(run, 2)
    assert torch.isfinite(images).all() and nfe == 2 * run.task.sample_steps


@pytest.mark.parametrize("variant", ("ddpm", "edm"))
def test_a_rule_that_moves_the_state_is_no_part_of_the_statistics(variant):
    mixture = Mixture.four_in_six()
    data, y = mixture.sample(8, torch.Generator().manual_seed(0))
    sigmas = noise_levels("edm").sigmas(6, "log", zero=False)
    moving = elucd(mixture, lambda images: images.flatten(1)[:, :4].tanh(), variant)
    plain, found = (estimate(d, data, sigmas, y, draws=8) for d in (mixture, moving))
    for name in ("l", "s", "b"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name))


def test_cfgpp_is_refused_with_a_reason(bench):
    run = bench.fresh()
    run.methods.append(CFGpp())
    with pytest.raises(UserError, match="as cfgpp does"):
        drawn(run)


def test_solver_error_is_zero_for_the_reference_itself_and_falls_with_steps(bench):
    run = bench.fresh()
    task, classes = run.task, torch.arange(4)
    run.methods, task.ode_steps, task.grid, task.to_zero = [], 40, "log", False

    def error(sampler, steps):
        task.sampler, task.sample_steps = sampler, steps
        with run.evaluating():
            images, nfe = task.generate(run, classes, task.sample_seed)
            assert nfe == steps
            return task.ode_error(run, classes, images)

    assert error("unipc", 40) == 0
    assert error("ddim", 5) > 2 * error("ddim", 20) > 4 * error("dpmpp_2m", 20) > 0
