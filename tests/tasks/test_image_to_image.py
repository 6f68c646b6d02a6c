"""The base of the image-to-image tasks: pairs, losses, whole images, seeds, methods, records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filtrun.data.images_folder import ImagesFolder
from filtrun.data.pairs import Pairs
from filtrun.errors import UserError
from filtrun.method import Method
from filtrun.metrics.image import psnr, round8
from filtrun.tasks.denoise import Denoise
from filtrun.tasks.image_to_image import ImageToImage
from filtrun.tasks.pair import pair, result
from filtrun.tasks.tonemap import ToneMap


class Shift(nn.Module):
    """x + b: one parameter a channel, whose best value is known."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.full((1, 3, 1, 1), value))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b


class Blur(nn.Module):
    """A 3x3 convolution that only works on sides that are multiples of 8."""

    multiple = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % 8 == 0 and x.shape[-2] % 8 == 0
        return self.conv(x)


class Darker(ImageToImage):
    """Inputs are half as bright."""

    kind = "darker"

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Any:
        return pair(clean / 2, clean)


@pytest.fixture
def data(photo_folder: Any) -> ImagesFolder:
    return ImagesFolder(
        root=str(photo_folder("test", 2, 50, 61, seed=1)), train=str(photo_folder("train", 3, 64, 72)), patch=64
    )


def test_metrics_are_per_image_and_then_the_mean(make_run: Any, data: ImagesFolder) -> None:
    run = make_run(Darker(), data, Shift())
    with run.evaluating():
        found = run.task.evaluate(run)
    values = [psnr(round8(x / 2), x.double()).item() for _, x, _ in data.images("test")]
    assert found["psnr"] == pytest.approx(sum(values) / 2, abs=1e-9)
    assert found["input_psnr"] == found["psnr"] and found["gain"] == 0
    with run.evaluating():
        again = Darker(eval_images=1).evaluate(run)
    assert again["psnr"] == pytest.approx(values[0], abs=1e-9)


def test_extra_numbers_and_borders(make_run: Any, data: ImagesFolder) -> None:
    run = make_run(Darker(extras=["l1", "delta_e", "ms_ssim", "lpips"], border=5, round8=False), data, Shift())
    with run.evaluating():
        found = run.task.evaluate(run)
    inner = [x[..., 5:-5, 5:-5].double() for _, x, _ in data.images("test")]
    assert found["l1"] == pytest.approx(sum((x / 2).mean().item() for x in inner) / 2, abs=1e-6)
    assert "ms_ssim" not in found and found["delta_e"] > 5  # these images are too small for five scales
    assert "5 border pixels" in run.task.notes(run)["measured_on"]


def test_training_learns_the_closed_form(make_run: Any, train: Any, data: ImagesFolder) -> None:
    # with L2 the best shift of x/2 towards x is the mean of x/2
    run = make_run(Darker(losses={"l2": 1.0}, crop=0), data, Shift(), steps=300, lr=0.02, weight_decay=0.0)
    losses = train(run)
    wanted = data.split("train").batch(range(len(data.split("train")))).x.mean((0, 2, 3)) / 2
    torch.testing.assert_close(run.model.b.flatten().detach(), wanted, rtol=0, atol=0.02)
    assert losses[-1] < losses[0] / 2


def test_loss_terms_add_up_with_the_models_own(make_run: Any, data: ImagesFolder) -> None:
    class Own(Shift):
        def forward(self, x: Tensor) -> Any:
            return x * 0, x + self.b

        def regularisers(self) -> dict[str, Tensor]:
            return {"size": self.b.square().sum()}

        def extra_losses(self, output: Any, target: Tensor, batch: Any) -> dict[str, Tensor]:
            assert batch.y is target
            return {"first": (output[0] - target).abs().mean()}

    run = make_run(Darker(losses={"l1": 2.0, "l2": 0.0}, model_losses={"size": 0.5}, crop=0), data, Own(0.1))
    batch = run.train_split.batch([0, 1])
    x = batch.x
    expected = 2 * (x / 2 - 0.1).abs().mean() + 0.5 * 3 * 0.01 + x.mean()
    torch.testing.assert_close(run.task.loss(run, batch), expected)
    assert run.shared["pair"].y is x and isinstance(run.shared["output"], tuple)
    bad = make_run(Darker(model_losses={"siz": 1.0}), data, Own())
    with pytest.raises(UserError, match="'siz'; did you mean 'size'"):
        bad.task.loss(bad, batch)


def test_a_model_can_train_on_its_own_terms_alone(make_run: Any, data: ImagesFolder) -> None:
    class Own(Shift):
        def regularisers(self) -> dict[str, Tensor]:
            return {"size": (self.b - 1).square().sum()}

    run = make_run(Darker(losses={"l1": 0.0}, crop=0), data, Own(0.25))
    batch = run.train_split.batch([0, 1])
    assert run.task.loss(run, batch).item() == pytest.approx(3 * 0.75**2)
    assert run.task.loss_terms(run, run.shared["pair"], run.shared["output"]).keys() == {"model_size"}


def test_nothing_to_train_on_is_told_at_the_first_loss(make_run: Any, data: ImagesFolder) -> None:
    class Own(Shift):
        def regularisers(self) -> dict[str, Tensor]:
            return {"size": self.b.square().sum()}

    for model, more in ((Shift(), {}), (Own(), {"model_losses": {"size": 0.0}})):
        run = make_run(Darker(losses={"l1": 0.0}, crop=0, **more), data, model)
        with pytest.raises(UserError, match="nothing to train on: no weight of task.losses is above 0") as told:
            run.task.loss(run, run.train_split.batch([0, 1]))
        assert len(str(told.value).splitlines()) == 1


def test_a_method_may_make_the_only_loss(make_run: Any, train: Any, data: ImagesFolder) -> None:
    class Pull(Method):
        trains = "all"

        def loss(self, run: Any, batch: Any, loss: Tensor) -> Tensor:
            assert loss.item() == 0
            return loss + (run.model.b - 0.5).square().sum()

    run = make_run(Darker(losses={"l1": 0.0}, crop=0), data, Shift(), Pull(), steps=200, lr=0.02, weight_decay=0.0)
    assert train(run)[0] == pytest.approx(0.75)
    torch.testing.assert_close(run.model.b.flatten().detach(), torch.full((3,), 0.5), rtol=0, atol=0.01)


def test_result_of_what_a_model_returns() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert result(a) is a and result((a, b)) is b and result({"output": a, "mask": b}) is a


def test_large_images_in_tiles_give_the_same(make_run: Any, data: ImagesFolder) -> None:
    torch.manual_seed(0)
    run = make_run(Darker(), data, Blur())
    with run.evaluating():
        whole = run.task.restore(run, run.task.degrade(data.images("test")[0][1], None))
        tiles = Darker(tile_above=100, tile=32, overlap=16)
        parts = tiles.restore(run, tiles.degrade(data.images("test")[0][1], None))
    assert whole.shape == (1, 3, 50, 61)
    inside = (slice(None), slice(None), slice(0, 48), slice(0, 60))
    torch.testing.assert_close(whole[inside], parts[inside], rtol=0, atol=1e-5)
    assert "in tiles of 32 pixels above 100" in tiles.notes(run)["computed"]


def test_output_of_the_wrong_size_is_told(make_run: Any, data: ImagesFolder) -> None:
    run = make_run(Darker(), data, nn.Conv2d(3, 3, 3))
    with pytest.raises(UserError, match="needs outputs 1 times the input's 50x61 pixels, but the model gives 48x59"):
        run.task.evaluate(run)


def test_test_images_are_degraded_the_same_way_every_time(make_run: Any, data: ImagesFolder) -> None:
    run = make_run(Denoise(), data, Shift())
    image = data.images("test")[0][1]
    torch.manual_seed(1)
    (_, one), (_, other) = (next(run.task.test_pairs(run, n, image, None)) for n in (0, 1))
    torch.manual_seed(2)
    _, again = next(run.task.test_pairs(run, 0, image, None))
    assert torch.equal(one.x, again.x) and not torch.equal(one.x, other.x)
    _, seeded = next(Denoise(degrade_seed=7).test_pairs(run, 0, image, None))
    assert not torch.equal(one.x, seeded.x)
    assert torch.equal(run.task.probe(run), run.task.probe(run))


def test_training_pairs_follow_the_steps_seed(make_run: Any, train: Any, data: ImagesFolder) -> None:
    one, two = (train(make_run(Denoise(crop=32), data, Shift(), steps=3)) for _ in range(2))
    assert one == two and len(set(one)) == 3
    whole = train(make_run(Denoise(crop=32), data, Shift(), steps=1, batch_size=4, accumulate=2))
    assert len(whole) == 1


def test_given_pairs_are_taken_apart(make_run: Any, train: Any, photo_folder: Any) -> None:
    folders = photo_folder("in", 5, seed=3), photo_folder("gt", 5, seed=3)
    data = Pairs(input=str(folders[0]), target=str(folders[1]), patch=40)
    run = make_run(ToneMap(crop=24, losses={"l1": 1.0}), data, Shift(0.25), steps=2, lr=0.0)
    batch = run.augment(run.train_split.batch([0, 1, 2]))
    made = run.task.make_pair(run, batch)
    assert made.x.shape == (3, 3, 24, 24) and torch.equal(made.x, made.y)  # the two folders are equal
    assert train(run) == [pytest.approx(0.25, abs=1e-6)] * 2
    with run.evaluating():
        assert run.task.evaluate(run)["input_psnr"] == 100.0
    assert run.task.notes(run)["input"] == "given pairs"


def test_sheet_has_names_and_three_columns(make_run: Any, data: ImagesFolder, tmp_path: Any) -> None:
    from PIL import Image

    run = make_run(Darker(), data, Shift())
    with run.evaluating():
        assert run.task.show(run, tmp_path / "s.png")
        assert not Darker(show_images=0).show(run, tmp_path / "none.png")
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size[0] > 3 * 50 and sheet.size[1] > 2 * 50
        # the middle of the first row: input half as bright as the truth
        left = sheet.size[0] - 3 * 52
        shown = [sheet.getpixel((left + 25 + k * 52, 22 + 25)) for k in range(3)]
    assert all(abs(a - b / 2) <= 2 for a, b in zip(shown[0], shown[2], strict=True))


def test_lora_adapts_and_merges(make_run: Any, train: Any, data: ImagesFolder) -> None:
    from filtrun.methods.peft.lora import LoRA

    torch.manual_seed(0)
    run = make_run(Denoise(crop=32), data, Blur(), LoRA(rank=2), lr=1e-2)
    start = {n: p.clone() for n, p in run.weights.items()}
    train(run)
    with run.evaluating():
        before = run.task.probe(run)
    run.each_reversed("finish")
    with run.evaluating():
        torch.testing.assert_close(run.task.probe(run), before, rtol=0, atol=1e-5)
    merged = dict(run.model.named_parameters())
    assert not torch.equal(merged["conv.weight"], start["conv.weight"])


def test_mistakes() -> None:
    from filtrun.data.digits import Digits

    with pytest.raises(UserError, match="task=denoise works on photographs, and data=digits"):
        Denoise().check_data(Digits())
    with pytest.raises(UserError, match="task.crop=64 needs tiles of 64 pixels; set data.patch to that or more"):
        Denoise().check_data(ImagesFolder(patch=40))
    with pytest.raises(UserError, match="'psnrr'"):
        Denoise(extras=["psnrr"])
    with pytest.raises(UserError, match="task.overlap=100 must be at most half of task.tile=128"):
        Denoise(tile=128, overlap=100)
    with pytest.raises(UserError, match="'l7'"):
        Denoise(losses={"l7": 1.0})
    with pytest.raises(UserError, match="needs pairs with data.ratio=1, but data.ratio=2"):
        Denoise().check_data(Pairs(ratio=2))
