"""`filtrun apply`: runs made at smoke scale, whose models do something that can be predicted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from filtrun.errors import UserError
from filtrun.photo.read import read_photo
from filtrun.photo.write import write_photo
from filtrun.verbs import apply

MODELS = '''
from __future__ import annotations
import torch
from torch import Tensor, nn


class Same(nn.Module):
    """Gives back what it gets; a trained 1x1 convolution would be nearly that."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.last = nn.Conv2d(in_channels, in_channels, 1, bias=False)
        nn.init.dirac_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


class Fill(Same):
    """Holes become a fifth."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(x) * (1 - mask) + 0.2 * mask


class Squeeze(Same):
    """All light into [0, 1): x / (1 + x)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x / (1 + x))
'''
SMALL = ("scale=smoke", "device=cpu", "logger=none", "method=none", "data.patches=40", "data.patch=64", "task.crop=32",
         "task.extras=[]", "task.show_images=0")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders: same (denoise), grey (denoise of grey images), fill (inpaint), squeeze (tonemap), espcn."""
    import filtrun

    base = tmp_path_factory.mktemp("apply")
    (base / "applied_models.py").write_text(MODELS)
    (base / "conf" / "model").mkdir(parents=True)
    for name, task in (("same", "denoise"), ("fill", "inpaint"), ("squeeze", "tonemap")):
        (base / "conf" / "model" / f"{name}.yaml").write_text(
            f"# @package _global_\n# Predictable.\ndefaults:\n  - override /task: {task}\n  - override /data: photos\n"
            f"model: {{_target_: applied_models.{name.capitalize()}, tasks: [{task}], base: scratch, "
            "checkpoint: null, normalize: none}\n"
        )
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(base))
    common = [*SMALL, "trust=[applied_models]", f"stages.root={base / 'stages'}"]
    for name, more in (("same", []), ("grey", ["data.channels=1"]), ("fill", []), ("squeeze", [])):
        model = "same" if name == "grey" else name
        filtrun.run(f"model={model}", *common, *more, f"hydra.run.dir={base / name}", config_dir=base / "conf")
    trained = [word for word in common if word != "method=none"]
    filtrun.run("model=same", "method=mid", "method.mid.masks=3", *trained, f"hydra.run.dir={base / 'masked'}",
                config_dir=base / "conf")  # fmt: skip
    espcn = [word for word in trained if word != "trust=[applied_models]"]
    filtrun.run("model=espcn", "task.scale=2", *espcn, f"hydra.run.dir={base / 'espcn'}")
    yield base
    patch.undo()


@pytest.fixture(scope="module")
def loaded():
    """Runs that were reloaded, by folder."""
    return {}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, loaded):
    """Loading a run costs more than using it."""
    import filtrun.reload

    real = filtrun.reload.reload

    def remembered(folder, *, device="auto", overrides=None):
        if str(folder) not in loaded:
            loaded[str(folder)] = real(folder, device="cpu")
        return loaded[str(folder)]

    monkeypatch.setattr(filtrun.reload, "reload", remembered)


@pytest.fixture
def cat():
    from skimage import data

    return np.ascontiguousarray(data.chelsea()[100:160, 150:230])


def load_delta_tensor(state, name):
    from filtrun.bits import unpack_zeros

    return unpack_zeros(state["tensors"][name])


def deep(cat):
    return cat.astype(np.uint16) * 257 + np.arange(80, dtype=np.uint16)[None, :, None] % 7


def test_pixels_depth_alpha_exif_and_profile(runs, tmp_path, cat, capsys):
    from PIL import ImageCms

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = {0x0110: "Model 7", 0x0112: 1, 0x8769: {0x9003: "2024:05:06 07:08:09"}}
    alpha = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)[..., None]
    deep_alpha = alpha.astype(np.uint16) * 200
    source = tmp_path / "in"
    images = {
        "rgb.png": (cat, None), "rgba.png": (cat, alpha), "grey.png": (cat[..., :1], alpha), "rgb.tif": (cat, alpha),
        "rgb16.png": (deep(cat), None), "rgba16.tiff": (deep(cat), deep_alpha),
        "grey16.png": (deep(cat)[..., :1], None),
    }  # fmt: skip
    for name, (pixels, cover) in images.items():
        form = "png" if name.endswith("png") else "tiff"
        write_photo(source / "deep" / name, form, pixels, cover, exif=exif, icc=icc, dpi=(300, 300))
    assert apply.main([str(runs / "same"), str(source), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'out'}: 7 images written\n" and told.err == ""
    for name, (pixels, cover) in images.items():
        photo = read_photo(tmp_path / "out" / "deep" / name)
        assert photo.pixels.dtype == pixels.dtype and np.array_equal(photo.pixels, pixels), name
        assert photo.alpha is None if cover is None else np.array_equal(photo.alpha, cover), name
        assert photo.icc == icc and photo.dpi == pytest.approx((300, 300), rel=1e-3)
        assert {**photo.exif, 282: 0, 283: 0, 296: 0} == {**exif, 282: 0, 283: 0, 296: 0}


def test_a_grey_model_and_colours(runs, tmp_path, cat):
    write_photo(tmp_path / "a.png", "png", cat)
    write_photo(tmp_path / "g.png", "png", cat[..., :1])
    words = [str(tmp_path / "a.png"), str(tmp_path / "g.png")]
    assert apply.main([str(runs / "grey"), *words, "--out", str(tmp_path / "out")]) == 0
    assert np.array_equal(read_photo(tmp_path / "out" / "a.png").pixels, cat)
    assert np.array_equal(read_photo(tmp_path / "out" / "g.png").pixels, cat[..., :1])


def test_what_a_method_does_in_evaluation_is_done_to_photographs(runs, tmp_path, cat):
    """MID gives the mean over random masks; of a linear network that is the network of the mean masked image."""
    from filtrun.context import mix_seed
    from filtrun.methods.restoration.mid import pixel_mask
    from filtrun.pack import load_tree

    write_photo(tmp_path / "a.png", "png", cat)
    assert apply.main([str(runs / "masked"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 0
    state, _ = load_tree(runs / "masked" / "model.safetensors")
    assert set(state["methods"]["mid"]) == {"first_sigma"}
    weight = load_delta_tensor(state, "last.weight")[..., 0, 0]
    x = torch.from_numpy(cat / np.float32(255)).permute(2, 0, 1)[None]
    seeds = (torch.Generator().manual_seed(mix_seed(j, 60, 80)) for j in range(3))
    shown = sum(1 - pixel_mask((1, 3, 60, 80), 0.2, True, seed) for seed in seeds) / 3
    expected = torch.einsum("dc,nchw->ndhw", weight, x * shown)
    found = read_photo(tmp_path / "out" / "a.png").pixels / 255
    assert np.abs(found - expected[0].clamp(0, 1).permute(1, 2, 0).numpy()).max() < 0.6 / 255
    plain = torch.einsum("dc,nchw->ndhw", weight, x)
    assert np.abs(found - plain[0].clamp(0, 1).permute(1, 2, 0).numpy()).mean() > 5 / 255


def test_orientation_is_applied_and_reset(runs, tmp_path, cat):
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = turn, "Maker"
        Image.fromarray(cat).save(tmp_path / f"{turn}.png", exif=exif)
    words = [str(runs / "same"), str(tmp_path / "*.png"), "--out", str(tmp_path / "out")]
    assert apply.main(words) == 0 and apply.main([*words, "--format", "webp", "--quality", "100"]) == 0
    for turn in range(1, 9):
        with Image.open(tmp_path / f"{turn}.png") as image, Image.open(tmp_path / "out" / f"{turn}.png") as result:
            expected = np.asarray(ImageOps.exif_transpose(image))
            assert np.array_equal(np.asarray(result), expected)
            assert result.getexif()[0x0112] == 1 and result.getexif()[0x010F] == "Maker"
        with Image.open(tmp_path / "out" / f"{turn}.webp") as result:
            assert np.abs(np.asarray(result.convert("RGB")).astype(int) - expected).mean() < 4
            assert result.getexif()[0x0112] == 1


def test_super_resolution_grows(runs, tmp_path, cat):
    from filtrun.degrade.bicubic import imresize
    from filtrun.reload import reload

    alpha = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)[..., None]
    write_photo(tmp_path / "a.png", "png", cat, alpha, exif={0x8769: {0xA002: 80, 0xA003: 60}})
    write_photo(tmp_path / "one.png", "png", cat[:1, :1])
    Image.fromarray(cat).resize((20000, 50)).save(tmp_path / "strip.png")
    assert apply.main([str(runs / "espcn"), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    photo = read_photo(tmp_path / "out" / "a.png")
    assert photo.size == (120, 160) and photo.exif[0x8769] == {0xA002: 160, 0xA003: 120}
    run, _ = reload(runs / "espcn")
    with run.evaluating():
        expected = run.task.apply(run, torch.from_numpy(cat / np.float32(255)).permute(2, 0, 1)[None])
    assert np.abs(photo.pixels - expected[0].permute(1, 2, 0).numpy() * 255).max() <= 0.51
    grown = imresize(torch.from_numpy(alpha[..., 0] / 255), 2, 1).clamp(0, 1).numpy() * 255
    assert np.abs(photo.alpha[..., 0] - grown).max() <= 0.51
    assert read_photo(tmp_path / "out" / "one.png").size == (2, 2)
    assert read_photo(tmp_path / "out" / "strip.png").size == (100, 40000)


def test_tiles_and_whole_give_the_same_file(runs, tmp_path, monkeypatch):
    from skimage import data

    from filtrun.reload import reload

    Image.fromarray(data.astronaut()[:300, :400]).save(tmp_path / "a.png")
    words = [str(runs / "espcn"), str(tmp_path / "a.png"), "--out"]
    assert apply.main([*words, str(tmp_path / "whole")]) == 0
    run, _ = reload(runs / "espcn")
    monkeypatch.setattr(run.task, "tile_above", 1000)
    monkeypatch.setattr(run.task, "tile", 128)
    sizes = []
    hook = run.model.register_forward_hook(lambda model, x, y: sizes.append(x[0].shape[-1]))
    assert apply.main([*words, str(tmp_path / "tiles")]) == 0
    hook.remove()
    assert max(sizes) == 128 and len(sizes) > 10
    whole, tiles = (read_photo(tmp_path / d / "a.png").pixels.astype(int) for d in ("whole", "tiles"))
    assert np.abs(whole - tiles).max() <= 1 and (whole != tiles).mean() < 1e-3  # equal but for rounding at a half


def test_small_images_of_one_size_go_together(runs, tmp_path, cat):
    from filtrun.reload import reload

    for i in range(5):
        write_photo(tmp_path / f"{i}.png", "png", np.roll(cat, i, 0))
    write_photo(tmp_path / "9.png", "png", cat[:30])
    run, _ = reload(runs / "same")
    sizes = []
    hook = run.model.register_forward_hook(lambda model, x, y: sizes.append(x[0].shape[0]))
    assert apply.main([str(runs / "same"), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    hook.remove()
    assert sizes == [5, 1]
    for i in range(5):
        assert np.array_equal(read_photo(tmp_path / "out" / f"{i}.png").pixels, np.roll(cat, i, 0))


def test_holes_from_a_file_a_folder_and_a_colour(runs, tmp_path, cat):
    hole = np.zeros((60, 80), np.uint8)
    hole[10:20, 30:50] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(hole).save(tmp_path / "masks" / "a.png")
    marked = cat.copy()
    marked[hole > 0] = (255, 0, 255)
    write_photo(tmp_path / "in" / "a.png", "png", marked)
    expected = np.where(hole[..., None] > 0, 51, cat)
    for i, mask in enumerate((tmp_path / "masks" / "a.png", tmp_path / "masks", "#ff00ff")):
        words = [str(runs / "fill"), str(tmp_path / "in"), f"--mask={mask}", "--out", str(tmp_path / f"out{i}")]
        assert apply.main(words) == 0
        assert np.array_equal(read_photo(tmp_path / f"out{i}" / "a.png").pixels, expected)


def test_a_mask_of_another_size_or_none_skips_the_image(runs, tmp_path, cat, capsys):
    write_photo(tmp_path / "in" / "a.png", "png", cat)
    write_photo(tmp_path / "in" / "b.png", "png", cat[:50])
    write_photo(tmp_path / "m.png", "png", cat[..., :1])
    words = [str(runs / "fill"), str(tmp_path / "in"), "--mask", str(tmp_path / "m.png"), "--out", str(tmp_path / "o")]
    assert apply.main(words) == 1
    told = capsys.readouterr()
    assert "b.png is 80x50 pixels, but its mask" in told.err and told.out.endswith(": 1 image written, 1 skipped\n")


def test_hdr_images(runs, tmp_path, capsys):
    from filtrun.data.hdr import write_radiance

    values = torch.rand(3, 12, 9) * 8
    values[:, 0, 0] = 8
    write_radiance(tmp_path / "a.hdr", values)
    stored = read_photo(tmp_path / "a.hdr").pixels
    assert apply.main([str(runs / "squeeze"), str(tmp_path / "a.hdr"), "--out", str(tmp_path / "out")]) == 0
    shown = read_photo(tmp_path / "out" / "a.png").pixels  # for a screen: 16 bits
    assert shown.dtype == np.uint16 and np.abs(shown / 65535 - stored / (1 + stored)).max() < 1e-4
    assert apply.main([str(runs / "same"), str(tmp_path / "a.hdr"), "--out", str(tmp_path / "out")]) == 0
    again = read_photo(tmp_path / "out" / "a.hdr").pixels
    assert np.abs(again - stored).max() <= 8 / 128  # the format's own precision; nothing is clipped at 1
    words = [str(runs / "same"), str(tmp_path / "a.hdr"), "--out", str(tmp_path / "out"), "--format", "tiff"]
    assert apply.main(words) == 0
    assert np.allclose(read_photo(tmp_path / "out" / "a.tif").pixels, stored, atol=1e-5)


def test_bad_files_are_named_and_the_rest_is_done(runs, tmp_path, cat, capsys):
    source = tmp_path / "in"
    write_photo(source / "good.png", "png", cat)
    write_photo(source / "good.jpg", "jpeg", cat)
    (source / "empty.png").touch()
    (source / "text.png").write_text("no image")
    (source / "cut.png").write_bytes((source / "good.png").read_bytes()[:900])
    (source / "gone.png").symlink_to("nowhere")
    words = [str(source), str(tmp_path / "typo.png")]
    assert apply.main([str(runs / "same"), *words, "--out", str(tmp_path / "out"), "--format", "png"]) == 1
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'out'}: 2 images written, 5 skipped\n"
    lines = told.err.splitlines()
    assert len(lines) == 5 and all(line.startswith("filtrun: skipped: ") for line in lines)
    for part in (r"typo\.png", r"empty\.png is empty \(0 bytes\)", r"text\.png is no image",
                 r"cut\.png is not an image", r"gone\.png is not a file"):  # fmt: skip
        assert sum(bool(re.search(part, line)) for line in lines) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good-2.png", "good.png"]


def test_results_are_not_replaced(runs, tmp_path, cat):
    write_photo(tmp_path / "a.png", "png", cat)
    words = [str(runs / "same"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert apply.main(words) == 0
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"out/a.png exists; choose another --out, or --force to replace it"):
        apply.main(words)
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine"
    assert apply.main([*words, "--force"]) == 0
    assert np.array_equal(read_photo(tmp_path / "out" / "a.png").pixels, cat)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(UserError, match="is one of the images or masks given"):
        apply.main([str(runs / "same"), str(tmp_path), "--out", str(tmp_path), "--force"])
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_failing_model_fails_its_image_only(runs, tmp_path, cat, capsys):
    from filtrun.reload import reload

    for name, value in (("a", 10), ("b", 255), ("c", 20)):
        write_photo(tmp_path / "in" / f"{name}.png", "png", np.full_like(cat, value))

    def bright(model, inputs):
        if inputs[0].max() >= 1:
            raise RuntimeError("too bright\nfor this model")

    run, _ = reload(runs / "same")
    hook = run.model.register_forward_pre_hook(bright)
    try:
        assert apply.main([str(runs / "same"), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    finally:
        hook.remove()
    told = capsys.readouterr()
    assert told.err == f"filtrun: skipped: {tmp_path / 'in' / 'b.png'}: too bright\n"
    assert told.out.endswith(": 2 images written, 1 skipped\n")


def test_knobs_turn_a_tunable_model(runs, tmp_path, cat):
    from filtrun.methods.restoration.tunable_layers import bake, make_tunable
    from filtrun.reload import reload

    write_photo(tmp_path / "a.png", "png", cat)
    words = [str(runs / "grey"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--force"]
    with pytest.raises(UserError, match="Same has no knobs"):
        apply.main([*words, "knobs.keep=1"])
    run, _ = reload(runs / "grey")
    make_tunable(run.model, ["dim", "keep"], mode="linear")
    try:
        with torch.no_grad():
            run.model.last.weight[0] *= 0.5
        assert apply.main([*words[:2], "knobs.keep=1", *words[2:]]) == 0
        assert np.array_equal(read_photo(tmp_path / "out" / "a.png").pixels, cat)
        assert apply.main([*words, "knobs.dim=1"]) == 0
        assert np.abs(read_photo(tmp_path / "out" / "a.png").pixels - cat / 2).max() <= 0.51
        with pytest.raises(UserError, match="unknown knob 'kep'; did you mean 'keep'"):
            apply.main([*words, "knobs.kep=1"])
        with pytest.raises(UserError, match="knobs.dim=x must be a number"):
            apply.main([*words, "knobs.dim=x"])
    finally:
        run.model.knobs.set({"keep": 1.0})
        bake(run.model)


def record_of(folder, task, target, status="finished"):
    from filtrun.record import Record

    folder.mkdir()
    config = {"task": {"_target_": target}, "trust": []} if target else {}
    Record(folder, task=task, status=status, config=config).write()
    return folder


def test_mistakes_that_concern_the_whole_call(runs, tmp_path, cat):
    write_photo(tmp_path / "a.png", "png", cat)
    (tmp_path / "bare").mkdir()
    image, out = str(tmp_path / "a.png"), str(tmp_path / "out")
    classify = record_of(tmp_path / "c", "classify", "filtrun.tasks.classify.Classify")
    diffuse = record_of(tmp_path / "d", "diffuse", "filtrun.tasks.diffuse.Diffuse")
    blank = record_of(tmp_path / "b", "", "", status="failed")
    same, fill = runs / "same", runs / "fill"
    for words, message in (
        ([tmp_path / "none", image, "--out", out], "there is no run"),
        ([tmp_path / "bare", image, "--out", out], "is no run folder"),
        ([classify, image, "--out", out], "task=classify: it gives labels, no images"),
        ([diffuse, image, "--out", out], f"task=diffuse: .* use `filtrun sample {re.escape(str(diffuse))}`"),
        ([blank, image, "--out", out], "no task in its record: the run is failed"),
        ([same, tmp_path / "bare", "--out", out], "no image found: .*bare has no images"),
        ([same, "typo.png", "--out", out], "no image found: there is no file 'typo.png'"),
        ([same, image, "--out", image], "a.png is a file; a folder is needed"),
        ([same, image, "--out", f"{image}/sub"], "a.png is a file; a folder is needed"),
        ([same, image], "the following arguments are required: --out"),
        ([same, "--out", out], "required: IMAGE"),
        ([same, image, "--out", out, "--mask", image], "task=denoise, which takes no --mask"),
        ([fill, image, "--out", out], "say where they are with --mask"),
        ([fill, image, "--out", out, "--mask", "none"], "no such file or folder"),
        ([same, image, "--out", out, "--quality", "0"], "must be from 1 to 100"),
        ([same, image, "--out", out, "--quality", "9", "--format", "png"], "--quality is for JPEG and WebP"),
        ([same, image, "--out", out, "--format", "bmp"], "invalid choice: 'bmp'"),
        ([same, image, "--out", out, "--qualty", "9"], "--qualty is no option; did you mean '--quality'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as told:
            apply.main([str(word) for word in words])
        assert len(str(told.value).splitlines()) <= 6
    assert not Path(out).exists()


def test_a_run_without_weights(tmp_path, cat, monkeypatch):
    monkeypatch.undo()  # the real reload
    write_photo(tmp_path / "a.png", "png", cat)
    unfinished = record_of(tmp_path / "u", "denoise", "filtrun.tasks.denoise.Denoise", status="interrupted")
    with pytest.raises(UserError, match=r"holds no trained model \(model.safetensors\): the run is interrupted"):
        apply.main([str(unfinished), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")])


def test_a_full_disk_ends_the_call(runs, tmp_path, cat, monkeypatch):
    import errno

    from filtrun.errors import RunFailure

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_photo(tmp_path / "a.png", "png", cat)
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFailure, match=r"No space left on device \(0 images are written\)"):
        apply.main([str(runs / "same"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")])


def test_the_real_command(runs, tmp_path, cat):
    write_photo(tmp_path / "in" / "a.png", "png", cat)
    (tmp_path / "in" / "b.png").touch()
    environment = os.environ | {"PYTHONPATH": str(runs), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "filtrun", "apply", str(runs / "same"), "in", "--out", "out", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "out: 1 image written, 1 skipped\n"), done.stderr
    assert done.stderr == "filtrun: skipped: in/b.png is empty (0 bytes)\n"
    assert np.array_equal(read_photo(tmp_path / "out" / "a.png").pixels, cat)


def test_ctrl_c_leaves_whole_files_only(runs, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png", compress_level=0)
    for i in range(1, 80):  # seconds of work: more than this process may have to wait for a turn on a busy machine
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    environment = os.environ | {"PYTHONPATH": str(runs), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "filtrun", "apply", str(runs / "same"), ".", "--out", "out", "--device", "cpu"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        out, end = tmp_path / "out", time.monotonic() + 120
        while not (out / "0.png").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=60)[1], process.returncode) == ("filtrun: interrupted\n", 1)
    made = sorted(path.name for path in out.iterdir())
    assert "0.png" in made and len(made) < 80 and set(made) <= {f"{i}.png" for i in range(80)}
    for name in made:
        assert np.array_equal(read_photo(out / name).pixels, read_photo(tmp_path / name).pixels)


def test_exit_codes(runs, tmp_path, cat, cli):
    write_photo(tmp_path / "a.png", "png", cat)
    assert cli("apply", runs / "same", "a.png", "--out", "out").code == 0
    again = cli("apply", runs / "same", "a.png", "--out", "out")
    assert (again.code, again.out) == (2, "") and again.err.startswith("filtrun: out/a.png exists;")
    (tmp_path / "b.png").touch()
    some = cli("apply", runs / "same", "a.png", "b.png", "--out", "more")
    assert (some.code, some.out) == (1, "more: 1 image written, 1 skipped\n")
    assert some.err == "filtrun: skipped: b.png is empty (0 bytes)\n"
