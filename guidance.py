"""GuidanceModel: the teacher's and the student's score, and the losses of DMD2 (Yin et al. 2024, arXiv 2405.14867).

    guidance = GuidanceModel(teacher)
    loss_dm, log = guidance.compute_distribution_matching_loss(x_gen, labels, rng)     # moves the generator
    loss_fake, log = guidance.compute_loss_fake(x_gen, labels, rng)                    # moves fake_unet
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import NUM_TRAIN_TIMESTEPS, SIGMA_MAX, SIGMA_MIN, karras_sigmas, karras_weight
from randomness import StepRandom


def fresh_random(device):
    """A StepRandom seeded by torch's global generator, so that torch.manual_seed rules where none is given."""
    return StepRandom(int(torch.randint(2**31, ())), 0, device)


class GuidanceModel(nn.Module):
    """Two denoisers: real_unet, the frozen teacher, and fake_unet, trained on what the generator makes.

    Args:
        teacher: a denoiser (x_t, sigma, labels) -> x0_hat; real_unet and fake_unet start as copies of it.
        min_step_percent, max_step_percent: range of the noise levels of the distribution matching loss, as fractions
            of the 1000 Karras steps, 0 the least noise.
        sigma_min, sigma_max: range of the Karras schedule; images span [-1, 1].
    """

    def __init__(
        self, teacher, min_step_percent=0.02, max_step_percent=0.98, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX
    ):
        super().__init__()
        if not 0 <= min_step_percent <= max_step_percent <= 1:
            got = f"{min_step_percent}, {max_step_percent}"
            raise ValueError(f"need 0 <= min_step_percent <= max_step_percent <= 1, got {got}")
        self.real_unet = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.fake_unet = copy.deepcopy(teacher).train().requires_grad_(True)
        last = NUM_TRAIN_TIMESTEPS - 1
        self.min_step = min(int(min_step_percent * NUM_TRAIN_TIMESTEPS), last)
        self.max_step = min(int(max_step_percent * NUM_TRAIN_TIMESTEPS), last)
        sigmas = karras_sigmas(NUM_TRAIN_TIMESTEPS, sigma_min, sigma_max).float()
        self.register_buffer("sigmas", sigmas, persistent=False)

    def train(self, mode=True):
        super().train(mode)
        self.real_unet.eval()                       # the teacher never trains, whatever its container does
        return self

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
            p_real = x_gen - self.real_unet(x_t, sigma, labels)                     # [B, 3, 32, 32]
            p_fake = x_gen - self.fake_unet(x_t, sigma, labels)
            weight = p_real.abs().mean(dim=(1, 2, 3), keepdim=True)                 # [B, 1, 1, 1]
            grad = (p_real - p_fake) / (weight + 1e-6)                              # not 0/0 where p_real = 0
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
        x_t, sigma = self.add_noise(x_gen, 0, NUM_TRAIN_TIMESTEPS - 1, rng)
        fake_x0 = self.fake_unet(x_t, sigma, labels)
        # L_fake = mean(w_t (fake(x_gen + sigma_t eps) - x_gen)^2)
        loss = (karras_weight(sigma) * (fake_x0 - x_gen) ** 2).mean()
        return loss, dict(fake_x0=fake_x0.detach())
