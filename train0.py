"""Phase 1: train the diffusion teacher.

    python train0.py                                             # CIFAR-10, downloaded to data/
    python train0.py --dataset folder --data_dir my_images       # any tree of <class>/<image>
    python train0.py --dataset shapes --preset demo              # nothing to download, minutes on a CPU
    python train0.py --resume                                    # goes on where runs/teacher stopped

Losses, speed and grids: runs/teacher/log.jsonl, runs/teacher/grids/*.png, tensorboard --logdir runs
"""

import torch

import diffusion
from model import SimpleUNet
from support import checkpoint, data, errors, flags, hardware, networks, processes, resume, teachers, validation
from support.ema import EMA
from support.meter import add_part
from support.optimizers import Optimizer, lr_factor
from support.pictures import MAX_ROWS
from support.randomness import StepRandom, image_noise
from support.recorded import recorded
from support.run import Run

# Why each value, and what else was tried: docs/tuning.md.
PRESETS = {
    # The figures of `shapes`, minutes on 2 CPU cores.
    "demo": dict(
        dataset="shapes", channels=16, batch_size=32, steps=1800, lr=3e-3, ema_decay=0.998, p_mean=0.3, p_std=1.5,
        log_every=20, sample_every=900, save_every=500,
    ),
    # Photographs, three quarters of an hour on 2 CPU cores.
    "cifar10": dict(
        channels=32, batch_size=64, steps=9000, optimizer="muon", lr=4e-3, ema_decay=0.999, p_mean=-0.8, p_std=1.4,
        label_dropout=0.1, log_every=50, sample_every=1000, save_every=500,
    ),
    # The same for one GPU: twice the width, half the rate, eight times the images.
    "cifar10_gpu": dict(
        channels=64, batch_size=512, steps=18_000, optimizer="muon", lr=2e-3, ema_decay=0.999, p_mean=-0.8, p_std=1.4,
        label_dropout=0.1, save_every=3000, compile=True,
    ),
}
# What --resume refuses to change: two steps can follow one another only if these stay as they were.
FIXED = ("dataset", "channels", "blocks", "seed", "optimizer")


def fitting(args):
    """The name of the preset for the images and the machine."""
    return resume.fitting(args, figures=args.dataset == "shapes")


def parse_args(argv=None):
    parser = flags.Parser(description="Train the diffusion teacher.")
    flags.add_dataset(parser)
    learning = flags.add_training(
        parser, PRESETS, run_dir="runs/teacher", steps=50_000, batch_size=256, sample_every=2500, save_every=1000
    )
    learning.add_argument("--lr", type=flags.rate, default=1e-3, help="peak learning rate")
    parser.set_defaults(lr_schedule="cosine")
    learning.add_argument("--ema_decay", type=flags.number(float, 0, 1), default=0.9995, help="per step, at most")
    learning.add_argument("--p_mean", type=flags.number(float, -7, 7), default=-1.2, help="mean of ln(sigma)")
    learning.add_argument("--p_std", type=flags.number(float, 0, 4), default=1.2, help="its standard deviation")
    network = parser.add_argument_group("the network")
    network.add_argument("--channels", type=flags.number(int, 8), default=64, help="of the first level, in eights")
    network.add_argument("--blocks", type=flags.count, default=1, help="residual blocks per level")
    network.add_argument(
        "--init", type=flags.path, help="a teacher whose averaged weights to begin with, all but those of classes that "
        "it does not know; default: none"
    )
    guidance = parser.add_argument_group("what guidance will need")
    guidance.add_argument(
        "--label_dropout", type=flags.fraction, default=0.0, help="share of images shown without their class"
    )
    guidance.add_argument(
        "--guide_at", type=flags.fraction, default=0.3333,
        help="share of the steps after which the averaged weights are kept as guide.pt, for autoguidance, once in a "
        "run; 0: never",
    )
    flags.add_measuring(parser)
    args, state = resume.parse(parser, "teacher", PRESETS, fitting, argv, FIXED)
    if args.init and not state:
        teachers.take_shape(args)
    if args.channels % 8:
        parser.error(f"--channels {args.channels} is not a multiple of 8")
    return args, state


def main(argv=None):
    args, state = parse_args(argv)
    device = hardware.start(args)
    dataset = data.from_flags(args, state)
    torch.manual_seed(args.seed)

    # --- network, EMA, optimizer -------------------------------------------------------------------------------------
    net = SimpleUNet(args.channels, len(dataset.classes), args.blocks)
    if args.init and not state:
        teachers.begin_from(args.init, net, dataset.classes)
    net = net.to(device, memory_format=torch.channels_last)
    ema = EMA(net, args.ema_decay)
    bf16, fp16 = hardware.uses_bf16(device, args.precision), args.precision == "fp16"
    optimizer = Optimizer(args.optimizer, {net: args.lr}, bf16, fp16)
    batches = data.Batches(dataset, args.batch_size, args.seed, device)
    parts = dict(model=net, ema=ema, optimizer=optimizer, batches=batches)
    resume.restore(args, state, parts)
    if args.compile:
        net.compile()

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

    measure = validation.from_flags(args, dataset, device)
    run = Run(args, state, device, parts, describe, sample, measure)
    del state                                       # several times the size of the network
    guide = run.path / checkpoint.GUIDE
    rows = min(len(dataset.classes), MAX_ROWS)
    grid_z = image_noise(args.seed, range(8 * rows)).to(device)
    grid_labels = torch.arange(8 * rows, device=device) % rows

    def draw():
        run.grid("teacher", rows, sample(grid_z, grid_labels))

    # --- the step, and the loop --------------------------------------------------------------------------------------
    @recorded(device, args.compile and args.record and not fp16)
    def train_step(rngs, images, classes, factor):  # of the batch; of rngs one for each of its --accumulate parts
        log, k = {}, len(rngs)
        for rng, x_0, labels in zip(rngs, images.chunk(k), classes.chunk(k), strict=True):      # [B, 3, 32, 32], [B]
            n = len(x_0)
            if args.flip:
                x_0 = data.random_flip(x_0, rng)
            if args.label_dropout:
                labels = labels.masked_fill(rng.uniform(n) < args.label_dropout, -1)            # no class
            sigma = diffusion.lognormal_sigma(rng.normal(n, 1, 1, 1), args.p_mean, args.p_std)  # [B, 1, 1, 1]

            # L = mean(w(sigma) (x0_hat(x_0 + sigma eps) - x_0)^2)    Karras et al. 2022, equations 2 and 8
            x_t = (x_0 + sigma * rng.normal(*x_0.shape)).to(memory_format=torch.channels_last)
            with hardware.autocast(device, args.precision):
                x0_hat = net(x_t, sigma, labels)
            loss = (diffusion.karras_weight(sigma) * (x0_hat - x_0) ** 2).mean()
            optimizer.backward(loss / k)
            add_part(log, k, loss=loss)

        log["grad_norm"] = optimizer.clip(args.max_grad_norm)
        optimizer.step(factor)
        optimizer.zero_grad()
        ema.update_parameters(net)
        return log

    for step in run.steps():
        factor = lr_factor(step, args)              # learning rate, as a fraction of its peak
        rngs = [StepRandom(args.seed, step, device, *share) for share in processes.shares(args.accumulate)]
        log = train_step(rngs, *batches(step, *processes.SHARE), factor)

        run.count(**log, lr=args.lr * factor)
        late = args.guide_at and run.step >= args.guide_at * args.steps
        if late and not guide.exists() and log["grad_norm"].isfinite():
            checkpoint.save(guide, dict(describe(), step=run.step))     # before run.keep: no resume may miss it
        run.keep(draw)


if __name__ == "__main__":
    errors.run(main)
