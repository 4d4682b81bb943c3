"""GuidanceModel: the teacher's and the student's score, and the losses of DMD2 (Yin et al. 2024, arXiv 2405.14867).

    guidance = GuidanceModel(teacher)
    loss_dm, log = guidance.compute_distribution_matching_loss(x_gen, labels, rng)      # trains the generator
    loss_fake, log = guidance.compute_loss_fake(x_gen, labels, rng)                     # trains fake_unet

With cls_head=True there is also the classifier head of section 4.3:
    gen_cls_loss, log = guidance.compute_generator_cls_loss(x_gen, labels, rng)         # trains the generator
    cls_loss, log = guidance.compute_cls_loss(x_gen, labels, x_real, real_labels, rng)  # trains fake_unet and cls_head

A generator of several evaluations has a fake_unet and a classifier head for each; level=i says which evaluation made
x_gen. One fake_unet for all would know only the mixture of their images: the DM loss would be content with evaluations
that make some of the modes each, as long as all together make all.
"""

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import nn

import diffusion
from model import group_norm
from support.errors import UsageError
from support.randomness import StepRandom


def fresh_random(device):
    """A StepRandom seeded by torch's global generator, so that torch.manual_seed decides where no rng is given."""
    return StepRandom(int(torch.randint(2**31, ())), 0, device)


@contextlib.contextmanager
def frozen(*modules):
    """Context in which the modules' parameters get no gradient; gradients still pass through to their inputs."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class ClassifierHead(nn.Module):
    """fake_unet's bottleneck features [B, C, size, size] to a logit [B], high for real images (DMD2, section 4.3)."""

    def __init__(self, channels, size=4):
        super().__init__()
        halve = [nn.Conv2d(channels, channels, 4, stride=2, padding=1), group_norm(channels), nn.SiLU()]
        self.layers = nn.Sequential(
            *(halve if size > 1 else []),           # one pixel is as small as it gets
            nn.Conv2d(channels, channels, max(1, size // 2)), group_norm(channels), nn.SiLU(),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, features):
        return self.layers(features).flatten().float()


class GuidanceModel(nn.Module):
    """Two denoisers: real_unet, the frozen teacher, and fake_unet, which learns to denoise the generator's images.

    Args:
        teacher: a denoiser (x_t, sigma, labels) -> x0_hat; real_unet and fake_unet start as copies of it.
        min_step_percent, max_step_percent: noise range of the distribution matching loss, as fractions of the 1000
            Karras steps; 0 is the lowest noise.
        sigma_min, sigma_max: range of the Karras schedule; images span [-1, 1].
        cfg_scale, cfg_interval, guide, autoguidance_scale: guidance of real_unet, as in diffusion.guided; the guide, a
            weaker teacher, is copied.
        fake_noise: noise range that fake_unet learns: "all" 1000 steps, as in the paper, or "dm", the range of the DM
            loss, as it is never evaluated outside.
        cls_head: whether fake_unet has a classifier head; the teacher must then be a Denoiser of model.py, or offer the
            same features.
        diffusion_gan_max_timestep: real and generated images are noised to a random timestep below this one, 0 .. 1000,
            before a classifier or discriminator sees them; 0: no noise.
        denoising_sigmas: the generator's noise levels, most noise first; None: it has one. An evaluation before the
            last has the DM loss only at noise of the next level and above: its image is noised to that level anyway,
            which hides what lies below (as in Phased DMD, arXiv 2510.27684, and TDM, arXiv 2503.06674).

    Raises:
        UsageError: the DM loss of an evaluation would have no noise level left.
    """

    def __init__(
        self, teacher, min_step_percent=0.02, max_step_percent=0.98, sigma_min=diffusion.SIGMA_MIN,
        sigma_max=diffusion.SIGMA_MAX, cfg_scale=1.0, cfg_interval=None, guide=None, autoguidance_scale=1.0,
        fake_noise="all", cls_head=False, diffusion_gan_max_timestep=diffusion.NUM_TRAIN_TIMESTEPS,
        denoising_sigmas=None,
    ):
        super().__init__()
        if not 0 <= min_step_percent <= max_step_percent <= 1:
            got = f"{min_step_percent}, {max_step_percent}"
            raise ValueError(f"need 0 <= min_step_percent <= max_step_percent <= 1, got {got}")
        self.real_unet = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.guide = None if guide is None else copy.deepcopy(guide).eval().requires_grad_(False)
        self.fake_unet = copy.deepcopy(teacher).train().requires_grad_(True)
        self.cls_head = ClassifierHead(teacher.feature_channels[-1], teacher.bottleneck_size) if cls_head else None
        later_sigmas = (denoising_sigmas or [None])[1:]
        self.later_fakes = nn.ModuleList(copy.deepcopy(self.fake_unet) for _ in later_sigmas)
        self.later_heads = nn.ModuleList(
            ClassifierHead(teacher.feature_channels[-1], teacher.bottleneck_size) for _ in later_sigmas if cls_head
        )
        self.cfg_scale, self.cfg_interval, self.autoguidance_scale = cfg_scale, cfg_interval, autoguidance_scale
        self.diffusion_gan_max_timestep = diffusion_gan_max_timestep
        self.min_step, self.max_step = diffusion.timestep(min_step_percent), diffusion.timestep(max_step_percent)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        sigmas = diffusion.karras_sigmas(diffusion.NUM_TRAIN_TIMESTEPS, sigma_min, sigma_max).float()
        self.register_buffer("sigmas", sigmas, persistent=False)
        lowest = [max(self.min_step, int((sigmas < sigma).sum())) for sigma in (*later_sigmas, 0)]
        self.dm_steps = [(low, self.max_step) for low in lowest]            # of each evaluation
        self.fake_steps = dict(all=[(0, diffusion.timestep(1))] * len(lowest), dm=self.dm_steps)[fake_noise]
        if lowest[0] > self.max_step:               # those of the later evaluations are lower
            raise UsageError(
                f"the DM loss of the first of {len(lowest)} evaluations needs noise above {later_sigmas[0]:.3g}, the "
                f"start of the second: --max_step_percent {max_step_percent} is below it ({sigmas[self.max_step]:.3g})"
            )

    def train(self, mode=True):
        super().train(mode)
        for teacher in filter(None, (self.real_unet, self.guide)):
            teacher.eval()                          # teachers stay frozen, whatever mode their container is in
        return self

    @property
    def fakes(self):
        """The fake_unet of each evaluation of the generator."""
        return [self.fake_unet, *self.later_fakes]

    @property
    def heads(self):
        """The classifier head of each; empty where there is none."""
        return [] if self.cls_head is None else [self.cls_head, *self.later_heads]

    def guided_teacher(self):
        """real_unet with its guidance, a denoiser."""
        return diffusion.guided(self.real_unet, self.cfg_scale, self.cfg_interval, self.guide, self.autoguidance_scale)

    def sample_teacher(self, z, labels, num_steps):
        """Images [B, 3, H, W] that the guided teacher's ODE makes of the noise z in num_steps Heun steps."""
        return diffusion.heun_sample(self.guided_teacher(), z, labels, num_steps, self.sigma_min, self.sigma_max)

    def add_noise(self, x, low, high, rng):
        """x_t = x + sigma_t eps with t uniform in low .. high; returns x_t [B, 3, H, W] and sigma_t [B, 1, 1, 1]."""
        sigma = self.sigmas[rng.integers(low, high, len(x), 1, 1, 1)]
        return x + sigma * rng.normal(*x.shape), sigma

    def compute_distribution_matching_loss(self, x_gen, labels, rng=None, level=0):
        """Distribution matching loss (DMD2, section 3, equation 1; weighted as in DMD, arXiv 2311.18828, equation 8).

        Args:
            x_gen: generated images, float [B, 3, H, W], with a gradient to the generator.
            labels: the classes they were generated for, [B].
            rng: StepRandom; None: one seeded by torch's global generator.
            level: which evaluation made x_gen, an index into denoising_sigmas.

        Returns:
            the loss, a scalar whose gradient at x_gen is exactly grad / numel, and a dict with grad [B, 3, H, W].
        """
        rng = rng or fresh_random(x_gen.device)
        with torch.no_grad():
            x_t, sigma = self.add_noise(x_gen, *self.dm_steps[level], rng)
            # grad = (p_real - p_fake) / mean|p_real|,    p = x_gen - denoised(x_t)
            p_real = x_gen - self.guided_teacher()(x_t, sigma, labels)              # [B, 3, H, W]
            p_fake = x_gen - self.fakes[level](x_t, sigma, labels)
            weight = p_real.abs().mean(dim=(1, 2, 3), keepdim=True)                 # [B, 1, 1, 1]
            grad = (p_real - p_fake) / (weight + 1e-6)                              # no 0/0 where p_real = 0
        # L_dm = 0.5 mse(x_gen, stopgrad(x_gen - grad))
        loss = 0.5 * F.mse_loss(x_gen, (x_gen - grad).detach())
        return loss, dict(grad=grad)

    def compute_loss_fake(self, x_gen, labels, rng=None, level=0):
        """Denoising loss of fake_unet on generated images (DMD2, section 3; DMD, equation 6; with the Karras weight).

        Args:
            x_gen: generated images, float [B, 3, H, W]; no gradient goes back to them.
            labels: the classes they were generated for, [B].
            rng: StepRandom; None: one seeded by torch's global generator.
            level: which evaluation made x_gen, an index into denoising_sigmas.

        Returns:
            the loss, a scalar, and a dict with fake_x0 [B, 3, H, W].
        """
        rng = rng or fresh_random(x_gen.device)
        x_gen = x_gen.detach()
        x_t, sigma = self.add_noise(x_gen, *self.fake_steps[level], rng)
        fake_x0 = self.fakes[level](x_t, sigma, labels)
        # L_fake = mean(w_t (fake(x_gen + sigma_t eps) - x_gen)^2)
        loss = (diffusion.karras_weight(sigma) * (fake_x0 - x_gen) ** 2).mean()
        return loss, dict(fake_x0=fake_x0.detach())

    def logits(self, x_t, sigma, labels, level=0):
        """D(x_t), the classifier head's output [B] for noised images: high where they look real for their labels."""
        return self.heads[level](self.fakes[level](x_t, sigma, labels, return_features=True)[-1])

    def diffusion_gan_noise(self, x, rng):
        """x noised to a random level before real and generated images are told apart (section 4.3, a diffusion GAN).

        Returns x_t and sigma, as add_noise does.
        """
        if self.diffusion_gan_max_timestep == 0:
            return x, self.sigmas[0].expand(len(x), 1, 1, 1)
        return self.add_noise(x, 0, self.diffusion_gan_max_timestep - 1, rng)

    def compute_generator_cls_loss(self, x_gen, labels, rng=None, level=0):
        """The generator's adversarial loss (DMD2, section 4.3, equation 4, in its non-saturating form).

        Args:
            x_gen: generated images, float [B, 3, H, W], with a gradient to the generator.
            labels: the classes they were generated for, [B].
            rng: StepRandom; None: one seeded by torch's global generator.
            level: which evaluation made x_gen, an index into denoising_sigmas.

        Returns:
            the loss, a scalar whose gradient reaches only x_gen, and an empty dict.
        """
        x_t, sigma = self.diffusion_gan_noise(x_gen, rng or fresh_random(x_gen.device))
        with frozen(self.fakes[level], self.heads[level]):
            # L_gen = mean(softplus(-D(x_gen + sigma_t eps)))
            return F.softplus(-self.logits(x_t, sigma, labels, level)).mean(), {}

    def compute_cls_loss(self, x_gen, labels, x_real, real_labels, rng=None, level=0):
        """The classifier's loss (DMD2, section 4.3, equation 4), which trains fake_unet and cls_head.

        Args:
            x_gen: generated images, float [B, 3, H, W]; no gradient goes back to them.
            labels: the classes they were generated for, [B].
            x_real, real_labels: images of the dataset, float [B, 3, H, W] in [-1, 1], and their own classes, [B].
            rng: StepRandom; None: one seeded by torch's global generator.
            level: which evaluation made x_gen, an index into denoising_sigmas.

        Returns:
            the loss, a scalar, and a dict with logit_fake and logit_real, 0-d means.
        """
        rng = rng or fresh_random(x_gen.device)
        noised = [self.diffusion_gan_noise(x, rng) for x in (x_gen.detach(), x_real)]
        x_t, sigma = (torch.cat(pair) for pair in zip(*noised, strict=True))        # [2 B, 3, H, W], [2 B, 1, 1, 1]
        logits = self.logits(x_t, sigma, torch.cat([labels, real_labels]), level)
        fake, real = logits.split([len(x_gen), len(x_real)])
        # L_cls = mean(softplus(D(x_gen + sigma_t eps))) + mean(softplus(-D(x_real + sigma_t eps)))
        loss = F.softplus(fake).mean() + F.softplus(-real).mean()
        return loss, dict(logit_fake=fake.detach().mean(), logit_real=real.detach().mean())
