"""Images a second of the samplers here against diffusers' with the same network, steps and precision, taken in turn.

Run with ``python -m bench.sampler [--device cuda]``. The network is a ``UNet2DModel`` of diffusers with random weights,
DDIM's steps are the scheduler's own, and both start from the same noise, so that they also have to draw the same
pictures. Rows:

- *plain*: ``DDIMPipeline`` and `filtrun.diffusion.samplers.ddim`;
- *guided*: the loop of diffusers' class-conditional pipelines (a doubled batch through the network, two halves mixed,
  ``scheduler.step``), and ddim under `cfg`;
- *adaptive*: guidance that stops early (Adaptive Guidance), against guidance to the end: wall time should fall as
  network evaluations do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from filtrun.compat import torchvision
from filtrun.diffusion.denoiser import Denoiser
from filtrun.diffusion.guidance import cfg
from filtrun.diffusion.noise import noise_levels
from filtrun.diffusion.samplers import ddim
from filtrun.methods.guidance.adaptive_guidance import adaptive_guidance
from filtrun.models.diffusers_models import DiffusersDenoiser

CLASSES, SCALE = 10, 4.0


def turns(contenders: dict[str, Callable[[], Tensor]], rounds: int, cuda: bool) -> dict[str, float]:
    """Seconds of each one's best round; on a CPU its CPU time, which others' work hardly changes."""
    clock = time.perf_counter if cuda else time.process_time
    best = dict.fromkeys(contenders, float("inf"))
    for i in range(rounds + 1):
        for name, work in contenders.items() if i % 2 else reversed(contenders.items()):
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            work()
            if cuda:
                torch.cuda.synchronize()
            if i:  # the first is for warming up
                best[name] = min(best[name], clock() - start)
    return best


def main() -> int:
    """Measure and print; returns 1 when diffusers is faster by more than the noise, 2 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--widths", type=int, nargs=2, default=(32, 64), help="channels of the network")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    cuda = options.device != "cpu"
    if not cuda:
        torch.set_num_threads(1)  # a second one spins while it waits, and that counts as CPU time
    torchvision()
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)

    def network(classes: int | None) -> Any:
        made: Any = UNet2DModel(
            sample_size=options.side, in_channels=3, out_channels=3, layers_per_block=1,
            block_out_channels=tuple(options.widths),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=classes,
        )  # fmt: skip
        return made.to(options.device).eval()

    plain_net, net = network(None), network(CLASSES + 1)
    scheduler = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(options.steps)
    times = scheduler.timesteps
    levels = noise_levels("linear", 0.5)
    alpha_bar = scheduler.alphas_cumprod[times].double()
    sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1, dtype=torch.float64)]).float()
    size = (options.batch, 3, options.side, options.side)
    classes = (torch.arange(options.batch) % CLASSES).to(options.device)
    noise = torch.randn(size, generator=torch.Generator(options.device).manual_seed(1), device=options.device)
    pipeline = DDIMPipeline(plain_net, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    plain_denoiser = Denoiser(DiffusersDenoiser(plain_net, CLASSES, options.side), levels, "eps", num_classes=CLASSES)
    denoiser = Denoiser(DiffusersDenoiser(net, CLASSES, options.side), levels, "eps", num_classes=CLASSES)
    start = levels.start(noise, sigmas[0].item())

    def images(x: Tensor) -> Tensor:
        return ((x + 1) / 2).clamp(0, 1).float().cpu()

    def plain_theirs() -> Tensor:
        drawn = pipeline(
            batch_size=options.batch, num_inference_steps=options.steps, output_type="np", return_dict=False,
            generator=torch.Generator(options.device).manual_seed(1),
        )[0]  # fmt: skip
        return torch.from_numpy(drawn).permute(0, 3, 1, 2)

    @torch.no_grad()
    def plain_ours() -> Tensor:
        return images(ddim(plain_denoiser, start, sigmas))

    @torch.no_grad()
    def guided_theirs() -> Tensor:
        x = noise
        labels = torch.cat([classes, torch.full_like(classes, CLASSES)])
        scheduler.set_timesteps(options.steps)
        for t in scheduler.timesteps:
            twice = scheduler.scale_model_input(torch.cat([x, x]), t)
            with_class, without = net(twice, t.expand(len(twice)).to(x.device), class_labels=labels).sample.chunk(2)
            x = scheduler.step(without + SCALE * (with_class - without), t, x).prev_sample
        return images(x)

    @torch.no_grad()
    def guided_ours() -> Tensor:
        return images(ddim(cfg(denoiser, SCALE), start, sigmas, classes))

    ok = True
    where = torch.cuda.get_device_name() if cuda else "one CPU thread, CPU time"
    what = f"{options.batch} images of {options.side} x {options.side}, widths {tuple(options.widths)}"
    print(f"{what}, {options.steps} steps of DDIM, fp32, {where}; best of {options.rounds}:")
    for name, theirs, ours in (("plain", plain_theirs, plain_ours), ("guided", guided_theirs, guided_ours)):
        seconds = turns({"theirs": theirs, "ours": ours}, options.rounds, cuda)
        rates = {who: options.batch / s for who, s in seconds.items()}
        ratio = rates["ours"] / rates["theirs"]
        ok = ok and ratio > 0.98
        apart = (theirs() - ours()).abs().max().item()
        print(
            f"  {name}: filtrun {rates['ours']:.2f} images/s, diffusers {rates['theirs']:.2f}, {ratio:.3f} x "
            f"(pictures differ by at most {apart:.1e})",
            flush=True,
        )

    shares = {"to the end": 1.0, "three quarters": 0.75, "half": 0.5, "a quarter": 0.25}
    evaluations: dict[str, float] = {}

    def adaptive(name: str, share: float) -> Callable[[], Tensor]:
        @torch.no_grad()
        def draw() -> Tensor:
            # every cosine is above -2: guidance ends when it may, as in runs whose noises agree by then
            guided = adaptive_guidance(denoiser, SCALE, -2.0, round(share * options.steps))
            denoiser.reset()
            x = ddim(guided, start, sigmas, classes)
            evaluations[name] = denoiser.nfe
            return x

        return draw

    seconds = turns({name: adaptive(name, share) for name, share in shares.items()}, options.rounds, cuda)
    for name in list(shares)[1:]:
        calls = evaluations[name] / evaluations["to the end"]
        wall = seconds[name] / seconds["to the end"]
        print(f"  guided {name} of the steps: {calls:.3f} of the evaluations, {wall:.3f} of the time")
    return int(not ok)


if __name__ == "__main__":
    raise SystemExit(main())
