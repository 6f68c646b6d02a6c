"""Denoise, derain, inpaint, tonemap: what each makes of a clean image, and the numbers that follow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from filtrun.data.images_folder import ImagesFolder
from filtrun.data.pairs import Pairs
from filtrun.degrade.exposure import blur, restore
from filtrun.degrade.masks import MaskFiles
from filtrun.errors import UserError
from filtrun.metrics.image import luma, psnr, round8
from filtrun.tasks.denoise import Denoise
from filtrun.tasks.derain import Derain
from filtrun.tasks.inpaint import Inpaint, bucket
from filtrun.tasks.tonemap import ToneMap


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x


@pytest.fixture
def data(photo_folder: Any) -> ImagesFolder:
    return ImagesFolder(
        root=str(photo_folder("test", 2, 80, 96, seed=1)), train=str(photo_folder("train", 3, 80, 80)), patch=64
    )


# ---- denoise


@pytest.mark.parametrize("sigma", [15.0, 25.0, 50.0])
def test_doing_nothing_against_noise_has_the_expected_psnr(make_run: Any, data: ImagesFolder, sigma: float) -> None:
    run = make_run(Denoise(sigma=sigma, round8=False), data, Same())
    with run.evaluating():
        found = run.task.evaluate(run)
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / sigma), abs=0.15)
    assert found["gain"] == pytest.approx(0, abs=1e-12)


def test_levels_share_the_noise(make_run: Any, data: ImagesFolder) -> None:
    task = Denoise(levels=[15, 50])
    run = make_run(task, data, Same())
    image = data.images("test")[0][1]
    (low, weak), (high, strong) = task.test_pairs(run, 0, image, None)
    assert (low, high) == ("s15", "s50")
    torch.testing.assert_close((weak.x - image) / 15, (strong.x - image) / 50, rtol=0, atol=1e-7)
    assert strong.sigma is not None and strong.sigma.item() == pytest.approx(50 / 255)
    with run.evaluating():
        found = task.evaluate(run)
    assert found["psnr"] == pytest.approx((found["psnr_s15"] + found["psnr_s50"]) / 2)
    assert found["psnr_s15"] > found["psnr_s50"] + 8 and task.metrics["psnr_s15"].title == "PSNR, sigma 15"


def test_blind_training_draws_a_level_for_each_image() -> None:
    task, clean = Denoise(sigma=25, blind=[0, 55]), torch.zeros(64, 1, 32, 32)
    torch.manual_seed(0)
    made = task.degrade(clean, None)
    assert made.sigma is not None
    assert made.sigma.min() < 10 / 255 and made.sigma.max() > 45 / 255 and made.sigma.max() <= 55 / 255
    torch.testing.assert_close(made.x.flatten(1).std(1), made.sigma, rtol=0.15, atol=1e-3)
    fixed = task.degrade(clean, torch.Generator().manual_seed(0))
    assert fixed.sigma is not None and fixed.sigma.unique().tolist() == pytest.approx([25 / 255])
    with pytest.raises(UserError, match=r"task.blind=\[55\] must be"):
        Denoise(blind=[55])


def test_a_model_that_asks_is_told_the_level(make_run: Any, train: Any, data: ImagesFolder) -> None:
    seen = []

    class Told(Same):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            seen.append(sigma)
            return self.a * x

    run = make_run(Denoise(crop=32), data, Told(), steps=1)
    train(run)
    with run.evaluating():
        run.task.evaluate(run)
    assert [tuple(s.shape) for s in seen] == [(4,), (1,), (1,)]


def test_poisson_noise_grows_with_light() -> None:
    task = Denoise(noise="poisson_gaussian", peak=30, sigma=0)
    clean = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1).expand(2, 1, 64, 64)
    made = task.degrade(clean, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.x.flatten(1).var(1), torch.tensor([0.1 / 30, 0.9 / 30]), rtol=0.1, atol=0)


def test_row_noise_is_added_to_the_other_noise() -> None:
    clean = torch.full((1, 3, 64, 64), 0.5)
    alone = Denoise(sigma=0, rows=20).degrade(clean, torch.Generator().manual_seed(0))
    assert alone.x.var(-1).max() < 1e-12 and abs(alone.x.std() - 20 / 255) < 0.012
    both = Denoise(sigma=10, rows=20)
    assert "row noise of 20" in both.protocol()["noise"]
    assert abs(both.degrade(clean, torch.Generator().manual_seed(0)).x.std() - 500**0.5 / 255) < 0.012


# ---- derain


def test_rain_only_adds_and_is_measured_on_luma(make_run: Any, data: ImagesFolder) -> None:
    task = Derain()
    run = make_run(task, data, Same())
    image = data.images("test")[1][1]
    _, made = next(task.test_pairs(run, 1, image, None))
    assert (made.x >= image).all() and made.x.max() <= 1 and 0.001 < (made.x - image).mean() < 0.3
    assert torch.equal(made.y, image)
    with run.evaluating():
        found = task.evaluate(run)
    values = []
    for i in range(2):
        image = data.images("test")[i][1]
        _, made = next(task.test_pairs(run, i, image, None))
        values.append(psnr(luma(round8(made.x).double()), luma(image.double())).item())
    assert found["psnr"] == pytest.approx(sum(values) / 2, abs=1e-6)
    with pytest.raises(UserError, match=r"task.length=\[5, 2\] must be"):
        Derain(length=[5, 2])


# ---- inpaint


class Fill(nn.Module):
    """Paints every pixel with one value."""

    def __init__(self, value: float = 0.5) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        assert mask.shape == (len(x), 1, *x.shape[2:]) and (x * mask).abs().max() == 0
        return self.value.expand_as(x)


def test_holes_by_bucket_and_composite(make_run: Any, train: Any, data: ImagesFolder) -> None:
    task = Inpaint(ratios=[0.01, 0.2, 0.4], round8=False)
    run = make_run(task, data, Fill())
    image = data.images("test")[0][1]
    pairs = dict(task.test_pairs(run, 0, image, None))
    assert list(pairs) == ["1_20", "20_40"] == [bucket(0.01, 0.2), bucket(0.2, 0.4)]
    for name, (low, high) in zip(pairs, task.bins, strict=True):
        mask = pairs[name].mask
        assert mask is not None and low - 1e-3 <= mask.mean() <= high + 1e-3
        out = task.restore(run, pairs[name])
        assert torch.equal(out * (1 - mask), image * (1 - mask)) and (out[mask.expand_as(out) == 1] == 0.5).all()
    with run.evaluating():
        found = task.evaluate(run)
    assert found["psnr_1_20"] > found["psnr_20_40"] > found["input_psnr"] - 20
    assert found["l1"] == pytest.approx((found["l1_1_20"] + found["l1_20_40"]) / 2)
    expected = [
        ((image - 0.5).abs() * dict(task.test_pairs(run, i, image, None))["20_40"].mask).mean().item()
        for i, image in enumerate(t[1] for t in data.images("test"))
    ]
    assert found["l1_20_40"] == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert len(train(run)) == 2


def test_mask_files_pair_image_i_with_mask_i(make_run: Any, data: ImagesFolder, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for i, rows in enumerate((2, 6)):
        pixels = np.zeros((20, 20), np.uint8)
        pixels[:rows] = 255
        Image.fromarray(pixels).save(tmp_path / "masks" / f"{i}.png")
    task = Inpaint(masks="folder", mask_root=str(tmp_path / "masks"), ratios=[0, 0.2, 0.4])
    run = make_run(task, data, Fill())
    for i, (name, share) in enumerate((("0_20", 0.1), ("20_40", 0.3))):
        (found, made), = task.test_pairs(run, i, data.images("test")[i][1], None)  # fmt: skip
        assert made.mask is not None and (found, made.mask.mean().item()) == (name, pytest.approx(share))
    torch.manual_seed(0)
    made = task.degrade(torch.rand(8, 3, 20, 20), None)
    assert made.mask is not None
    assert {round(m.item(), 2) for m in made.mask.mean((1, 2, 3))} == {0.1, 0.3}
    assert len(MaskFiles(str(tmp_path / "masks"))) == 2


def test_boxes_and_mistakes(data: ImagesFolder) -> None:
    made = Inpaint(masks="box").degrade(torch.rand(4, 3, 40, 40), torch.Generator().manual_seed(0))
    assert made.mask is not None and made.mask.mean((1, 2, 3)).max() < 0.65
    with pytest.raises(UserError, match="task.mask_root is set but task.masks=strokes"):
        Inpaint(mask_root="x")
    with pytest.raises(UserError, match="makes its own holes and needs single images, not data=pairs"):
        Inpaint().check_data(Pairs())


# ---- tonemap


def test_the_known_operator_is_undone(make_run: Any, data: ImagesFolder) -> None:
    task = ToneMap(exposure=[-1, -1], gamma=[1.2, 1.2], contrast=[0.7, 0.7], round_input=False)

    class Undo(Same):
        def forward(self, x: Tensor) -> Tensor:
            one = torch.ones(len(x))
            return restore(x, -one, 1.2 * one, 0.7 * one) * self.a

    with (run := make_run(task, data, Undo())).evaluating():
        found = run.task.evaluate(run)
    assert found["psnr"] == 100.0 and found["delta_e"] < 1e-6 and found["input_psnr"] < 20
    with (plain := make_run(task, data, Same())).evaluating():
        assert plain.task.evaluate(plain)["delta_e"] > 5
    with pytest.raises(UserError, match=r"task.gamma=\[2, 1\] must be"):
        ToneMap(gamma=[2, 1])


def test_operator_is_drawn_for_each_image(data: ImagesFolder) -> None:
    clean = torch.full((16, 3, 4, 4), 0.6)
    torch.manual_seed(0)
    made = ToneMap().degrade(clean, None)
    levels = made.x[:, 0, 0, 0]
    assert len(levels.unique()) > 10 and torch.equal(made.x, round8(made.x)) and torch.equal(made.y, clean)


def test_weaker_detail_is_not_a_curve(data: ImagesFolder) -> None:
    plain = {"exposure": [0, 0], "gamma": [1, 1], "contrast": [1, 1], "round_input": False}
    clean = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = ToneMap(detail=[0.5, 0.5], detail_sigma=2.0, **plain).degrade(clean, None)
    base = blur(clean, 2.0)
    torch.testing.assert_close(made.x, base + 0.5 * (clean - base), atol=2e-3, rtol=0)  # sRGB's two branches
    assert "detail [0.5, 0.5] at 2 pixels" in ToneMap(detail=[0.5, 0.5], detail_sigma=2.0).protocol()["operator"]
    untouched = ToneMap(**plain).degrade(clean, None)
    torch.testing.assert_close(untouched.x, clean, atol=2e-3, rtol=0)
    with pytest.raises(UserError, match=r"task.detail=\[2, 1\] must be"):
        ToneMap(detail=[2, 1])


def test_yaml_files_equal_the_defaults() -> None:
    import dataclasses
    import importlib

    from omegaconf import OmegaConf

    for name in ("superres", "denoise", "derain", "inpaint", "tonemap"):
        node: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf" / "task" / f"{name}.yaml"))
        module, _, cls = node.pop("_target_").rpartition(".")
        kind = getattr(importlib.import_module(module), cls)
        fields = {
            f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
            for f in dataclasses.fields(kind)
        }
        assert node == fields and kind.kind == name
