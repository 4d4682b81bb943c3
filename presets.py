"""Presets: named sets of defaults for train0.py (teacher) and train.py (student); flags given beside them win.

    python train0.py --preset cifar10
    python train.py --preset cifar10 --help         # shows its values

Why each value, and what else was tried: docs/tuning.md. What each preset costs and brings: results/README.md.
"""

from constants import IMAGE_SIZE, NUM_TRAIN_TIMESTEPS, RHO, SIGMA_MAX, SIGMA_MIN

TEACHER, STUDENT = {}, {}

# demo: the figures of `shapes`. On 2 CPU cores 2 minutes for the teacher and 6 for the student, FD 1.47 and 1.15.
TEACHER["demo"] = dict(
    dataset="shapes", channels=16, batch_size=32, steps=1800, lr=3e-3, ema_decay=0.998, p_mean=0.3, p_std=1.5,
    log_every=20, sample_every=900, save_every=500,
)
STUDENT["demo"] = dict(
    batch_size=32, steps=2100, dfake_gen_update_ratio=2, generator_lr=5e-4, guidance_lr=3e-3, ema_decay=0.97,
    conditioning_sigma=3.0, min_step_percent=0.15, max_step_percent=0.75,
    gen_cls_loss_weight=3e-2, diffusion_gan_max_timestep=600,
    lr_schedule="cosine", log_every=20, sample_every=500, save_every=500,
)

# demo64: the same figures at 64x64. Adam's teacher preferred some colours at high noise, and its students lost the
# others (docs/tuning.md).
TEACHER["demo64"] = dict(TEACHER["demo"], image_size=64, optimizer="muon", p_mean=0.6, p_std=1.7, steps=1600)
STUDENT["demo64"] = dict(
    STUDENT["demo"], optimizer="muon", steps=700,
    conditioning_sigma=6.0, min_step_percent=0.195, max_step_percent=0.8574, diffusion_gan_max_timestep=692,
)

# cifar10: photographs on a CPU. On 2 cores 53 minutes for the teacher and 21 for the student, FD-ImageNet 343.8 (of the
# guided teacher) and 526.3.
TEACHER["cifar10"] = dict(
    channels=32, batch_size=64, steps=9000, optimizer="muon", lr=4e-3, ema_decay=0.999, p_mean=-0.8, p_std=1.4,
    label_dropout=0.1, log_every=50, sample_every=1000, save_every=500,
)
STUDENT["cifar10"] = dict(
    batch_size=64, steps=1900, dfake_gen_update_ratio=2, generator_lr=5e-4, guidance_lr=3e-3, ema_decay=0.97,
    conditioning_sigma=3.0, min_step_percent=0.1, max_step_percent=0.65, fake_noise="dm",
    fit_steps=200, ode_pairs=2048,
    cfg_scale=3.0, cfg_interval=[0.15, 5.0], autoguidance_scale=2.0,
    optimizer="muon", lr_schedule="cosine", log_every=20, sample_every=600, save_every=200,
)

# gan: the GAN phase alone, of a student with the network of the shipped one, on a CPU (docs/usage.md).
STUDENT["gan"] = dict(
    batch_size=64, steps=400, gan_steps=400, discriminator_warmup_steps=60, conditioning_sigma=80.0,
    cfg_scale=2.0, cfg_interval=[0.15, 5.0],
    lr_schedule="cosine", log_every=10, sample_every=200, save_every=100,
)

# few: some hundred images of your own, from the shipped pair (docs/usage.md): the GAN phase alone, from --init
# weights/student.pt, on the features of a teacher that these images have fine-tuned.
STUDENT["few"] = dict(
    STUDENT["gan"], batch_size=32, discriminator_warmup_steps=20, gan_lr=2e-4,
    cfg_scale=3.0, autoguidance_scale=2.0, sample_every=100, save_every=200,
)

# cifar10_gpu: photographs on one GPU, twice the width and eight times the batch. On an H200 5 minutes for the teacher
# and 4 for the student; the shipped pair, FD-ImageNet 117.9 (guided) and 140.7, was made without the GAN phase.
TEACHER["cifar10_gpu"] = dict(
    channels=64, batch_size=512, steps=18_000, optimizer="muon", lr=2e-3, ema_decay=0.999, p_mean=-0.8, p_std=1.4,
    label_dropout=0.1, save_every=3000, compile=True,
)
STUDENT["cifar10_gpu"] = dict(
    batch_size=512, steps=7500, dfake_gen_update_ratio=2, generator_lr=5e-4, guidance_lr=3e-3, ema_decay=0.99,
    conditioning_sigma=80.0, min_step_percent=0.02, max_step_percent=0.65, fake_noise="dm",
    fit_steps=600, ode_pairs=16_384, warmup_steps=200,
    gan_steps=1500, discriminator_warmup_steps=200, diffusion_gan_max_timestep=651,
    cfg_scale=2.0, cfg_interval=[0.15, 5.0],
    optimizer="muon", lr_schedule="cosine", sample_every=400, save_every=1200, compile=True,
)

# edm: a student of EDM's published network, with the settings of NVIDIA's FastGen (FID 1.99), but Adam for AdamW. Not
# run here; 116 hours of an H200, by arithmetic.
STUDENT["edm"] = dict(
    batch_size=2048, accumulate=8, steps=100_000, dfake_gen_update_ratio=5, generator_lr=1e-4, guidance_lr=1e-4,
    ema_decay=0.9999, conditioning_sigma=80.0, gen_cls_loss_weight=1e-3, warmup_steps=0, compile=True,
)

# For EDM's networks of 64x64, as published with other code; not run here. By arithmetic DMD2's 200,000 steps take an
# H200 158 hours. Real images of ImageNet: --dataset folder --data_dir DIR.
# DMD2 itself (github.com/tianweiy/DMD2, experiments/imagenet, FID 1.51): it has no EMA, and AdamW instead of Adam.
STUDENT["edm_imagenet64"] = dict(
    batch_size=280, accumulate=7, steps=200_000, dfake_gen_update_ratio=5, generator_lr=2e-6, guidance_lr=2e-6,
    ema_decay=0.0, conditioning_sigma=80.0, gen_cls_loss_weight=3e-3, cls_loss_weight=1e-2, warmup_steps=500,
    compile=True,
)
# SiD's start noise, DM noise, batch and rates (github.com/mingyuanzhou/SiD, run_sid.sh) and as many images as its
# released networks have seen (its README); the loss is DMD2's. By arithmetic 27 and 20 days of an H200.
STUDENT["edm_ffhq64"] = dict(
    batch_size=512, accumulate=8, steps=973_000, dfake_gen_update_ratio=1, generator_lr=1e-5, guidance_lr=1e-5,
    ema_decay=0.9993, conditioning_sigma=2.5, min_step_percent=0.0, max_step_percent=0.8, warmup_steps=0, compile=True,
)
STUDENT["edm_afhqv2_64"] = dict(
    STUDENT["edm_ffhq64"], steps=726_000, generator_lr=5e-6, guidance_lr=5e-6,
)
# The size of their images; all others: 32.
MADE_FOR = dict(demo64=64, edm_imagenet64=64, edm_ffhq64=64, edm_afhqv2_64=64)


def for_size(name, size, schedule=(SIGMA_MIN, SIGMA_MAX)):
    """The values of a student's preset, none of "none", for images of this height and width.

    The noise levels grow with the size: the mean of 2x2 pixels has half of their noise, so that an image of twice the
    size shows as much at twice the noise (simple diffusion, Hoogeboom et al. 2023, arXiv 2301.11093, section 3.1). Not
    those of a teacher's training: with twice the noise its images were speckled (docs/tuning.md), and EDM, too, has the
    same at 32x32 and 64x64. schedule: the teacher's lowest and highest noise.
    """
    steps = NUM_TRAIN_TIMESTEPS
    values, factor = dict(STUDENT.get(name, {})), size / MADE_FOR.get(name, IMAGE_SIZE)
    for flag, value in values.items() if factor != 1 else ():
        if flag == "conditioning_sigma":
            values[flag] = min(value * factor, schedule[1])
        elif flag == "cfg_interval":
            values[flag] = [sigma * factor for sigma in value]
        elif flag in ("min_step_percent", "max_step_percent"):
            values[flag] = round(times(value, factor, schedule), 4)
        elif flag == "diffusion_gan_max_timestep":
            values[flag] = round(steps * times(value / steps, factor, schedule))
    return values


def times(fraction, factor, schedule):
    """The fraction of the Karras schedule whose sigma is factor times that at this fraction, within 0 .. 1."""
    low, high = (sigma ** (1 / RHO) for sigma in schedule)
    root = (low + fraction * (high - low)) * factor ** (1 / RHO)                    # of sigma (equation 5)
    return min(max((root - low) / (high - low), 0.0), 1.0)
