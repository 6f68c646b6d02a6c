"""Super-resolution: the protocol of the tables, luma and colour, training pairs, the command."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filtrun.data.images_folder import ImagesFolder
from filtrun.data.pairs import Pairs
from filtrun.degrade.bicubic import imresize
from filtrun.errors import UserError
from filtrun.metrics.image import crop_border, luma, psnr, round8, ssim
from filtrun.models.bicubic import Bicubic
from filtrun.models.espcn import ESPCN
from filtrun.record import Record
from filtrun.tasks.superres import SuperRes


@pytest.fixture
def data(photo_folder: Any) -> ImagesFolder:
    return ImagesFolder(
        root=str(photo_folder("test", 2, 50, 61, seed=1)), train=str(photo_folder("train", 2, 90, 90)), patch=84
    )


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_by_the_protocol_step_by_step(make_run: Any, data: ImagesFolder, scale: int) -> None:
    run = make_run(SuperRes(scale=scale), data, Bicubic(scale))
    with run.evaluating():
        found = run.task.evaluate(run)
    values = []
    for _, image, _ in data.images("test"):
        truth = image[..., : 50 - 50 % scale, : 61 - 61 % scale]
        up = round8(imresize(round8(imresize(truth, 1, scale)), scale, 1))
        pair = [crop_border(luma(t.double()), scale) for t in (up, truth)]
        values.append((psnr(*pair).item(), ssim(*pair).item()))
    assert found["psnr"] == pytest.approx(sum(v[0] for v in values) / 2, abs=1e-9)
    assert found["ssim"] == pytest.approx(sum(v[1] for v in values) / 2, abs=1e-9)
    assert abs(found["gain"]) < 1e-9


def test_luma_model_measures_its_own_luma(make_run: Any, data: ImagesFolder) -> None:
    run = make_run(SuperRes(luma=True), data, Bicubic(3))
    assert run.task.sizes(data) == {"num_classes": 1, "in_channels": 1, "image_size": 16, "scale": 3}
    with run.evaluating():
        found = run.task.evaluate(run)
    values = []
    for _, image, _ in data.images("test"):
        truth = image[..., :48, :60]
        up = round8(imresize(luma(round8(imresize(truth, 1, 3))), 3, 1))
        values.append(psnr(crop_border(up, 3), crop_border(luma(truth), 3)).item())
    assert found["psnr"] == pytest.approx(sum(values) / 2, abs=1e-6)


@pytest.mark.parametrize("luma_model", [False, True])
def test_grey_files_are_measured_as_they_are(make_run: Any, photo_folder: Any, tmp_path: Any, luma_model: bool) -> None:
    """In studio range, as colour images are measured, their PSNR would be 20 log10(255 / 219) = 1.32 dB higher."""
    import math

    import numpy as np
    from PIL import Image

    folder = tmp_path / "grey"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 60), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    data = ImagesFolder(root=str(folder), train=str(photo_folder("train", 2, 90, 90)), patch=84)
    run = make_run(SuperRes(luma=luma_model, round_input=not luma_model), data, Bicubic(3))
    with run.evaluating():
        found = run.task.evaluate(run)
    truth = torch.from_numpy(pixels / 255)[None, None]
    small = imresize(truth, 1, 3)
    up = round8(imresize(small if luma_model else round8(small), 3, 1))
    direct = psnr(crop_border(up, 3), crop_border(truth, 3)).item()
    assert found["psnr"] == pytest.approx(direct, abs=2e-3 if luma_model else 1e-5)
    assert found["psnr"] == pytest.approx(found["input_psnr"], abs=1e-9)
    Image.fromarray(pixels).convert("RGB").save(folder / "a.png")  # three equal channels are colour
    colour = ImagesFolder(root=str(folder), train=str(tmp_path / "train"), patch=84)
    run = make_run(SuperRes(), colour, Bicubic(3))
    up = round8(imresize(round8(small), 3, 1))
    with run.evaluating():
        raised = run.task.evaluate(run)["psnr"] - psnr(crop_border(up, 3), crop_border(truth, 3)).item()
    assert raised == pytest.approx(20 * math.log10(255 / 219), abs=1e-5)


def test_training_pairs_are_crops_of_shrunk_images(data: ImagesFolder) -> None:
    task = SuperRes(scale=3, crop=50, luma=True)
    assert (task.crop, task.margin, task.border) == (48, 12, 3)
    tile = torch.rand(2, 3, 72, 72, generator=torch.Generator().manual_seed(0))

    class Like:
        class data:
            paired = False

    from filtrun.data.split import Batch

    made = task.make_pair(Like, Batch(tile, torch.zeros(2), torch.arange(2)))
    small = round8(imresize(tile, 1, 3))
    assert torch.equal(made.x, luma(small)[..., 4:-4, 4:-4]) and made.x.shape == (2, 1, 16, 16)
    assert torch.equal(made.y, luma(tile)[..., 12:-12, 12:-12]) and made.y.shape == (2, 1, 48, 48)
    assert made.index.tolist() == [0, 1]


def test_colour_comes_back_around_a_luma_model(make_run: Any, data: ImagesFolder) -> None:
    run = make_run(SuperRes(luma=True), data, Bicubic(3))
    _, image, _ = data.images("test")[0]
    enlarged = run.task.apply(run, image)
    torch.testing.assert_close(enlarged, imresize(image, 3, 1).clamp(0, 1), rtol=0, atol=1e-4)
    colour = make_run(SuperRes(), data, Bicubic(3))
    torch.testing.assert_close(colour.task.apply(colour, image), enlarged, rtol=0, atol=1e-4)


def test_training_lowers_the_loss_and_shows(make_run: Any, train: Any, data: ImagesFolder, tmp_path: Any) -> None:
    torch.manual_seed(0)
    run = make_run(SuperRes(luma=True, crop=24, losses={"l2": 1.0}), data, ESPCN(3), steps=40, lr=3e-3)
    losses = train(run)
    assert sum(losses[-5:]) < sum(losses[:5]) / 4
    with run.evaluating():
        assert run.task.show(run, tmp_path / "sheet.png")
        assert run.task.probe(run).shape == (2, 1, 24, 24)


def test_pairs_of_low_and_high_resolution(make_run: Any, train: Any, photo_folder: Any) -> None:
    low, high = photo_folder("lr", 3, 30, 34), photo_folder("hr", 3, 90, 102)
    data = Pairs(input=str(low), target=str(high), patch=60, stride=30, ratio=3)

    class Nearest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.a * x.repeat_interleave(3, 2).repeat_interleave(3, 3)

    run = make_run(SuperRes(crop=24), data, Nearest())
    batch = run.augment(run.train_split.batch([0, 1, 2]))
    made = run.task.make_pair(run, batch)
    assert made.x.shape == (3, 3, 8, 8) and made.y.shape == (3, 3, 24, 24)
    # the photographs are smooth: a low-resolution pixel is near the mean of its block only if both stayed aligned
    train(run)
    with run.evaluating():
        assert set(run.task.evaluate(run)) == {"psnr", "ssim", "input_psnr", "gain"}
    with pytest.raises(UserError, match="needs pairs with data.ratio=2, but data.ratio=3"):
        SuperRes(scale=2).check_data(data)


def test_scale_is_checked() -> None:
    with pytest.raises(UserError, match="task.scale=5 is not allowed"):
        SuperRes(scale=5)


@pytest.mark.parametrize("model", ["espcn", "srcnn", "bicubic"])
def test_the_command(cli: Any, tmp_path: Any, photo_folder: Any, model: str) -> None:
    folder = photo_folder("mine", 1, 40, 44)
    words = ["scale=smoke", "logger=none", "device=cpu", f"data.test={folder}", "data.patches=64"]
    ended = cli(f"model={model}", *words, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    record = Record.read(tmp_path / "run")
    assert (record.task, record.data, record.model, record.methods) == ("superres", "photos", model, ["full"])
    assert set(record.metrics) >= {"test/psnr", "test/ssim", "test/gain"}
    assert record.cost["total_params"] == {"espcn": 22_729, "srcnn": 8_129, "bicubic": 0}[model]
    assert "bicubic (a = -0.5" in record.evaluation["input"]["low_resolution"]
    assert (tmp_path / "run" / "samples.png").is_file()
