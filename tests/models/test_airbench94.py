"""The speed run's network against one put together from torch's layers, and its recipe against the script's rules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.cells import cell_digest
from filtrun.data.loader import epoch_order
from filtrun.errors import UserError
from filtrun.models.airbench94 import Airbench94
from filtrun.optimizers import newton_schulz
from filtrun.task import show_images


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_layers(net: Airbench94) -> nn.Sequential:
    """The layers of the published script, with the weights of `net`."""
    first = nn.Conv2d(3, 24, 2)
    first.weight.data, first.bias.data = net.whiten, net.whiten_bias.data  # type: ignore[union-attr]
    layers: list[nn.Module] = [first, nn.GELU()]
    for group in net.groups:
        for conv, norm, pool in ((group.conv1, group.norm1, True), (group.conv2, group.norm2, False)):
            bare = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding="same", bias=False)
            bare.weight.data = conv.weight.data
            batch_norm = nn.BatchNorm2d(conv.out_channels, eps=1e-12, momentum=1 - 0.6)
            batch_norm.bias.data = norm.bias.data
            layers += [bare, *([nn.MaxPool2d(2)] if pool else []), batch_norm, nn.GELU()]
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), net.head)


def test_the_layers_are_the_published_ones() -> None:
    torch.manual_seed(0)
    net = Airbench94()
    trains = sum(p.numel() for p in net.parameters())
    kernels = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 256 * 256 * 3)
    assert trains == kernels + 24 + 2 * (64 + 256 + 256) + 2560
    reference, x = by_layers(net), noise(5, 3, 32, 32)
    for _ in range(2):  # running statistics, too
        torch.testing.assert_close(net(x), reference(x) / 256, atol=1e-6, rtol=1e-4)
    net.eval(), reference.eval()
    torch.testing.assert_close(net(x), reference(x) / 256, atol=1e-6, rtol=1e-4)


def test_how_it_starts() -> None:
    torch.manual_seed(0)
    net = Airbench94()
    assert net.head.weight.std().item() == pytest.approx(1.0, rel=1e-5)
    conv, x = net.groups[1].conv1, noise(1, 64, 5, 5)
    assert torch.equal(conv(x)[:, :64], x)  # as many channels as come in pass unchanged
    assert not torch.equal(conv(x)[:, 64:128], x)


@pytest.mark.parametrize(("channels", "side"), [(3, 16), (1, 8)])
def test_whitened_patches_are_uncorrelated_with_variance_one(channels: int, side: int) -> None:
    mixing = torch.eye(channels) + 0.3 * noise(channels, channels, seed=1)
    images = F.avg_pool2d(noise(400, channels, side + 2, side + 2), 3, stride=1)  # neighbours are alike
    images = 4 * torch.einsum("ij,njhw->nihw", mixing, images)
    net = Airbench94(in_channels=channels, whiten_eps=1e-7)
    net.look_at(images)
    net.whiten_bias.data.zero_()  # type: ignore[union-attr]
    out = F.conv2d(images, net.whiten).transpose(0, 1).flatten(1)  # (8 C, places)
    half = 4 * channels
    assert torch.equal(net.whiten[:half], -net.whiten[half:])
    covariance = out[:half] @ out[:half].T / out.shape[1]
    torch.testing.assert_close(covariance, torch.eye(half), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("channels", "side"), [(1, 2), (1, 8), (1, 28), (3, 31), (3, 64)])
def test_any_side_passes(channels: int, side: int) -> None:
    net = Airbench94(channels, 7, widths=[4, 4, 4])
    assert net(noise(3, channels, side, side)).shape == (3, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"widths": [4, 4]}, "three positive numbers"), ({"whiten_share": 0.0}, "model.whiten_share=0.0 must be in")],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Airbench94(**options)


MEDIUM = ["recipe=speedrun", "model.widths=[32,96,96]", "data.crop_pad=0", "data.flip=false"]
"""Wide enough for the recipe's learning rates: with a handful of channels the rounding errors grow tenfold a step."""
SMALL = ["recipe=speedrun", "model.widths=[8,12,12]", "data.crop_pad=0", "data.flip=false"]


def the_script(bench: BenchRun, epochs: int, batch: int) -> nn.Module:
    """The published rules: a loss summed over the batch, SGD on biases and head, Muon on kernels, linear schedules."""
    net, train = copy.deepcopy(bench.base), bench.data.split("train", "all")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in bench.data.mean_std())
    per_epoch = len(train) // batch
    total, first = epochs * per_epoch, round(0.375 * epochs * per_epoch)
    assert isinstance(net, Airbench94) and net.whiten_bias is not None
    norms = [p for name, p in net.named_parameters() if "norm" in name]
    decay = 2e-6 * 2000
    scale = batch / 2000  # the recipe's multiples are for batches of 2,000
    sgd = torch.optim.SGD(
        [
            {"params": [net.whiten_bias], "lr": 0.053, "weight_decay": decay / 0.053},
            {"params": norms, "lr": 0.053, "weight_decay": decay / 0.053},
            {"params": [net.head.weight], "lr": 0.67, "weight_decay": decay / 0.67},
        ],
        momentum=0.85,
        nesterov=True,
    )
    peaks = [group["lr"] for group in sgd.param_groups]
    kernels = [p for p in net.parameters() if p.ndim == 4]
    momenta = [torch.zeros_like(p) for p in kernels]
    for step in range(total):
        epoch, position = divmod(step, per_epoch)
        rows = epoch_order(len(train), 0, epoch)[position * batch : (position + 1) * batch]
        x, y = train.batch(rows).x, train.batch(rows).y
        loss = F.cross_entropy(net((x - mean) / std), y, label_smoothing=0.2, reduction="sum") / scale
        net.zero_grad()
        loss.backward()
        if step >= first:
            net.whiten_bias.grad = None
        for i, group in enumerate(sgd.param_groups):
            group["lr"] = peaks[i] * (1 - step / (total if i else first))
        sgd.step()
        with torch.no_grad():
            for p, m in zip(kernels, momenta, strict=True):
                assert p.grad is not None
                m.mul_(0.6).add_(p.grad)
                p.mul_(len(p) ** 0.5 / p.norm())
                direction = newton_schulz((p.grad + 0.6 * m).reshape(len(p), -1), 3)
                p.sub_(0.24 * (1 - step / total) * direction.view_as(p))
    return net


def test_the_recipe_trains_as_the_script_does(tmp_path: Path) -> None:
    bench = BenchRun("full", MEDIUM, tmp_path)
    options = {**compose_trainer(), "precision": "32", "channels_last": False, "batch_size": 400, "epochs": 2}
    run = bench.fresh(**options)
    runner.setup(run)
    runner.fit(run)
    assert run.step == 6
    expected = the_script(bench, 2, 400)
    start = dict(bench.base.named_parameters())
    for (name, ours), theirs in zip(run.model.named_parameters(), expected.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 5e-3 * (theirs - start[name]).abs().max(), name


def compose_trainer() -> dict[str, Any]:
    from filtrun.api import compose

    return compose("recipe=speedrun", "data=digits")[0]["trainer"]


def test_a_recipe_that_is_named_brings_its_model_task_and_method() -> None:
    from filtrun.api import compose

    for words in (("recipe=speedrun", "data=cifar", "task=classify"), ("data=cifar", "recipe=speedrun")):
        config, choices, _ = compose(*words)
        assert [choices[k] for k in ("task", "model", "method", "data")] == ["classify", "airbench94", "full", "cifar"]
        assert (config["trainer"]["epochs"], config["trainer"]["steps"]) == (8, None)
        assert config["trainer"]["optimizer"] == "muon" and config["task"]["label_smoothing"] == 0.2
    config, choices, _ = compose("recipe=speedrun", "model=resnet20")
    assert choices["model"] == "resnet20"  # what is said wins


def test_training_images_set_the_first_layer(tmp_path: Path) -> None:
    bench = BenchRun("full", SMALL, tmp_path)
    run = bench.fresh()
    before = run.model.whiten.clone()
    show_images(run)
    assert not torch.equal(before, run.model.whiten)
    again = bench.fresh()
    show_images(again)
    assert torch.equal(run.model.whiten, again.model.whiten)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in run.data.mean_std())
    x = (run.data.split("train", "all").images.float() / 255 - mean) / std
    out = F.conv2d(x, run.model.whiten)[:, :4].transpose(0, 1).flatten(1)
    torch.testing.assert_close(out @ out.T / out.shape[1], torch.eye(4), atol=0.02, rtol=0)


def test_two_epochs_in_a_row_show_every_image_both_ways(tmp_path: Path) -> None:
    words = ["recipe=speedrun", "model.widths=[8,8,8]", "data.crop_pad=0"]
    run = BenchRun("full", words, tmp_path).fresh(batch_size=479)
    assert run.train_split is not None and len(run.train_split) == 3 * 479 + 1
    plain = {}
    shown: list[dict[int, bool]] = []
    for epoch in range(4):
        run.epoch = epoch
        shown.append({})
        for batch in run.batches(epoch, skip=0):
            for index, before, after in zip(batch.index.tolist(), batch.x, run.augment(batch).x, strict=True):
                plain[index] = before
                assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
                shown[-1][index] = not torch.equal(after, before)
    asymmetric = [i for i, x in plain.items() if not torch.equal(x, x.flip(-1)) and all(i in s for s in shown)]
    assert len(asymmetric) > 1400
    first, second, third, _ = ([s[i] for i in asymmetric] for s in shown)
    assert all(a != b for a, b in zip(first, second, strict=True)) and first == third
    assert 0.45 < sum(first) / len(first) < 0.55


def test_views_are_weighted_as_stated(tmp_path: Path) -> None:
    run = BenchRun("full", SMALL, tmp_path).fresh()
    run.model.eval()
    x = run.data.split("test", "all").batch(torch.arange(6)).x
    task: Any = run.task
    assert task.views == "mirror_translate"
    padded = F.pad(x, (1, 1, 1, 1), "reflect")
    views = [(x, 0.25), (padded[:, :, 0:8, 0:8], 0.125), (padded[:, :, 2:10, 2:10], 0.125)]
    with torch.no_grad():
        expected = sum(w * (task.logits(run, v) + task.logits(run, v.flip(3))) for v, w in views)
        torch.testing.assert_close(task.averaged(run, x), expected)
        task.views = "mirror"
        torch.testing.assert_close(task.averaged(run, x), (task.logits(run, x) + task.logits(run, x.flip(3))) / 2)
        task.views = "one"
        assert torch.equal(task.averaged(run, x), task.logits(run, x))
    assert cell_digest({"task": {"views": "one"}}) == cell_digest({"task": {}})
    assert cell_digest({"task": {"views": "mirror"}}) != cell_digest({"task": {}})


def test_the_command_runs_it(smoke: Any, tmp_path: Path) -> None:
    from filtrun.record import Record

    words = ["recipe=speedrun", "data=digits", "model.widths=[16,64,64]", "trainer.batch_size=400", "trainer.epochs=3"]
    done = smoke(*words, "trainer.precision=32", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    found = Record.read(tmp_path / "run")
    assert found.status == "finished" and found.evaluation["views"] == "mirror_translate"
    assert found.metrics["test/accuracy"] > 0.3 and found.cost["steps"] == 9
