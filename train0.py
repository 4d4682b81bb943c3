"""Step 1: train the diffusion teacher.

    python train0.py                                             # CIFAR-10, downloaded to data/
    python train0.py --dataset folder --data_dir my_images       # any tree of <class>/<image>
    python train0.py --dataset shapes --preset demo              # nothing to download, minutes on a CPU
    python train0.py --resume                                    # continues the run in runs/teacher

Losses, speed and grids: runs/teacher/log.jsonl, runs/teacher/grids/*.png, tensorboard --logdir runs. Flags: settings.py
"""

import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")       # which torch reads when it is loaded

import settings
from support import errors

if __name__ == "__main__":                          # --help and wrong flags, before torch, which takes seconds to load
    errors.early(settings.teacher_parser)

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

import diffusion
from model import SimpleUNet
from settings import parse_teacher as parse_args
from support import checkpoint, data, hardware, networks, pictures, processes, resume, teachers, validation
from support.ema import EMA
from support.meter import add_microbatch
from support.optimizers import Optimizer, lr_factor
from support.randomness import StepRandom
from support.recorded import recorded
from support.run import Run


@dataclass
class Denoising:
    """The teacher's training step."""

    net: torch.nn.Module                            # a denoiser (x_t, sigma, labels) -> x0_hat
    ema: EMA
    optimizer: Optimizer
    p_mean: float = -1.2                            # ln(sigma) ~ N(p_mean, p_std^2)
    p_std: float = 1.2
    label_dropout: float = 0.0                      # fraction of the images trained without their class
    flip: bool = True                               # mirror half of the images
    max_grad_norm: float = 10.0                     # longer gradients are scaled down
    autocast: Callable = nullcontext                # () -> context in which the network runs
    record: Callable = lambda train_step: train_step            # decorator of the step, as of support.recorded

    def __post_init__(self):
        self.train_step = self.record(self.train_step)

    def train_step(self, rngs, images, classes, factor):
        """A step on images [B, 3, H, W] in [-1, 1], at factor times the peak learning rate. Returns the log.

        rngs has one StepRandom per microbatch.
        """
        log, k = {}, len(rngs)
        self.optimizer.zero_grad()
        for rng, x_0, labels in zip(rngs, images.chunk(k), classes.chunk(k), strict=True):      # [B, 3, H, W], [B]
            n = len(x_0)
            if self.flip:
                x_0 = data.random_flip(x_0, rng)
            if self.label_dropout:
                labels = labels.masked_fill(rng.uniform(n) < self.label_dropout, -1)            # no class
            sigma = diffusion.lognormal_sigma(rng.normal(n, 1, 1, 1), self.p_mean, self.p_std)  # [B, 1, 1, 1]

            # L = mean(w(sigma) (x0_hat(x_0 + sigma eps) - x_0)^2)    Karras et al. 2022, equations 2 and 8
            x_t = (x_0 + sigma * rng.normal(*x_0.shape)).to(memory_format=torch.channels_last)
            with self.autocast():
                x0_hat = self.net(x_t, sigma, labels)
            loss = (diffusion.karras_weight(sigma) * (x0_hat - x_0) ** 2).mean()
            self.optimizer.backward(loss / k)
            add_microbatch(log, k, loss=loss)

        log["grad_norm"] = self.optimizer.clip(self.max_grad_norm)
        self.optimizer.step(factor)
        self.ema.update_parameters(self.net)
        return log


def main(argv=None):
    args, state = parse_args(argv)
    device = hardware.start(args)
    dataset = data.from_flags(args, state)
    torch.manual_seed(args.seed)

    # --- network, EMA, optimizer -------------------------------------------------------------------------------------
    net = SimpleUNet(args.channels, len(dataset.classes), args.blocks, image_size=args.image_size)
    if args.init and not state:
        teachers.begin_from(args.init, net, dataset.classes)
    net = net.to(device, memory_format=torch.channels_last)
    ema = EMA(net, args.ema_decay)
    bf16, fp16 = hardware.uses_bf16(device, args.precision), args.precision == "fp16"
    optimizer = Optimizer(args.optimizer, {net: args.lr}, bf16, fp16)
    batches = data.Batches(dataset, args.batch_size, args.seed, device)
    stateful = dict(model=net, ema=ema, optimizer=optimizer, batches=batches)
    resume.restore(args, state, stateful)
    if args.compile:
        net.compile()
    denoising = Denoising(
        net, ema, optimizer, args.p_mean, args.p_std, args.label_dropout, args.flip, args.max_grad_norm,
        autocast=partial(hardware.autocast, device, args.precision),
        record=recorded(device, args.compile and args.record and not fp16),
    )

    def describe():
        """What sampling, distillation and autoguidance need of the teacher."""
        return dict(
            kind="teacher", classes=dataset.classes, model_config=networks.described(net),
            model_ema=ema.module.state_dict(), ema_decay=ema.decay, label_dropout=args.label_dropout,
            sigma_min=args.sigma_min, sigma_max=args.sigma_max,
        )

    def sample(z, labels, renoise=None):
        with hardware.autocast(device, args.precision):
            return diffusion.heun_sample(ema.module, z, labels, 18, args.sigma_min, args.sigma_max)

    run = Run(args, state, device, stateful, describe, sample, validation.from_flags(args, dataset, device))
    del state                                       # several times the size of the network
    guide = run.path / checkpoint.GUIDE
    rows, grid_labels, noise = pictures.grid_inputs(args.seed, len(dataset.classes), args.image_size, device)
    grid_z = noise(0)

    def draw():
        run.grid("teacher", rows, sample(grid_z, grid_labels))

    # --- the loop ----------------------------------------------------------------------------------------------------
    for step in run.steps():
        factor = lr_factor(step, args.steps, args.warmup_steps, args.lr_schedule)   # of the peak learning rate
        rngs = [StepRandom(args.seed, step, device, *share) for share in processes.shares(args.accumulate)]
        log = denoising.train_step(rngs, *batches(step, *processes.SHARE), factor)

        run.count(**log, lr=args.lr * factor)
        late = args.guide_at and run.step >= args.guide_at * args.steps
        if late and not guide.exists() and log["grad_norm"].isfinite():
            checkpoint.save(guide, dict(describe(), step=run.step))     # before run.keep, so that a resume has it
        run.keep(draw)


if __name__ == "__main__":
    errors.run(main)
