"""Task inverse: measurements that depend on the image alone, the pseudo-inverse as default, and a base shared."""

from __future__ import annotations

import pytest
import torch

from filtrun.base import base_model
from filtrun.bench_run import BenchRun
from filtrun.data.split import Split
from filtrun.errors import UserError
from filtrun.inverse.measurement import Measurement
from filtrun.metrics.image import psnr
from filtrun.tasks.diffuse import Diffuse
from filtrun.tasks.inverse import OPERATORS, Inverse

SMALL = [
    "model=unet",
    "model.size=nano",
    "task=inverse",
    "task.samples=6",
    "task.sample_batch=4",
    "task.sample_steps=3",
]


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    return {m: BenchRun(m, SMALL, tmp_path_factory.mktemp(m)) for m in ("none", "red_diff")}


def evaluated(run):
    with run.evaluating():
        return run.task.evaluate(run)


def test_without_a_solver_it_measures_the_pseudo_inverse(benches):
    run = benches["none"].fresh()
    run.keeps, run.which = None, "all"
    values = evaluated(run)
    images, numbers, _ = run.task.test_images(run, "all", 6)
    made = run.task.measure(run, images, numbers)
    assert values["psnr"] == pytest.approx(psnr((made.operator.pinv(made.y) + 1) / 2, (images + 1) / 2).mean().item())
    assert values["consistency"] < 1e-6 and run.shared["nfe"] == 0 and list(values) == ["psnr", "ssim", "consistency"]
    run.task.box = 0.0
    assert evaluated(run) == pytest.approx({"psnr": 100, "ssim": 1, "consistency": 0}, abs=1e-9)
    assert run.task.notes(run)["sampler"] == "pseudo-inverse"


def test_a_method_solves_with_the_measurement(benches, tmp_path):
    run = benches["red_diff"].fresh()
    values = evaluated(run)
    assert run.shared["nfe"] == 3 and values["psnr"] > 5 and evaluated(run) == values
    assert run.task.clip is None and "red_diff, 3 steps" in run.task.notes(run)["sampler"]
    with run.evaluating():
        assert run.task.show(run, tmp_path / "a.png") and (tmp_path / "a.png").exists()

    seen = {}

    def solve(denoise, x, sigmas, cond, *, measurement, generator):
        seen.update(x=x, cond=cond, sigmas=sigmas)
        assert isinstance(measurement, Measurement) and generator.device == x.device
        return measurement.operator.pinv(measurement.y)

    run.methods[0].sampler = lambda run: solve
    run.task.labels = True
    evaluated(run)
    assert len(seen["sigmas"]) == 4 and seen["x"].shape == (2, 1, 8, 8) and seen["cond"].shape == (2,)
    assert seen["x"].std() == pytest.approx(seen["sigmas"][0].item(), rel=0.3)


def test_a_measurement_belongs_to_its_image_and_seed(benches):
    run = benches["none"].fresh()
    images, numbers, _ = run.task.test_images(run, "all", 6)
    for name in OPERATORS:
        if name == "inpaint_mask":
            continue
        task = Inverse(operator=name, measurement_noise=0.1, box_place="random")
        whole, part = task.measure(run, images, numbers), task.measure(run, images[2:4], numbers[2:4])
        torch.testing.assert_close(part.y, whole.y[2:4])
        assert whole.noise == 0.2 and whole.count == 6 * whole.operator.count
        again = Inverse(operator=name, measurement_noise=0.1, box_place="random", measure_seed=1)
        assert not torch.equal(again.measure(run, images, numbers).y, whole.y)
    task = Inverse(operator="inpaint_random", missing=0.75)
    assert task.measure(run, images, numbers).operator.count == 16
    noisy = Inverse(operator="inpaint_random", measurement_noise=0.3).measure(run, images, numbers)
    assert not noisy.y[noisy.operator.singular == 0].any()
    level = Inverse(operator="denoise", measurement_noise=0.1).measure(run, images, numbers).residual(images).std()
    assert level.item() == pytest.approx(0.2, rel=0.2)


def test_given_mask(benches, tmp_path):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "m.png")
    picture = Image.open(tmp_path / "m.png")
    for i in range(3):
        picture.putpixel((i, 5), 255)
    picture.save(tmp_path / "m.png")
    run = benches["none"].fresh()
    task = Inverse(operator="inpaint_mask", mask_file=str(tmp_path / "m.png"))
    images, numbers, _ = run.task.test_images(run, "all", 2)
    keep = task.measure(run, images, numbers).operator.singular[0, 0]
    assert keep.sum() == 61 and not keep[5, :3].any()


def test_the_base_is_that_of_task_diffuse(benches):
    inverse = Inverse(label_dropout=0.2, samples=3, clip=None)
    base = inverse.pretraining()
    assert type(base) is Diffuse and base.kind == "diffuse"
    assert base.training_key() == Diffuse(label_dropout=0.2).training_key()
    plans = []
    for words in (["model=unet", "model.size=nano"], SMALL):
        bench = BenchRun("none", [*words, "pretrain.steps=1"], benches["none"].folder)
        bench.config["model"]["base"] = "pretrain"
        plan = bench._plan({})
        plan.data = bench.data
        plans.append((plan, bench.fresh(edit=False)))
    keys = []
    for plan, run in plans:
        run.data = plan.data
        base_model(plan, run)
        keys.append(run.stages.used[-1])
    assert keys[0]["key"] == keys[1]["key"] and keys[1]["cached"]


def test_test_images_are_spread_over_the_set(benches):
    run = benches["none"].fresh()
    _, numbers, _ = run.task.test_images(run, "all", 4)
    split: Split = run.data.split("test", "all")
    assert numbers.tolist() == split.index[[0, len(split) // 4, len(split) // 2, 3 * len(split) // 4]].tolist()


def test_bad_options(benches):
    with pytest.raises(UserError, match="needs task.mask_file=FILE"):
        Inverse(operator="inpaint_mask")
    with pytest.raises(UserError, match="task.blur_size=4 must be odd"):
        Inverse(operator="blur_uniform", blur_size=4)
    run = benches["none"].fresh()
    images, numbers, _ = run.task.test_images(run, "all", 1)
    with pytest.raises(UserError, match="loses every pixel"):
        Inverse(box=1.0).measure(run, images, numbers)
