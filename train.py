"""Phase 2: distil the teacher into a one-step generator with DMD2 (Yin et al. 2024, arXiv 2405.14867).

    python train.py --conditioning_sigma 80                      # from runs/teacher into runs/dmd2
    python train.py --gen_cls_loss_weight 3e-3                   # with the adversarial loss on the teacher's images
    python train.py --num_denoising_steps 4                      # a generator of four steps
    python train.py --teacher runs/demo/teacher --preset demo    # minutes on a CPU
    python train.py --resume                                     # goes on where runs/dmd2 stopped

Neither loss shows progress (each chases a moving target): look at runs/dmd2/grids, the teacher on the left and the
student from the same noise on the right. Losses and speed: runs/dmd2/log.jsonl, tensorboard --logdir runs
"""

import math
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import checkpoint
import cli
import data
import diffusion
import distributed
import runtime
from guidance import F_DIVERGENCES
from model import SimpleUNet
from optimizers import Optimizer
from randomness import StepRandom, image_noise
from unified_model import UnifiedModel

PRESETS = {
    # The teacher of train0.py's preset of this name, in minutes on 2 CPU cores.
    "demo": dict(
        batch_size=32, steps=2100, dfake_gen_update_ratio=2, generator_lr=5e-4, guidance_lr=3e-3, ema_decay=0.97,
        lr_schedule="cosine", log_every=20, sample_every=500, save_every=500,
        # From 80 the generator starts at one image per class and loses colours on the way to many; at 3 the teacher's
        # single step already follows z. Noise below step 150 or above 750 says nothing about flat figures, and above
        # 600 the GAN cannot tell them from blurred ones: with 1000 the distance after 500 steps was 9.1 instead of 5.1.
        gen_cls_loss_weight=3e-2, diffusion_gan_max_timestep=600,
        conditioning_sigma=3.0, min_step_percent=0.15, max_step_percent=0.75,
    ),
    # Photographs, from the teacher of train0.py's preset of this name. No GAN: it took half as much time again for more
    # variety, but no less distance (results/README.md). Guidance makes the distance smaller, at less cost of variety
    # where it leaves out the high noise, and with 3 instead of 4; and so does a DM loss without the least and the most
    # noise. That fake_unet learns this range alone took the distance after 1,200 steps from 11.0 to 9.1
    # (results/cifar10_tuning.md). Autoguidance gives back variety of the teacher; its guide must not be too weak
    # (results/README.md).
    "cifar10": dict(
        batch_size=64, steps=2400, optimizer="muon", dfake_gen_update_ratio=2, generator_lr=5e-4, guidance_lr=3e-3,
        ema_decay=0.97, guidance_scale=3.0, guidance_interval=[0.15, 5.0], autoguidance_scale=2.0,
        min_step_percent=0.1, max_step_percent=0.65, fake_noise="dm", conditioning_sigma=3.0, lr_schedule="cosine",
        log_every=20, sample_every=600, save_every=200,
    ),
    # The same for a GPU and its larger teacher: half the rates for twice the width, eight times the images, and a
    # guidance of 2, for which no other was tried. Minutes on an H100 (results/README.md).
    "cifar10_gpu": dict(
        batch_size=512, steps=2400, optimizer="muon", dfake_gen_update_ratio=2, generator_lr=2.5e-4, guidance_lr=1.5e-3,
        ema_decay=0.99, guidance_scale=2.0, guidance_interval=[0.15, 5.0], autoguidance_scale=2.0,
        min_step_percent=0.1, max_step_percent=0.65, fake_noise="dm", conditioning_sigma=3.0, lr_schedule="cosine",
        sample_every=400, save_every=1200, compile=True,
    ),
}
# What --resume refuses to change: two steps can follow one another only if these stay as they were.
FIXED = (
    "teacher", "guide", "dataset", "batch_size", "seed", "optimizer", "conditioning_sigma", "num_denoising_steps",
    "sigma_min", "sigma_max",
)


def parse_args(argv=None):
    parser = cli.Parser(description="Distil the teacher into a one-step generator.")
    parser.add_argument("--teacher", type=cli.path, default="runs/teacher", help="a teacher's run folder or checkpoint")
    cli.add_training(
        parser, PRESETS, run_dir="runs/dmd2", steps=50_000, batch_size=256, sample_every=1000, save_every=1000
    )
    parser.add_argument(
        "--conditioning_sigma", type=cli.noise, default=80.0, help="noise level that the generator starts from"
    )
    parser.add_argument(
        "--dfake_gen_update_ratio", type=cli.count, default=10, help="guidance turns per generator turn"
    )
    noise = "noise of the DM loss, as a fraction of the 1000 Karras steps"
    parser.add_argument("--min_step_percent", type=cli.fraction, default=0.02, help=f"least {noise}")
    parser.add_argument("--max_step_percent", type=cli.fraction, default=0.98, help=f"most {noise}")
    parser.add_argument(
        "--fake_noise", choices=["all", "dm"], default="all",
        help="what fake_unet learns: all of the 1000 steps, as in the paper, or only the range of the DM loss",
    )
    parser.add_argument("--generator_lr", type=cli.rate, default=1e-4, help="learning rate of feedforward_model")
    parser.add_argument("--guidance_lr", type=cli.rate, default=2e-4, help="learning rate of fake_unet")
    parser.add_argument("--cls_head_lr", type=cli.rate, help="learning rate of the GAN's head; default: guidance_lr")
    parser.add_argument(
        "--ema_decay", type=cli.fraction, default=0.999, help="of the generator, per generator turn, at most (see EMA)"
    )
    parser.add_argument(
        "--gen_cls_loss_weight", type=cli.weight, default=0.0,
        help="weight of the GAN loss in the generator turn, 3e-3 in the paper; 0: no GAN, and no dataset needed",
    )
    parser.add_argument(
        "--cls_loss_weight", type=cli.weight, default=1e-2, help="weight of the GAN loss in the guidance turn"
    )
    parser.add_argument(
        "--diffusion_gan_max_timestep", type=cli.number(int, 0, diffusion.NUM_TRAIN_TIMESTEPS), default=1000,
        help="the GAN sees images noised to a random one of so many of the 1000 Karras steps; 0: clean images",
    )
    parser.add_argument(
        "--f_div", choices=list(F_DIVERGENCES), default="rkl",
        help="divergence that the DM gradient lowers; kl and js need the GAN",
    )
    parser.add_argument(
        "--num_denoising_steps", type=cli.number(int, 1, 100), default=1, help="evaluations per image of the student"
    )
    cli.add_guidance(parser, "real_unet")
    cli.add_dataset(parser, "the GAN's real images, by default the teacher's", dataset=None, data_dir=None)
    args, state = cli.parse_training(parser, "student", PRESETS, argv, FIXED)
    if args.guide and args.autoguidance_scale == 1 and state is None:
        parser.error("--guide needs an --autoguidance_scale other than 1")
    if state is None:
        args.teacher = cli.or_shipped(args.teacher, "runs/teacher", "teacher.pt")
    if args.f_div != "rkl" and not args.gen_cls_loss_weight:
        parser.error(f"--f_div {args.f_div} needs the GAN's head: give --gen_cls_loss_weight, 3e-3 for instance")
    if args.gen_cls_loss_weight and not args.cls_loss_weight:
        parser.error("--cls_loss_weight 0 would leave the GAN's head as it starts, at random")
    if args.f_div != "rkl" and args.diffusion_gan_max_timestep <= diffusion.timestep(args.max_step_percent):
        parser.error(f"--f_div {args.f_div} needs the head at every noise: --diffusion_gan_max_timestep 1000")
    if args.num_denoising_steps > 1 and args.conditioning_sigma <= args.sigma_min:
        parser.error(f"--conditioning_sigma {args.conditioning_sigma} is not above --sigma_min {args.sigma_min}")
    if args.min_step_percent > args.max_step_percent:
        parser.error(f"--min_step_percent {args.min_step_percent} is above --max_step_percent {args.max_step_percent}")
    return args, state


def main(argv=None):
    args, state = parse_args(argv)
    device = cli.device(args)

    # --- generator, guidance, EMA, optimizers ------------------------------------------------------------------------
    fresh = state is None
    source = checkpoint.load(args.teacher, kind="teacher") if fresh else state
    classes = source["classes"]
    planned = source.get("settings", {}).get("steps", 0)
    if fresh and source["step"] < planned and distributed.MAIN:
        print(f"note: the teacher is of step {source['step']} of {planned}", file=sys.stderr)
    with cli.restoring(args.teacher if fresh else args.run_dir):
        net = SimpleUNet(**source["model_config"])
        net.load_state_dict(source["model_ema"])    # the teacher's average; a resumed run overwrites all copies below
    for name in ("sigma_min", "sigma_max"):
        if source[name] != getattr(args, name):
            raise cli.UsageError(f"the teacher was trained with --{name} {source[name]}: give the same")
    if fresh and checkpoint.find(args.teacher).resolve().parent == Path(args.run_dir).resolve():
        raise cli.UsageError(f"--run_dir {args.run_dir} is the teacher's own folder")
    cli.check_guidance(args, source)
    if fresh:
        guide = cli.load_guide(args, source, args.teacher, "cpu")     # `model` takes a copy to the device
    else:                                           # whose weights `model` holds, like the teacher's
        with cli.restoring(args.run_dir):
            guide = SimpleUNet(**source["guide_config"]) if source.get("guide_config") else None
        if args.autoguidance_scale != 1 and guide is None:
            raise cli.UsageError("--autoguidance_scale cannot begin in a resumed run: it was begun without a guide")
    gan = args.gen_cls_loss_weight > 0
    if not fresh and gan != (source["settings"].get("gen_cls_loss_weight", 0) > 0):
        raise cli.UsageError("--gen_cls_loss_weight cannot turn the GAN on or off in a resumed run")
    cli.name_dataset(args, source)                  # evaluate.py takes it from the student, with or without a GAN
    dataset = cli.dataset(args, source) if gan or args.eval_every else None
    torch.manual_seed(args.seed)                    # for cls_head; the rest starts from the teacher
    model = UnifiedModel(
        net, args.conditioning_sigma, args.num_denoising_steps, args.sigma_min, sigma_max=args.sigma_max,
        min_step_percent=args.min_step_percent, max_step_percent=args.max_step_percent,
        guidance_scale=args.guidance_scale, guidance_interval=args.guidance_interval, guide=guide,
        autoguidance_scale=args.autoguidance_scale, fake_noise=args.fake_noise, gan=gan, f_div=args.f_div,
        diffusion_gan_max_timestep=args.diffusion_gan_max_timestep,
    ).to(device, memory_format=torch.channels_last)
    generator, guidance = model.feedforward_model, model.guidance_model
    emas = checkpoint.EMAs(generator, [args.ema_decay, *args.more_ema_decays])
    bf16 = runtime.uses_bf16(device, args.precision)
    generator_optimizer = Optimizer(args.optimizer, {generator: args.generator_lr}, bf16)
    guidance_lrs = {guidance.fake_unet: args.guidance_lr}
    if gan:
        guidance_lrs[guidance.cls_head] = args.cls_head_lr or args.guidance_lr
    guidance_parameters = [p for network in guidance_lrs for p in network.parameters()]
    guidance_optimizer = Optimizer(args.optimizer, guidance_lrs, bf16)
    weights = dict(
        loss_dm=1, gen_cls_loss=args.gen_cls_loss_weight, loss_fake=1, cls_loss=args.cls_loss_weight
    )
    step = 0
    if not fresh:
        with cli.restoring(args.run_dir):
            model.load_state_dict(state["model"])
            emas.load(state)
            generator_optimizer.load_state_dict(state["generator_optimizer"])
            guidance_optimizer.load_state_dict(state["guidance_optimizer"])
        step = state["step"]
    meter = runtime.Meter(step, device, state and state["meter"])
    best = (state or {}).get("best", dict(distance=math.inf, step=0))
    validation = cli.validation(args, dataset, device)
    if validation and best.get("of") != validation.of:
        best = dict(distance=math.inf, step=0, of=validation.of)
    place = distributed.RANK, distributed.WORLD
    batches = data.Batches(dataset, args.batch_size, args.seed, device, *place) if gan else None
    label_dropout = source.get("label_dropout", 0.0)
    del source, state                               # several times the size of the network

    run = runtime.RunFolder(args.run_dir, args.stamp)
    stop = runtime.StopSignal(args.max_minutes)

    def save(name=checkpoint.NAME, ema=emas[0]):
        distributed.check_same(model, emas)
        checkpoint.save(
            run.path / name,
            dict(
                kind="student", step=step, classes=classes, model_config=net.config,
                model_ema=ema.module.state_dict(), ema_decay=ema.decay, denoising_sigmas=model.denoising_sigmas,
                sigma_min=args.sigma_min, sigma_max=args.sigma_max, label_dropout=label_dropout,
                # From here on what only a resume needs; the randomness follows from the step. `model` holds the teacher
                # and its guide too, so that the run stands on its own.
                settings=cli.settings(args), model=model.state_dict(), guide_config=guide and guide.config,
                emas=emas.state(), meter=meter.state(), best=best,
                generator_optimizer=generator_optimizer.state_dict(),
                guidance_optimizer=guidance_optimizer.state_dict(),
            ),
        )

    if fresh:                                       # whether the disk takes it shows now, not after an hour
        save()
    run.begin(step)

    rows = min(len(classes), runtime.GRID_ROWS)
    grid_labels = torch.arange(8 * rows, device=device) % rows

    def grid_noise(draw):
        return image_noise(args.seed, range(8 * rows), draw).to(device)

    with runtime.autocast(device, args.precision):
        teacher = guidance.guided_teacher()
        teacher_grid = diffusion.heun_sample(teacher, grid_noise(0), grid_labels, 18, args.sigma_min, args.sigma_max)
    if args.compile:                                # after the grid, whose batch has another size
        torch._dynamo.config.recompile_limit = 32   # the networks share one forward, each with and without gradient
        for network in filter(None, (generator, guidance.fake_unet, guidance.real_unet, guidance.guide)):
            network.compile(dynamic=False)          # the GAN's two batches in one would make shapes look variable

    def draw(net, z, labels, renoise):
        return diffusion.few_step_sample(net, z, labels, model.denoising_sigmas, renoise)

    @torch.no_grad()
    def log_grid():
        with runtime.autocast(device, args.precision):
            images = draw(emas[0].module, grid_noise(0), grid_labels, grid_noise)
            # A grid is not worth compiling for, with a batch size of its own.
            with torch.compiler.set_stance("force_eager") if args.compile else nullcontext():
                _, log = model.generator_turn(images, grid_labels, StepRandom(args.seed, 0, device))
        run.grid(step, "teacher_student", rows, teacher_grid, images)
        run.grid(step, "dm_gradient", rows, log["grad"] / 4 / log["grad"].std())

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
    batch = args.batch_size // distributed.WORLD
    if step and due() and best.get("measured") != step:
        measure()                                   # the run was killed while it did
    meter.rate(step)                                # speed counts from here
    bar = tqdm(total=args.steps, initial=step, unit="step", dynamic_ncols=True, disable=not distributed.MAIN)
    while step < args.steps and not stop:
        rng = StepRandom(args.seed, step, device, *place)
        z = rng.normal(batch, 3, 32, 32).to(memory_format=torch.channels_last)      # B: this process's share
        labels = rng.integers(0, len(classes) - 1, batch)                           # [B]
        lr_factor = runtime.lr_factor(step, args)
        generator_turn = step % args.dfake_gen_update_ratio == 0
        with torch.set_grad_enabled(generator_turn), runtime.autocast(device, args.precision):
            x_gen = model.generate(z, labels, rng)                                  # [B, 3, 32, 32]

        if generator_turn:
            with runtime.autocast(device, args.precision):
                losses, _ = model.generator_turn(x_gen, labels, rng)
            generator_optimizer.zero_grad()
            sum(weights[name] * loss for name, loss in losses.items()).backward()
            distributed.average_gradients(generator.parameters())
            generator_grad_norm = clip_grad_norm_(generator.parameters(), args.max_grad_norm)
            generator_optimizer.step(lr_factor)
            emas.update(generator)
            meter.add(step, **losses, generator_grad_norm=generator_grad_norm)

        x_real, real_labels = batches(step) if gan else (None, None)                # [B, 3, 32, 32], [B]
        if gan and args.flip:
            x_real = data.random_flip(x_real, rng)
        with runtime.autocast(device, args.precision):
            losses, log = model.guidance_turn(x_gen, labels, rng, x_real, real_labels)
        guidance_optimizer.zero_grad()              # also of what a generator's loss may have left there
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        distributed.average_gradients(guidance_parameters)
        fake_grad_norm = clip_grad_norm_(guidance_parameters, args.max_grad_norm)
        guidance_optimizer.step(lr_factor)
        logits = {name: value for name, value in log.items() if value.ndim == 0}
        meter.add(step, **losses, **logits, fake_grad_norm=fake_grad_norm)
        step += 1
        bar.update()

        if step % args.log_every == 0 or step == args.steps:
            means = meter.read()
            images_per_second = meter.rate(step) * args.batch_size
            bar.set_postfix(loss_fake=f"{means['loss_fake']:.4f}", images_per_s=f"{images_per_second:.0f}")
            memory = runtime.peak_memory_mib(device)
            run.scalars(step, dict(means, images_per_second=images_per_second, memory_mib=memory))
        with meter.paused():
            if step % args.sample_every == 0 or step == args.steps:
                log_grid()
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
