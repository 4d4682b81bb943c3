"""Step 2: distil the teacher into a one-step generator with DMD2 (Yin et al. 2024, arXiv 2405.14867).

    python train.py --conditioning_sigma 80                      # from runs/teacher into runs/dmd2
    python train.py --gen_cls_loss_weight 3e-3                   # with the classifier head, on real images
    python train.py --num_denoising_steps 2                      # a generator of two steps
    python train.py --teacher runs/demo/teacher --preset demo    # minutes on a CPU
    python train.py --teacher edm-cifar10-32x32-cond-vp.pkl      # EDM's published network
    python train.py --gan_steps 500                              # the last 500 steps are the GAN phase
    python train.py --resume                                     # continues the run in runs/dmd2

A run has up to three phases: the fit (fit.py), the two turns of DMD2 (here), the GAN (gan.py). Flags: settings.py.
The losses show no progress, as each chases a moving target: look at runs/dmd2/grids, the teacher's images beside the
student's from the same noise. Losses and speed: runs/dmd2/log.jsonl, tensorboard --logdir runs
"""

import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")       # which torch reads when it is loaded

import settings
from support import errors

if __name__ == "__main__":                          # --help and wrong flags, before torch, which takes seconds to load
    errors.early(settings.student_parser)

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch

import diffusion
from fit import Fit
from gan import GAN, Discriminator, classifier_features
from phases import Phase, current
from settings import parse_student as parse_args
from support import classifier, data, hardware, networks, pictures, processes, resume, teachers, validation
from support.ema import EMA
from support.meter import add_microbatch
from support.optimizers import Optimizer, lr_factor
from support.pairs import Pairs
from support.randomness import StepRandom
from support.recorded import recorded
from support.run import Run
from unified_model import UnifiedModel


@dataclass
class DMD2(Phase):
    """The two turns of DMD2, alternating (section 4.2): fake_unet trains in every step, the generator in every
    dfake_gen_update_ratio-th. Optimizers: "generator"; "guidance", which updates fake_unet and its classifier head.

    Of a generator of several evaluations each trains on an equal part of the batch.
    """

    dfake_gen_update_ratio: int = 10                # guidance turns per generator turn
    gen_cls_loss_weight: float = 0.0                # of the classifier head's loss in the generator turn
    cls_loss_weight: float = 1e-2                   # and in the guidance turn

    @property
    def needs_images(self):
        return self.guidance.cls_head is not None

    def step(self, i, rngs, x_real=None, real_labels=None):
        trains_generator = (self.start + i) % self.dfake_gen_update_ratio == 0
        factor = lr_factor(i, self.steps, self.warmup_steps, self.lr_schedule)
        return self.train_step(rngs, trains_generator, x_real, real_labels, factor)

    def train_step(self, rngs, trains_generator, x_real, real_labels, factor):
        log, generated, optimizers = {}, [], self.optimizers
        parts = self.parts(rngs)
        k = len(parts)                              # microbatches

        # --- generator turn ------------------------------------------------------------------------------------------
        optimizers["generator"].zero_grad()
        for rng, level in parts:
            z, labels = self.model.random_inputs(self.part_size, self.num_classes, rng)     # [B, 3, H, W], [B]
            with torch.set_grad_enabled(trains_generator), self.autocast():
                x_gen = self.model.generate(z, labels, rng, num_steps=level + 1)    # [B, 3, H, W]
            generated.append((x_gen.detach(), labels))
            if trains_generator:
                with self.autocast():
                    losses, _ = self.model.generator_turn(x_gen, labels, rng, level)
                loss = losses["loss_dm"] + self.gen_cls_loss_weight * losses.get("gen_cls_loss", 0)
                optimizers["generator"].backward(loss / k)
                add_microbatch(log, k, **losses)
        if trains_generator:
            log["generator_grad_norm"] = optimizers["generator"].clip(self.max_grad_norm)
            optimizers["generator"].step(factor)
            self.ema.update_parameters(self.generator)

        # --- guidance turn, on the same images -----------------------------------------------------------------------
        optimizers["guidance"].zero_grad()
        real = self.real_parts(rngs, x_real, real_labels) if self.needs_images else [()] * k
        for (rng, level), (x_gen, labels), real_k in zip(parts, generated, real, strict=True):
            if real_k and self.flip:
                real_k = data.random_flip(real_k[0], rng), real_k[1]                # [B, 3, H, W], [B]
            with self.autocast():
                losses, logits = self.model.guidance_turn(x_gen, labels, rng, *real_k, level=level)
            loss = losses["loss_fake"] + self.cls_loss_weight * losses.get("cls_loss", 0)
            optimizers["guidance"].backward(loss / k)
            add_microbatch(log, k, **losses, **logits)
        log["fake_grad_norm"] = optimizers["guidance"].clip(self.max_grad_norm)
        optimizers["guidance"].step(factor)
        return log


def make_phases(args, model, discriminator, ema, pairs, num_classes, device, features=None):
    """The phases of this run, in their order; discriminator and pairs are None where there is no GAN and no fit.

    features: what the discriminator sees, as of gan.py; None: the teacher's.
    """
    generator, guidance = model.feedforward_model, model.guidance_model
    bf16, fp16 = hardware.uses_bf16(device, args.precision), args.precision == "fp16"
    generator_optimizer = Optimizer(args.optimizer, {generator: args.generator_lr}, bf16, fp16)
    guidance_lrs = dict.fromkeys(guidance.fakes, args.guidance_lr)
    guidance_lrs |= dict.fromkeys(guidance.heads, args.cls_head_lr or args.guidance_lr)
    share = args.batch_size // processes.WORLD      # of this process
    shared = dict(
        model=model, ema=ema, batch_size=share // args.accumulate, num_classes=num_classes,
        num_denoising_steps=args.num_denoising_steps, max_grad_norm=args.max_grad_norm, flip=args.flip,
        autocast=partial(hardware.autocast, device, args.precision),
        record=recorded(device, args.compile and args.record and not fp16),
    )
    phases, gan_start = [], args.steps - args.gan_steps
    if args.fit_steps:
        phases.append(Fit(
            **shared, start=0, steps=args.fit_steps, lr_schedule="cosine", pairs=pairs,
            optimizers=dict(generator=generator_optimizer),     # with which the DMD2 phase continues
        ))
    phases.append(DMD2(
        **shared, start=args.fit_steps, steps=gan_start - args.fit_steps, warmup_steps=args.warmup_steps,
        lr_schedule=args.lr_schedule, dfake_gen_update_ratio=args.dfake_gen_update_ratio,
        gen_cls_loss_weight=args.gen_cls_loss_weight, cls_loss_weight=args.cls_loss_weight,
        optimizers=dict(generator=generator_optimizer, guidance=Optimizer(args.optimizer, guidance_lrs, bf16, fp16)),
    ))
    if args.gan_steps:
        adam = partial(Optimizer, "adam", fp16=fp16, betas=(0.0, 0.99))             # without momentum, as in StyleGAN
        phases.append(GAN(
            **shared, start=gan_start, steps=args.gan_steps, lr_schedule=args.lr_schedule,
            discriminator=discriminator, features=features,
            discriminator_warmup_steps=args.discriminator_warmup_steps,
            optimizers=dict(generator=adam({generator: args.gan_lr}),
                            discriminator=adam({discriminator: args.discriminator_lr})),
        ))
    return phases


def ode_pairs(args, model, num_classes, device):
    """Pairs of noise and the guided teacher's image of it in 9 Heun steps, half of sample.py's: that suffices."""
    def sample(z, labels, renoise):
        with hardware.autocast(device, args.precision):
            return model.guidance_model.sample_teacher(z, labels, num_steps=9)

    size = model.shape[-1]
    return Pairs(sample, size, args.ode_pairs, num_classes, args.batch_size, args.seed, device, mirrored=args.flip)


def grids(args, run, model, sample, num_classes, device):
    """A function that draws the run's grids: teacher and student from the same noise, and the DM gradient there."""
    rows, labels, noise = pictures.grid_inputs(args.seed, num_classes, model.shape[-1], device)
    guidance = model.guidance_model

    @cache                                          # with the first grid: at the start the first step would wait for it
    def teacher_images():
        return guidance.sample_teacher(noise(0), labels, num_steps=18)

    @torch.no_grad()
    def draw_grids():
        images, rng = sample(noise(0), labels, noise), StepRandom(args.seed, 0, device)
        # Not compiled: the grid's batch size occurs nowhere else.
        eager = torch.compiler.set_stance("force_eager") if args.compile else nullcontext()
        with eager, hardware.autocast(device, args.precision):
            _, log = guidance.compute_distribution_matching_loss(images, labels, rng, level=-1)
            run.grid("teacher_student", rows, teacher_images(), images)
        scale = 4 * log["grad"].std().clamp(min=1e-30)          # of an unguided teacher it is zero at step 0
        run.grid("dm_gradient", rows, log["grad"] / scale)

    return draw_grids


def main(argv=None):
    args, state = parse_args(argv)
    device = hardware.start(args)
    source, teacher, guide = teachers.load(args, state, needing_images=["gan_steps"])
    args.dataset, args.data_dir, args.flip = data.named(args, source)               # for evaluate.py, too
    adversarial = args.gen_cls_loss_weight > 0 or args.gan_steps > 0
    need_features = args.gen_cls_loss_weight > 0 or (args.gan_steps > 0 and not args.gan_features)
    if need_features and not hasattr(teacher, "feature_channels"):
        raise errors.UsageError(f"--gen_cls_loss_weight and --gan_steps need features, which {args.teacher} has not")
    judge = classifier.load(args.gan_features, teacher.image_size) if args.gan_features else None
    dataset = data.from_flags(args, source) if adversarial or args.eval_every else None
    num_classes, sigmas = len(source["classes"]), dict(sigma_min=source["sigma_min"], sigma_max=source["sigma_max"])
    if args.num_denoising_steps > 1 and args.conditioning_sigma <= source["sigma_min"]:
        raise errors.UsageError(f"--conditioning_sigma {args.conditioning_sigma} is not above the teacher's sigma_min")

    # --- networks, EMA, phases ---------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)                    # of cls_head and discriminator; all else starts from the teacher
    model = UnifiedModel(
        teacher, args.conditioning_sigma, args.num_denoising_steps, **sigmas, min_step_percent=args.min_step_percent,
        max_step_percent=args.max_step_percent, cfg_scale=args.cfg_scale, cfg_interval=args.cfg_interval, guide=guide,
        autoguidance_scale=args.autoguidance_scale, fake_noise=args.fake_noise, cls_head=args.gen_cls_loss_weight > 0,
        diffusion_gan_max_timestep=args.diffusion_gan_max_timestep,
    ).to(device, memory_format=torch.channels_last)
    generator, guidance = model.feedforward_model, model.guidance_model
    discriminator = features = None
    if args.gan_steps:
        discriminator = Discriminator((judge or teacher).feature_channels, num_classes, args.num_denoising_steps)
        discriminator = discriminator.to(device, memory_format=torch.channels_last)
    if judge:
        features = partial(classifier_features, judge.to(device, memory_format=torch.channels_last))
    if args.init and not state:
        teachers.begin_with_student(args.init, generator, source["classes"], model.denoising_sigmas)
    ema = EMA(generator, args.ema_decay)
    pairs = ode_pairs(args, model, num_classes, device) if args.fit_steps else None
    phases = make_phases(args, model, discriminator, ema, pairs, num_classes, device, features)

    # `model` holds the teacher and its guide too, so that a run stands on its own.
    stateful = dict(model=model, ema=ema, **{type(phase).__name__.lower(): phase for phase in phases})
    if args.gan_steps:
        stateful["discriminator"] = discriminator
    if judge:
        stateful["gan_features"] = judge            # as it was when the run began
    if adversarial:
        batches = stateful["batches"] = data.Batches(dataset, args.batch_size, args.seed, device)
    resume.restore(args, state, stateful)
    images_digest = dataset.digest() if dataset else data.trained_on(source)
    known = dict(
        kind="student", classes=source["classes"], model_config=networks.described(teacher), ema_decay=ema.decay,
        denoising_sigmas=model.denoising_sigmas, label_dropout=source.get("label_dropout", 0.0), **sigmas,
        guide_config=guide and networks.described(guide), teacher_digest=source.get("teacher_digest"),
        images_digest=images_digest,
    )

    def describe():
        return dict(known, model_ema=ema.module.state_dict())

    @torch.no_grad()
    def sample(z, labels, renoise):
        with hardware.autocast(device, args.precision):
            return diffusion.few_step_sample(ema.module, z, labels, model.denoising_sigmas, renoise)

    run = Run(args, state, device, stateful, describe, sample, validation.from_flags(args, dataset, device))
    del source, state                               # several times the size of the network
    draw_grids = grids(args, run, model, sample, num_classes, device)
    if args.compile:
        # The networks share one forward, each with and without gradient.
        torch._dynamo.config.recompile_limit = 32 * args.num_denoising_steps
        for network in filter(None, (generator, *guidance.fakes, guidance.real_unet, guidance.guide)):
            network.compile(dynamic=False)          # else the classifier head's double batch would make batches dynamic

    # --- the loop ----------------------------------------------------------------------------------------------------
    for step in run.steps():
        phase, i = current(phases, step)
        rngs = [StepRandom(args.seed, step, device, *share) for share in processes.shares(args.accumulate)]
        real = batches(step, *processes.SHARE) if phase.needs_images else ()        # [B, 3, H, W], [B]
        run.count(**phase.step(i, rngs, *real))
        run.keep(draw_grids)


if __name__ == "__main__":
    errors.run(main)
