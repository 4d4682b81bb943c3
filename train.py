"""Phase 2: distil the teacher into a one-step generator with DMD2 (Yin et al. 2024, arXiv 2405.14867).

    python train.py --conditioning_sigma 80                      # from runs/teacher into runs/dmd2
    python train.py --gen_cls_loss_weight 3e-3                   # with the adversarial loss on the teacher's images
    python train.py --num_denoising_steps 4                      # a generator of four steps
    python train.py --teacher runs/demo/teacher --preset demo    # minutes on a CPU
    python train.py --teacher edm-cifar10-32x32-cond-vp.pkl      # EDM's published network
    python train.py --gan_steps 500                              # whose last steps are a GAN's alone
    python train.py --resume                                     # goes on where runs/dmd2 stopped

Neither loss shows progress (each chases a moving target): look at runs/dmd2/grids, the teacher on the left and the
student from the same noise on the right. Losses and speed: runs/dmd2/log.jsonl, tensorboard --logdir runs
"""

from contextlib import nullcontext
from functools import partial

import torch

import diffusion
from guidance import F_DIVERGENCES
from support import data, errors, flags, hardware, networks, pictures, processes, resume, teachers, validation
from support.ema import EMA
from support.meter import add_part
from support.optimizers import Optimizer, lr_factor
from support.pairs import Pairs
from support.randomness import StepRandom, image_noise
from support.recorded import recorded
from support.run import Run
from unified_model import UnifiedModel

# Why each value, and what else was tried: docs/tuning.md.
PRESETS = {
    # The figures of `shapes`, minutes on 2 CPU cores.
    "demo": dict(
        batch_size=32, steps=2100, dfake_gen_update_ratio=2, generator_lr=5e-4, guidance_lr=3e-3, ema_decay=0.97,
        conditioning_sigma=3.0, min_step_percent=0.15, max_step_percent=0.75,
        gen_cls_loss_weight=3e-2, diffusion_gan_max_timestep=600,
        lr_schedule="cosine", log_every=20, sample_every=500, save_every=500,
    ),
    # Photographs, half an hour on 2 CPU cores.
    "cifar10": dict(
        batch_size=64, steps=1900, dfake_gen_update_ratio=2, generator_lr=5e-4, guidance_lr=3e-3, ema_decay=0.97,
        conditioning_sigma=3.0, min_step_percent=0.1, max_step_percent=0.65, fake_noise="dm",
        fit_steps=200, ode_pairs=2048,
        cfg_scale=3.0, cfg_interval=[0.15, 5.0], autoguidance_scale=2.0,
        optimizer="muon", lr_schedule="cosine", log_every=20, sample_every=600, save_every=200,
    ),
    # The same for one GPU: twice the width, eight times the images.
    "cifar10_gpu": dict(
        batch_size=512, steps=7500, dfake_gen_update_ratio=2, generator_lr=5e-4, guidance_lr=3e-3, ema_decay=0.99,
        conditioning_sigma=80.0, min_step_percent=0.02, max_step_percent=0.65, fake_noise="dm",
        fit_steps=600, ode_pairs=16_384, gan_steps=1500, warmup_steps=200, diffusion_gan_max_timestep=651,
        cfg_scale=2.0, cfg_interval=[0.15, 5.0],
        optimizer="muon", lr_schedule="cosine", sample_every=400, save_every=1200, compile=True,
    ),
    # EDM's published network, as NVIDIA's FastGen distils it to an FID of 1.99, but with Adam for AdamW. Not run here.
    "edm": dict(
        batch_size=2048, accumulate=8, steps=100_000, dfake_gen_update_ratio=5, generator_lr=1e-4, guidance_lr=1e-4,
        ema_decay=0.9999, conditioning_sigma=80.0, gen_cls_loss_weight=1e-3, warmup_steps=0, compile=True,
    ),
}
# What --resume refuses to change: two steps can follow one another only if these stay as they were.
FIXED = (
    "teacher", "guide", "dataset", "seed", "optimizer", "conditioning_sigma", "num_denoising_steps",
    "sigma_min", "sigma_max",
)


def parse_args(argv=None):
    parser = flags.Parser(description="Distil the teacher into a one-step generator.")
    parser.add_argument(
        "--teacher", type=flags.path, default="runs/teacher", help="run folder or checkpoint, or a .pkl of EDM's"
    )
    learning = flags.add_training(
        parser, PRESETS, run_dir="runs/dmd2", steps=50_000, batch_size=256, sample_every=1000, save_every=1000
    )
    learning.add_argument("--generator_lr", type=flags.rate, default=1e-4, help="learning rate of feedforward_model")
    learning.add_argument("--guidance_lr", type=flags.rate, default=2e-4, help="learning rate of fake_unet")
    learning.add_argument(
        "--ema_decay", type=flags.fraction, default=0.999, help="of the generator, per generator turn, at most"
    )
    generator = parser.add_argument_group("the generator")
    generator.add_argument(
        "--init", type=flags.path,
        help="a student of this teacher or another, whose averaged weights to begin with; default: the teacher",
    )
    generator.add_argument(
        "--conditioning_sigma", type=flags.noise, default=80.0, help="noise level that the generator starts from"
    )
    generator.add_argument(
        "--num_denoising_steps", type=flags.number(int, 1, 100), default=1, help="evaluations per image of the student"
    )
    generator.add_argument(
        "--dfake_gen_update_ratio", type=flags.count, default=10, help="guidance turns per generator turn"
    )
    generator.add_argument(
        "--fit_steps", type=flags.natural, default=0,
        help="first steps, in which the generator learns the image that the teacher's ODE makes of its noise; 0: none",
    )
    generator.add_argument(
        "--ode_pairs", type=flags.count, default=2048, help="such pairs of noise and image that --fit_steps learns from"
    )
    dm = parser.add_argument_group("the distribution matching (DM) loss")
    noise = "noise of the DM loss, as a fraction of the 1000 Karras steps"
    dm.add_argument("--min_step_percent", type=flags.fraction, default=0.02, help=f"least {noise}")
    dm.add_argument("--max_step_percent", type=flags.fraction, default=0.98, help=f"most {noise}")
    dm.add_argument(
        "--fake_noise", choices=["all", "dm"], default="all",
        help="what fake_unet learns: all of the 1000 steps, as in the paper, or only the range of the DM loss",
    )
    dm.add_argument(
        "--f_div", choices=list(F_DIVERGENCES), default="rkl",
        help="divergence that the DM gradient lowers; kl and js need the GAN",
    )
    flags.add_cfg(parser.add_argument_group("guidance of the teacher"), "real_unet")
    gan = parser.add_argument_group("the GAN; its real images are by default those of the teacher's training")
    gan.add_argument(
        "--gen_cls_loss_weight", type=flags.weight, default=0.0,
        help="weight of the GAN loss in the generator turn, 3e-3 in the paper; 0: no GAN, and no dataset needed",
    )
    gan.add_argument(
        "--cls_loss_weight", type=flags.weight, default=1e-2, help="weight of the GAN loss in the guidance turn"
    )
    gan.add_argument("--cls_head_lr", type=flags.rate, help="learning rate of its head; default: guidance_lr")
    gan.add_argument(
        "--diffusion_gan_max_timestep", type=flags.number(int, 0, diffusion.NUM_TRAIN_TIMESTEPS), default=1000,
        help="the GAN sees images noised to a random one of so many of the 1000 Karras steps; 0: clean images",
    )
    gan.add_argument(
        "--gan_steps", type=flags.natural, default=0,
        help="last steps, of a GAN alone, whose discriminator sees the frozen teacher's features and learns by itself "
        "in the first --warmup_steps of them; the student is the mean of its weights over them; 0: none",
    )
    gan.add_argument("--gan_lr", type=flags.rate, default=3e-5, help="learning rate of feedforward_model in these")
    gan.add_argument("--discriminator_lr", type=flags.rate, default=1e-3, help="learning rate of that discriminator")
    flags.add_dataset(gan, dataset=None, data_dir=None)
    flags.add_measuring(parser)
    args, state = resume.parse(parser, "student", PRESETS, teachers.fitting, argv, FIXED)
    if args.guide and args.autoguidance_scale == 1 and state is None:
        parser.error("--guide needs an --autoguidance_scale other than 1")
    if state is None:
        args.teacher = teachers.path(args)
    if args.f_div != "rkl" and not args.gen_cls_loss_weight:
        parser.error(f"--f_div {args.f_div} needs the GAN's head: give --gen_cls_loss_weight, 3e-3 for instance")
    if args.f_div != "rkl" and args.accumulate > 1:
        parser.error(f"--f_div {args.f_div} takes a mean over the whole batch, which --accumulate cuts up")
    if args.gen_cls_loss_weight and not args.cls_loss_weight:
        parser.error("--cls_loss_weight 0 would leave the GAN's head as it starts, at random")
    if args.f_div != "rkl" and args.diffusion_gan_max_timestep <= diffusion.timestep(args.max_step_percent):
        parser.error(f"--f_div {args.f_div} needs the head at every noise: --diffusion_gan_max_timestep 1000")
    if args.fit_steps + args.gan_steps > args.steps:
        first, last = f"--fit_steps {args.fit_steps}", f"--gan_steps {args.gan_steps}"
        parser.error(f"{first} and {last} are more than --steps {args.steps}, of which they are the first and the last")
    if 0 < args.gan_steps <= args.warmup_steps:
        waits = f"--warmup_steps {args.warmup_steps}, in which the generator waits"
        parser.error(f"--gan_steps {args.gan_steps} are not more than {waits}")
    if args.num_denoising_steps > 1 and args.conditioning_sigma <= args.sigma_min:
        parser.error(f"--conditioning_sigma {args.conditioning_sigma} is not above --sigma_min {args.sigma_min}")
    if args.min_step_percent > args.max_step_percent:
        parser.error(f"--min_step_percent {args.min_step_percent} is above --max_step_percent {args.max_step_percent}")
    return args, state


def grids(args, run, model, sample, num_classes, device):
    """A function that draws the run's grids: teacher and student from the same noise, and where the DM loss pulls."""
    rows = min(num_classes, pictures.MAX_ROWS)
    labels = torch.arange(8 * rows, device=device) % rows

    def noise(draw):
        return image_noise(args.seed, range(8 * rows), draw).to(device)

    guided_teacher = model.guidance_model.guided_teacher()
    with hardware.autocast(device, args.precision):
        teacher_images = diffusion.heun_sample(guided_teacher, noise(0), labels, 18, args.sigma_min, args.sigma_max)

    @torch.no_grad()
    def draw_grids():
        images, rng = sample(noise(0), labels, noise), StepRandom(args.seed, 0, device)
        # A grid is not worth compiling for, with a batch size of its own.
        eager = torch.compiler.set_stance("force_eager") if args.compile else nullcontext()
        with eager, hardware.autocast(device, args.precision):
            _, log = model.guidance_model.compute_distribution_matching_loss(images, labels, rng)
        run.grid("teacher_student", rows, teacher_images, images)
        run.grid("dm_gradient", rows, log["grad"] / 4 / log["grad"].std())

    return draw_grids


def fitting(args, model, optimizer, step_generator, num_classes, device, records):
    """The step of --fit_steps: (step, rngs, factor) -> log."""
    guided_teacher = model.guidance_model.guided_teacher()

    def sample(z, labels, renoise):                 # in half the steps of sample.py: the images are to be learnt from
        with hardware.autocast(device, args.precision):
            return diffusion.heun_sample(guided_teacher, z, labels, 9, args.sigma_min, args.sigma_max)

    pairs = Pairs(sample, args.ode_pairs, num_classes, args.batch_size, args.seed, device, mirrored=args.flip)

    @recorded(device, records)
    def fit_step(rngs, z, labels, x_ode, factor):
        log, k = {}, len(rngs)
        for part in zip(z.chunk(k), labels.chunk(k), x_ode.chunk(k), strict=True):
            with hardware.autocast(device, args.precision):
                losses, _ = model.fit_turn(*part)
            optimizer.backward(losses["loss_fit"] / k)
            add_part(log, k, **losses)
        return dict(log, generator_grad_norm=step_generator(factor))

    return lambda step, rngs, factor: fit_step(rngs, *pairs(step, *processes.SHARE), factor)


def begin_gan(state, parts):
    """Where a run that goes on has no discriminator yet, give its state the fresh one."""
    for name in ("gan_optimizer", "discriminator_optimizer", "batches"):
        state.setdefault(name, parts[name].state_dict())
    fresh = {name: weight for name, weight in parts["model"].state_dict().items() if ".discriminator." in name}
    state["model"] = fresh | state["model"]


def main(argv=None):
    args, state = parse_args(argv)
    device = hardware.start(args)
    source, teacher, guide = teachers.load(args, state)
    gan = args.gen_cls_loss_weight > 0
    ends_as_gan = args.gan_steps > 0 or (state is not None and "gan_optimizer" in state)
    data.name_dataset(args, source)                 # evaluate.py takes it from the student, with or without a GAN
    dataset = data.from_flags(args, source) if gan or ends_as_gan or args.eval_every else None
    torch.manual_seed(args.seed)                    # for cls_head and discriminator; the rest starts from the teacher

    # --- generator, guidance, EMA, optimizers ------------------------------------------------------------------------
    model = UnifiedModel(
        teacher, args.conditioning_sigma, args.num_denoising_steps, args.sigma_min, sigma_max=args.sigma_max,
        min_step_percent=args.min_step_percent, max_step_percent=args.max_step_percent,
        cfg_scale=args.cfg_scale, cfg_interval=args.cfg_interval, guide=guide,
        autoguidance_scale=args.autoguidance_scale, fake_noise=args.fake_noise, gan=gan, f_div=args.f_div,
        discriminator=ends_as_gan, diffusion_gan_max_timestep=args.diffusion_gan_max_timestep,
        batch_mean=processes.batch_mean,
    ).to(device, memory_format=torch.channels_last)
    generator, guidance = model.feedforward_model, model.guidance_model
    if args.init and not state:
        teachers.begin_with_student(args.init, generator, source["classes"], model.denoising_sigmas)
    ema = EMA(generator, args.ema_decay)
    bf16, fp16 = hardware.uses_bf16(device, args.precision), args.precision == "fp16"
    generator_optimizer = Optimizer(args.optimizer, {generator: args.generator_lr}, bf16, fp16)
    guidance_lrs = {guidance.fake_unet: args.guidance_lr}
    if gan:
        guidance_lrs[guidance.cls_head] = args.cls_head_lr or args.guidance_lr
    guidance_optimizer = Optimizer(args.optimizer, guidance_lrs, bf16, fp16)
    # `model` holds the teacher and its guide too, so that a run stands on its own.
    parts = dict(model=model, ema=ema, generator_optimizer=generator_optimizer, guidance_optimizer=guidance_optimizer)
    if ends_as_gan:                                 # without Adam's momentum, as in StyleGAN
        adam = partial(Optimizer, "adam", bf16=bf16, fp16=fp16, betas=(0.0, 0.99))
        gan_optimizer = adam({generator: args.gan_lr})
        discriminator_optimizer = adam({guidance.discriminator: args.discriminator_lr})
        parts.update(gan_optimizer=gan_optimizer, discriminator_optimizer=discriminator_optimizer)
    if gan or ends_as_gan:
        batches = parts["batches"] = data.Batches(dataset, args.batch_size, args.seed, device)
    if state and args.gan_steps:
        begin_gan(state, parts)
    resume.restore(args, state, parts)

    known = dict(
        kind="student", classes=source["classes"], model_config=networks.described(teacher), ema_decay=ema.decay,
        denoising_sigmas=model.denoising_sigmas, sigma_min=args.sigma_min, sigma_max=args.sigma_max,
        label_dropout=source.get("label_dropout", 0.0), guide_config=guide and networks.described(guide),
        teacher_digest=source.get("teacher_digest"),
    )
    n = args.batch_size // processes.WORLD // args.accumulate       # B: the images that are in the networks at once

    def describe():
        return dict(known, model_ema=ema.module.state_dict())

    @torch.no_grad()
    def sample(z, labels, renoise):
        with hardware.autocast(device, args.precision):
            return diffusion.few_step_sample(ema.module, z, labels, model.denoising_sigmas, renoise)

    run = Run(args, state, device, parts, describe, sample, validation.from_flags(args, dataset, device))
    del source, state                               # several times the size of the network
    draw_grids = grids(args, run, model, sample, len(known["classes"]), device)
    if args.compile:                                # after the teacher's grid, whose batch has another size
        torch._dynamo.config.recompile_limit = 32   # the networks share one forward, each with and without gradient
        for network in filter(None, (generator, guidance.fake_unet, guidance.real_unet, guidance.guide)):
            network.compile(dynamic=False)          # the GAN's two batches in one would make shapes look variable

    # --- the steps, and the loop --------------------------------------------------------------------------------------
    def step_generator(factor, optimizer=generator_optimizer, mean=False):
        norm = optimizer.clip(args.max_grad_norm)
        optimizer.step(factor)
        optimizer.zero_grad()
        ema.update_parameters(generator, mean)
        return norm

    def generate(rng, num_steps):
        z = rng.normal(n, 3, 32, 32).to(memory_format=torch.channels_last)          # [B, 3, 32, 32]
        labels = rng.integers(0, len(known["classes"]) - 1, n)                      # [B]
        with hardware.autocast(device, args.precision):
            return model.generate(z, labels, rng, num_steps), labels

    def real_images(x_real, real_labels, part, parts, rng):
        x_real, real_labels = x_real.chunk(parts)[part], real_labels.chunk(parts)[part]
        return data.random_flip(x_real, rng) if args.flip else x_real, real_labels  # [B, 3, 32, 32], [B]

    records = args.compile and args.record and not fp16
    fit_step = fitting(args, model, generator_optimizer, step_generator, len(known["classes"]), device, records)

    @recorded(device, records)
    def train_step(rngs, trains_generator, num_steps, x_real, real_labels, factor):
        log, parts, k = {}, [], len(rngs)           # the batch has --accumulate parts, with a rng each
        for rng in rngs:
            with torch.set_grad_enabled(trains_generator):
                x_gen, labels = generate(rng, num_steps)                            # [B, 3, 32, 32], [B]
            parts.append((rng, x_gen.detach(), labels))
            if trains_generator:
                with hardware.autocast(device, args.precision):
                    losses, _ = model.generator_turn(x_gen, labels, rng)
                loss = losses["loss_dm"] + args.gen_cls_loss_weight * losses.get("gen_cls_loss", 0)
                generator_optimizer.backward(loss / k)
                add_part(log, k, **losses)

        if trains_generator:
            log["generator_grad_norm"] = step_generator(factor)

        guidance_optimizer.zero_grad()              # of what a generator's loss may have left there
        for part, (rng, x_gen, labels) in enumerate(parts):
            real = real_images(x_real, real_labels, part, k, rng) if gan else ()
            with hardware.autocast(device, args.precision):
                losses, logits = model.guidance_turn(x_gen, labels, rng, *real)
            loss = losses["loss_fake"] + args.cls_loss_weight * losses.get("cls_loss", 0)
            guidance_optimizer.backward(loss / k)
            add_part(log, k, **losses, **logits)

        log["fake_grad_norm"] = guidance_optimizer.clip(args.max_grad_norm)
        guidance_optimizer.step(factor)
        return log

    @recorded(device, records)
    def gan_step(rngs, trains_generator, num_steps, x_real, real_labels, factor):
        log, k = {}, len(rngs)
        for part, rng in enumerate(rngs):
            with torch.set_grad_enabled(trains_generator):
                x_gen, labels = generate(rng, num_steps)                            # [B, 3, 32, 32], [B]
            real = real_images(x_real, real_labels, part, k, rng)
            with hardware.autocast(device, args.precision):
                losses, logits = model.gan_turn(x_gen, labels, *real, rng)
            if trains_generator:
                gan_optimizer.backward(losses["loss_gan"] / k)
            discriminator_optimizer.backward(losses["loss_discriminator"] / k)
            add_part(log, k, **losses, **logits)
        if trains_generator:
            log["generator_grad_norm"] = step_generator(factor, gan_optimizer, mean=True)
        log["discriminator_grad_norm"] = discriminator_optimizer.clip(args.max_grad_norm)
        discriminator_optimizer.step()
        discriminator_optimizer.zero_grad()
        return log

    for step in run.steps():
        rngs = [StepRandom(args.seed, step, device, *share) for share in processes.shares(args.accumulate)]
        factor = lr_factor(step, args)              # learning rates, as a fraction of their peaks
        if step < args.fit_steps:
            log = fit_step(step, rngs, factor)
        else:
            num_steps = 1 + rngs[0].choice(args.num_denoising_steps)    # of the generator, in this step of the training
            alone = step >= args.steps - args.gan_steps                 # the GAN
            if step == args.steps - args.gan_steps:
                ema.begin_mean()                    # a GAN wanders: the mean of its way is nearer than its end
            real = batches(step, *processes.SHARE) if gan or alone else (None, None)        # [B, 3, 32, 32], [B]
            if alone:
                log = gan_step(rngs, factor > 0, num_steps, *real, factor)
            else:
                trains_generator = step % args.dfake_gen_update_ratio == 0
                log = train_step(rngs, trains_generator, num_steps, *real, factor)
        run.count(**log)
        run.keep(draw_grids)


if __name__ == "__main__":
    errors.run(main)
