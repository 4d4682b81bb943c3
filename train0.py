"""Phase 1: train the diffusion teacher.

    python train0.py                                             # CIFAR-10, downloaded to data/
    python train0.py --dataset folder --data_dir my_images       # any tree of <class>/<image>
    python train0.py --dataset shapes --preset demo              # nothing to download, minutes on a CPU
    python train0.py --resume                                    # goes on where runs/teacher stopped

Losses, speed and grids: runs/teacher/log.jsonl, runs/teacher/grids/*.png, tensorboard --logdir runs
"""

import math

import torch
from tqdm import tqdm

import checkpoint
import cli
import data
import diffusion
import distributed
import runtime
from model import SimpleUNet
from optimizers import Optimizer
from randomness import StepRandom, image_noise

PRESETS = {
    # The ten figures of `shapes`, in minutes on 2 CPU cores.
    "demo": dict(
        dataset="shapes", channels=16, batch_size=32, steps=1800, lr=3e-3, ema_decay=0.998,
        # Flat figures are decided at higher noise than photographs: at the default -1.2 and 1.2 they stay motley.
        p_mean=0.3, p_std=1.5,
        log_every=20, sample_every=900, save_every=500,
    ),
    # CIFAR-10 in an hour or so on 2 CPU cores. Muon at this rate comes to the loss of 32,000 steps of Adam in a quarter
    # of the time, though not quite to their distance (results/README.md). More noise than the default's -1.2 and 1.2
    # costs a little loss at the least noise and wins as much at the most (results/cifar10_tuning.md).
    "cifar10": dict(
        channels=32, batch_size=64, steps=9000, optimizer="muon", lr=4e-3, ema_decay=0.999, p_mean=-0.8, p_std=1.4,
        label_dropout=0.1, log_every=50, sample_every=1000, save_every=500,
    ),
    # The same for a GPU: four times the network, eleven times the images, half the rate for twice the width. Minutes on
    # an H100, which launches a step's kernels no faster for smaller batches (results/README.md).
    "cifar10_gpu": dict(
        channels=64, batch_size=512, steps=12_000, optimizer="muon", lr=2e-3, ema_decay=0.999, p_mean=-0.8, p_std=1.4,
        label_dropout=0.1, save_every=3000, compile=True,
    ),
}
# What --resume refuses to change: two steps can follow one another only if these stay as they were.
FIXED = ("dataset", "channels", "blocks", "batch_size", "seed", "optimizer")


def parse_args(argv=None):
    parser = cli.Parser(description="Train the diffusion teacher.")
    cli.add_dataset(parser, "images")
    cli.add_training(
        parser, PRESETS, run_dir="runs/teacher", steps=50_000, batch_size=256, sample_every=2500, save_every=1000
    )
    parser.add_argument("--channels", type=cli.number(int, 8), default=64, help="of the first level, a multiple of 8")
    parser.add_argument("--blocks", type=cli.count, default=1, help="residual blocks per level")
    parser.add_argument("--lr", type=cli.rate, default=1e-3, help="peak learning rate")
    parser.set_defaults(lr_schedule="cosine")
    parser.add_argument("--ema_decay", type=cli.number(float, 0, 1), default=0.9995, help="per step, at most (see EMA)")
    parser.add_argument(
        "--label_dropout", type=cli.fraction, default=0.0, help="share of images shown without their class (guidance)"
    )
    parser.add_argument(
        "--sigma_sampling", choices=["lognormal", "grid"], default="lognormal",
        help="training noise: ln(sigma) ~ N(p_mean, p_std^2), or uniform over the 1000 Karras steps",
    )
    parser.add_argument(
        # At 0.15 the student of preset cifar10 was at three times the distance after 600 steps: too weak a guide.
        "--guide_at", type=cli.fraction, default=0.3333,
        help="share of the steps after which the averaged weights are kept as guide.pt, for autoguidance, once in a "
        "run; 0: never",
    )
    parser.add_argument("--p_mean", type=cli.number(float, -7, 7), default=-1.2, help="mean of ln(sigma)")
    parser.add_argument("--p_std", type=cli.number(float, 0, 4), default=1.2, help="standard deviation of ln(sigma)")
    args, state = cli.parse_training(parser, "teacher", PRESETS, argv, FIXED)
    if args.channels % 8:
        parser.error(f"--channels {args.channels} is not a multiple of 8")
    return args, state


def main(argv=None):
    args, state = parse_args(argv)
    device = cli.device(args)
    dataset = cli.dataset(args, state)
    torch.manual_seed(args.seed)

    # --- network, EMA, optimizer -------------------------------------------------------------------------------------
    net = SimpleUNet(args.channels, len(dataset.classes), args.blocks)
    net = net.to(device, memory_format=torch.channels_last)
    emas = checkpoint.EMAs(net, [args.ema_decay, *args.more_ema_decays])
    optimizer = Optimizer(args.optimizer, {net: args.lr}, runtime.uses_bf16(device, args.precision))
    step = 0
    if state:
        with cli.restoring(args.run_dir):
            net.load_state_dict(state["model"])
            emas.load(state)
            optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    best = (state or {}).get("best", dict(distance=math.inf, step=0))
    meter, fresh = runtime.Meter(step, device, state and state["meter"]), state is None
    del state                                       # several times the size of the network
    if args.compile:
        net.compile()

    validation = cli.validation(args, dataset, device)
    if validation and best.get("of") != validation.of:
        best = dict(distance=math.inf, step=0, of=validation.of)
    batches = data.Batches(dataset, args.batch_size, args.seed, device, distributed.RANK, distributed.WORLD)
    sigmas = diffusion.karras_sigmas(sigma_min=args.sigma_min, sigma_max=args.sigma_max).float().to(device)
    run = runtime.RunFolder(args.run_dir, args.stamp)
    stop = runtime.StopSignal(args.max_minutes)

    def teacher_state(ema=emas[0]):
        return dict(                                # what sampling, distillation and autoguidance need of it
            kind="teacher", step=step, classes=dataset.classes, model_config=net.config,
            model_ema=ema.module.state_dict(), ema_decay=ema.decay,
            sigma_min=args.sigma_min, sigma_max=args.sigma_max, label_dropout=args.label_dropout,
        )

    def save(name=checkpoint.NAME, ema=emas[0]):
        distributed.check_same(net, emas)
        checkpoint.save(
            run.path / name,
            dict(
                teacher_state(ema),
                # From here on what only a resume needs; the randomness and the place in the data follow from the step.
                settings=cli.settings(args), model=net.state_dict(), emas=emas.state(), meter=meter.state(),
                best=best, optimizer=optimizer.state_dict(),
            ),
        )

    if fresh:                                       # whether the disk takes it shows now, not after an hour
        save()
    run.begin(step)

    rows = min(len(dataset.classes), runtime.GRID_ROWS)
    grid_z = image_noise(args.seed, range(8 * rows)).to(device)
    grid_labels = torch.arange(8 * rows, device=device) % rows

    def draw(net, z, labels, renoise=None):
        return diffusion.heun_sample(net, z, labels, 18, args.sigma_min, args.sigma_max)

    def log_grid():
        with runtime.autocast(device, args.precision):
            images = draw(emas[0].module, grid_z, grid_labels)
        run.grid(step, "teacher", rows, images)

    @torch.no_grad()
    def measure():
        with runtime.autocast(device, args.precision):
            values, better = validation.compare(emas, draw, best, step)
        run.scalars(step, values)
        if better:
            save(checkpoint.BEST, better)
        save()

    def due():
        return validation and (step % args.eval_every == 0 or step == args.steps)

    # --- the loop ----------------------------------------------------------------------------------------------------
    if step and due() and best.get("measured") != step:
        measure()                                   # the run was killed while it did
    meter.rate(step)                                # speed counts from here
    bar = tqdm(total=args.steps, initial=step, unit="step", dynamic_ncols=True, disable=not distributed.MAIN)
    while step < args.steps and not stop:
        rng = StepRandom(args.seed, step, device, distributed.RANK, distributed.WORLD)
        x_0, labels = batches(step)                                                 # [B, 3, 32, 32], [B]
        n = len(x_0)
        if args.flip:
            x_0 = data.random_flip(x_0, rng)
        if args.label_dropout:
            labels = torch.where(rng.uniform(n) < args.label_dropout, -1, labels)   # -1: no class
        if args.sigma_sampling == "lognormal":
            sigma = diffusion.lognormal_sigma(rng.normal(n, 1, 1, 1), args.p_mean, args.p_std)
        else:
            sigma = sigmas[rng.integers(0, len(sigmas) - 1, n, 1, 1, 1)]            # [B, 1, 1, 1]

        # L = mean(w(sigma) (x0_hat(x_0 + sigma eps) - x_0)^2)        Karras et al. 2022, equations 2 and 8
        x_t = (x_0 + sigma * rng.normal(*x_0.shape)).to(memory_format=torch.channels_last)
        with runtime.autocast(device, args.precision):
            x0_hat = net(x_t, sigma, labels)
        loss = (diffusion.karras_weight(sigma) * (x0_hat - x_0) ** 2).mean()

        loss.backward()
        distributed.average_gradients(net.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
        lr_factor = runtime.lr_factor(step, args)
        optimizer.step(lr_factor)
        optimizer.zero_grad()
        emas.update(net)
        meter.add(step, loss=loss, grad_norm=grad_norm)
        step += 1
        bar.update()

        if step % args.log_every == 0 or step == args.steps:
            means = meter.read()
            images_per_second = meter.rate(step) * args.batch_size
            bar.set_postfix(loss=f"{means['loss']:.4f}", images_per_s=f"{images_per_second:.0f}")
            memory = runtime.peak_memory_mib(device)
            lr = args.lr * lr_factor
            run.scalars(step, dict(means, lr=lr, images_per_second=images_per_second, memory_mib=memory))
        with meter.paused():
            if step % args.sample_every == 0 or step == args.steps:
                log_grid()
            # Before save(), so that no resume begins after the step and without the file. No guide of a diverged run.
            guide = run.path / checkpoint.GUIDE
            if args.guide_at and step >= args.guide_at * args.steps and not guide.exists() and grad_norm.isfinite():
                checkpoint.save(guide, teacher_state())
            if step % args.save_every == 0 or step == args.steps or due():
                save()                              # before a measurement, too: what ends that must not cost steps
            if due():
                measure()
    if step < args.steps:
        save()
    bar.close()
    run.close()
    how = "done" if step >= args.steps else "stopped; --resume goes on"
    if distributed.MAIN:
        print(f"{how}: step {step} of {args.steps}, {run.path / checkpoint.NAME}, grids in {run.path / 'grids'}")


if __name__ == "__main__":
    cli.run(main)
