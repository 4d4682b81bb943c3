"""GuidanceModel: the teacher's and the student's score, and the losses of DMD2 (Yin et al. 2024, arXiv 2405.14867).

    guidance = GuidanceModel(teacher)
    loss_dm, log = guidance.compute_distribution_matching_loss(x_gen, labels, rng)     # moves the generator
    loss_fake, log = guidance.compute_loss_fake(x_gen, labels, rng)                    # moves fake_unet

With gan=True also
    loss_gen_cls, log = guidance.compute_generator_cls_loss(x_gen, labels, rng)        # moves the generator
    loss_cls, log = guidance.compute_cls_loss(x_gen, labels, x_real, real_labels, rng) # moves fake_unet and cls_head

and with discriminator=True the losses of a GAN alone
    losses, log = guidance.compute_gan_losses(x_gen, labels, x_real, real_labels, rng) # move generator, discriminator
"""

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import NUM_TRAIN_TIMESTEPS, SIGMA_MAX, SIGMA_MIN, guided, karras_sigmas, karras_weight, timestep
from model import group_norm
from support.randomness import StepRandom


def fresh_random(device):
    """A StepRandom seeded by torch's global generator, so that torch.manual_seed rules where none is given."""
    return StepRandom(int(torch.randint(2**31, ())), 0, device)


@contextlib.contextmanager
def frozen(*modules):
    """Within it the modules' parameters take no gradient, while their input does."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class ClassifierHead(nn.Module):
    """Bottleneck features [B, C, size, size] to a logit [B], high where they look real (DMD2, section 4.3)."""

    def __init__(self, channels, size=4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 4, stride=2, padding=1), group_norm(channels), nn.SiLU(),
            nn.Conv2d(channels, channels, size // 2), group_norm(channels), nn.SiLU(),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, features):
        return self.layers(features).flatten().float()


class FeatureHead(nn.Module):
    """Features [B, C, H, W] of one level and classes [B] to a logit [B]."""

    def __init__(self, channels, classes, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, channels, affine=False),            # the levels differ in scale, and so do noise levels
            nn.Conv2d(channels, width, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1), group_norm(width), nn.LeakyReLU(0.2),
        )
        self.out = nn.Linear(width, 1)
        self.label_embedding = nn.Embedding(classes, width)
        nn.init.normal_(self.label_embedding.weight, std=0.05)

    def forward(self, features, labels):
        h = self.layers(features).float().mean((2, 3))                              # [B, width]
        # D(h, y) = w h + b + v_y h (projection discriminator, Miyato & Koyama 2018, arXiv 1802.05637, equation 3)
        return self.out(h).flatten() + (self.label_embedding(labels) * h).sum(1)


class Discriminator(nn.Module):
    """Features of L levels and classes [B] to the logits [B, L] of a head a level, high where they look real."""

    def __init__(self, feature_channels, classes):
        super().__init__()
        self.heads = nn.ModuleList(FeatureHead(channels, classes) for channels in feature_channels)

    def forward(self, features, labels):
        return torch.stack([head(level, labels) for head, level in zip(self.heads, features, strict=True)], 1)


# h(r) = f''(r) r^2, the weight of the DM gradient that minimises D_f(real || fake) (f-distill, arXiv 2502.15681,
# theorem 1 and table 1) instead of the reverse KL divergence, with the density ratio r = p_real / p_fake.
F_DIVERGENCES = {
    "rkl": torch.ones_like,                         # f = -ln r, DMD2 itself
    "kl": lambda r: r,                              # f = r ln r
    "js": lambda r: r / (1 + r),                    # f = r ln r - (r + 1) ln((r + 1) / 2)
}


class GuidanceModel(nn.Module):
    """Two denoisers: real_unet, the frozen teacher, and fake_unet, trained on what the generator makes.

    Args:
        teacher: a denoiser (x_t, sigma, labels) -> x0_hat; real_unet and fake_unet start as copies of it.
        min_step_percent, max_step_percent: range of the noise levels of the distribution matching loss, as fractions
            of the 1000 Karras steps, 0 the least noise.
        sigma_min, sigma_max: range of the Karras schedule; images span [-1, 1].
        cfg_scale, cfg_interval, guide, autoguidance_scale: guidance of real_unet, as in diffusion.guided; of
            the guide, a weaker teacher, a copy is kept.
        gan: whether there is a cls_head on fake_unet's bottleneck; the teacher must then be a Denoiser of model.py, or
            have its feature_channels, bottleneck_size and return_features.
        discriminator: whether there is one on real_unet's features; the teacher must then be likewise.
        fake_noise: what fake_unet learns, "all" of the 1000 steps as in the paper, or "dm", the range above, beyond
            which the DM loss never asks it.
        diffusion_gan_max_timestep: the GAN compares images noised to a timestep below this one of 1000; 0: clean ones.
        f_div: divergence between student and teacher, a key of F_DIVERGENCES; all but "rkl" need gan.
        batch_mean: mean of a tensor over the batch; where processes share the batch, over all of theirs.
    """

    def __init__(
        self, teacher, min_step_percent=0.02, max_step_percent=0.98, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX,
        cfg_scale=1.0, cfg_interval=None, guide=None, autoguidance_scale=1.0, fake_noise="all", gan=False,
        discriminator=False, diffusion_gan_max_timestep=NUM_TRAIN_TIMESTEPS, f_div="rkl", batch_mean=torch.mean,
    ):
        super().__init__()
        if f_div != "rkl" and not gan:
            raise ValueError(f"f_div {f_div!r} takes its density ratio from the GAN's head: it needs gan")
        if not 0 <= min_step_percent <= max_step_percent <= 1:
            got = f"{min_step_percent}, {max_step_percent}"
            raise ValueError(f"need 0 <= min_step_percent <= max_step_percent <= 1, got {got}")
        self.real_unet = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.guide = None if guide is None else copy.deepcopy(guide).eval().requires_grad_(False)
        self.fake_unet = copy.deepcopy(teacher).train().requires_grad_(True)
        self.cls_head = ClassifierHead(teacher.feature_channels[-1], teacher.bottleneck_size) if gan else None
        self.discriminator = (
            Discriminator(teacher.feature_channels, max(1, teacher.label_dim)) if discriminator else None
        )
        self.cfg_scale, self.cfg_interval = cfg_scale, cfg_interval
        self.autoguidance_scale, self.f_div, self.batch_mean = autoguidance_scale, f_div, batch_mean
        self.diffusion_gan_max_timestep = diffusion_gan_max_timestep
        self.min_step, self.max_step = timestep(min_step_percent), timestep(max_step_percent)
        self.fake_steps = dict(all=(0, timestep(1)), dm=(self.min_step, self.max_step))[fake_noise]
        sigmas = karras_sigmas(NUM_TRAIN_TIMESTEPS, sigma_min, sigma_max).float()
        self.register_buffer("sigmas", sigmas, persistent=False)

    def train(self, mode=True):
        super().train(mode)
        for teacher in filter(None, (self.real_unet, self.guide)):
            teacher.eval()                          # a teacher never trains, whatever its container does
        return self

    def guided_teacher(self):
        """real_unet with its guidance, a denoiser."""
        return guided(
            self.real_unet, self.cfg_scale, self.cfg_interval, self.guide, self.autoguidance_scale
        )

    def add_noise(self, x, low, high, rng):
        """x_t = x + sigma_t eps with t uniform in low .. high; returns x_t [B, 3, 32, 32] and sigma_t [B, 1, 1, 1]."""
        sigma = self.sigmas[rng.integers(low, high, len(x), 1, 1, 1)]
        return x + sigma * rng.normal(*x.shape), sigma

    def compute_distribution_matching_loss(self, x_gen, labels, rng=None):
        """Distribution matching loss (DMD2, section 3, equation 1; weighted as in DMD, arXiv 2311.18828, equation 8).

        Args:
            x_gen: generated images, float [B, 3, 32, 32], with a gradient to the generator.
            labels: the classes they were generated for, [B].
            rng: StepRandom; None draws anew.

        Returns:
            the loss, a scalar whose gradient at x_gen is exactly grad / numel, and a dict with grad [B, 3, 32, 32].
        """
        rng = rng or fresh_random(x_gen.device)
        with torch.no_grad():
            x_t, sigma = self.add_noise(x_gen, self.min_step, self.max_step, rng)
            # grad = (p_real - p_fake) / mean|p_real|,    p = x_gen - denoised(x_t)
            p_real = x_gen - self.guided_teacher()(x_t, sigma, labels)              # [B, 3, 32, 32]
            p_fake = x_gen - self.fake_unet(x_t, sigma, labels)
            weight = p_real.abs().mean(dim=(1, 2, 3), keepdim=True)                 # [B, 1, 1, 1]
            grad = (p_real - p_fake) / (weight + 1e-6)                              # not 0/0 where p_real = 0
            if self.f_div != "rkl":
                # The best head has D(x_t) = ln p_real(x_t) / p_fake(x_t). Of mean 1, so that the step keeps its size.
                ratio = self.logits(x_t, sigma, labels).clamp(-10, 10).exp()        # [B]
                h = F_DIVERGENCES[self.f_div](ratio)
                grad = grad * (h / self.batch_mean(h)).view(-1, 1, 1, 1)
        # L_dm = 0.5 mse(x_gen, stopgrad(x_gen - grad))
        loss = 0.5 * F.mse_loss(x_gen, (x_gen - grad).detach())
        return loss, dict(grad=grad)

    def compute_loss_fake(self, x_gen, labels, rng=None):
        """Denoising loss of fake_unet on generated images (DMD2, section 3; DMD, equation 6; with the Karras weight).

        Args:
            x_gen: generated images, float [B, 3, 32, 32]; no gradient goes back to them.
            labels: the classes they were generated for, [B].
            rng: StepRandom; None draws anew.

        Returns:
            the loss, a scalar, and a dict with fake_x0 [B, 3, 32, 32].
        """
        rng = rng or fresh_random(x_gen.device)
        x_gen = x_gen.detach()
        x_t, sigma = self.add_noise(x_gen, *self.fake_steps, rng)
        fake_x0 = self.fake_unet(x_t, sigma, labels)
        # L_fake = mean(w_t (fake(x_gen + sigma_t eps) - x_gen)^2)
        loss = (karras_weight(sigma) * (fake_x0 - x_gen) ** 2).mean()
        return loss, dict(fake_x0=fake_x0.detach())

    def logits(self, x_t, sigma, labels):
        """D(x_t): high where noised images look real for their labels, [B]."""
        return self.cls_head(self.fake_unet(x_t, sigma, labels, return_features=True)[-1])

    def gan_noise(self, x, rng):
        """x noised to a random level, as a diffusion GAN sees it (section 4.3): x_t and sigma like add_noise."""
        if self.diffusion_gan_max_timestep == 0:
            return x, self.sigmas[0].expand(len(x), 1, 1, 1)
        return self.add_noise(x, 0, self.diffusion_gan_max_timestep - 1, rng)

    def compute_generator_cls_loss(self, x_gen, labels, rng=None):
        """The generator's side of the GAN (DMD2, section 4.3, equation 4, in its non-saturating form).

        Args:
            x_gen: generated images, float [B, 3, 32, 32], with a gradient to the generator.
            labels: the classes they were generated for, [B].
            rng: StepRandom; None draws anew.

        Returns:
            the loss, a scalar that leaves no gradient on this model, and an empty dict.
        """
        x_t, sigma = self.gan_noise(x_gen, rng or fresh_random(x_gen.device))
        with frozen(self.fake_unet, self.cls_head):
            # L_gen = mean(softplus(-D(x_gen + sigma_t eps)))
            return F.softplus(-self.logits(x_t, sigma, labels)).mean(), {}

    def compute_cls_loss(self, x_gen, labels, x_real, real_labels, rng=None):
        """The discriminator's side of the GAN (DMD2, section 4.3, equation 4), for fake_unet and cls_head.

        Args:
            x_gen: generated images, float [B, 3, 32, 32]; no gradient goes back to them.
            labels: the classes they were generated for, [B].
            x_real, real_labels: images of the dataset, float [B, 3, 32, 32] in [-1, 1], and their own classes, [B].
            rng: StepRandom; None draws anew.

        Returns:
            the loss, a scalar, and a dict with logit_fake and logit_real, 0-d means.
        """
        rng = rng or fresh_random(x_gen.device)
        noised = [self.gan_noise(x, rng) for x in (x_gen.detach(), x_real)]
        x_t, sigma = (torch.cat(parts) for parts in zip(*noised, strict=True))      # [2 B, 3, 32, 32], [2 B, 1, 1, 1]
        fake, real = self.logits(x_t, sigma, torch.cat([labels, real_labels])).split([len(x_gen), len(x_real)])
        # L_cls = mean(softplus(D(x_gen + sigma_t eps))) + mean(softplus(-D(x_real + sigma_t eps)))
        loss = F.softplus(fake).mean() + F.softplus(-real).mean()
        return loss, dict(logit_fake=fake.detach().mean(), logit_real=real.detach().mean())

    def compute_gan_losses(self, x_gen, labels, x_real, real_labels, rng=None):
        """Both sides of a GAN whose discriminator sees the frozen real_unet's features of noised images.

        The generator's loss and the discriminator's, at once and of the same images (latent adversarial diffusion
        distillation, Sauer et al. 2024, arXiv 2403.12015, section 3; the hinge loss, arXiv 1705.02894, section 3).

        Args:
            x_gen: generated images, float [B, 3, 32, 32], with a gradient to the generator.
            labels: the classes they were generated for, [B].
            x_real, real_labels: images of the dataset, float [B, 3, 32, 32] in [-1, 1], and their own classes, [B].
            rng: StepRandom; None draws anew.

        Returns:
            a dict of two scalars, loss_gan, which leaves no gradient on this model, and loss_discriminator, which
            leaves none on the generator; and a dict with logit_fake and logit_real, 0-d means.
        """
        rng = rng or fresh_random(x_gen.device)
        fake = self.real_unet(*self.gan_noise(x_gen, rng), labels, return_features=True)
        with torch.no_grad():
            real = self.real_unet(*self.gan_noise(x_real, rng), real_labels, return_features=True)
        with frozen(self.discriminator):
            # L_gan = -mean(D(x_gen + sigma_t eps))
            loss_gan = -self.discriminator(fake, labels).mean()
        fake = self.discriminator([level.detach() for level in fake], labels)       # [B, L]
        real = self.discriminator(real, real_labels)
        # L_discriminator = mean(max(0, 1 + D(x_gen + sigma_t eps))) + mean(max(0, 1 - D(x_real + sigma_t eps)))
        # Each head has its own hinges: in those of the mean, one that is sure would leave the others nothing to learn.
        loss = F.relu(1 + fake).mean() + F.relu(1 - real).mean()
        losses = dict(loss_gan=loss_gan, loss_discriminator=loss)
        return losses, dict(logit_fake=fake.detach().mean(), logit_real=real.detach().mean())
