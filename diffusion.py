"""Karras et al. 2022 (EDM, arXiv 2206.00364): noise schedule, sigma sampling, loss weight, samplers.

Everything here takes a denoiser `denoise(x_t, sigma, labels) -> x0_hat` and knows nothing of what is inside it.
"""

import math

import torch

from constants import NUM_TRAIN_TIMESTEPS, RHO, SIGMA_MAX, SIGMA_MIN

SIGMA_DATA = 0.5


def karras_sigmas(num_steps=NUM_TRAIN_TIMESTEPS, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO):
    """Noise levels of equation 5, smallest first: float64 [num_steps]; a timestep t indexes them."""
    if num_steps < 1 or not 0 < sigma_min <= sigma_max:
        got = f"{num_steps}, {sigma_min}, {sigma_max}"
        raise ValueError(f"need num_steps >= 1 and 0 < sigma_min <= sigma_max, got {got}")
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64).flip(0)
    # sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def timestep(fraction):
    """The timestep, 0 .. 999, at this fraction of the Karras schedule: 0 is the least noise, 1 the most."""
    return min(int(fraction * NUM_TRAIN_TIMESTEPS), NUM_TRAIN_TIMESTEPS - 1)


def lognormal_sigma(normal, p_mean=-1.2, p_std=1.2):
    """ln(sigma) ~ N(p_mean, p_std^2) (table 1, training), from standard normal numbers of any shape."""
    return (p_mean + p_std * normal).exp()


def karras_weight(sigma, sigma_data=SIGMA_DATA):
    """Loss weight lambda(sigma) of table 1, written for x0: 1/sigma^2 + 1/sigma_data^2."""
    return 1 / sigma**2 + 1 / sigma_data**2


@torch.no_grad()
def heun_sample(denoise, z, labels, num_steps=18, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO):
    """Deterministic second-order sampler (algorithm 1), 2 * num_steps - 1 evaluations.

    Args:
        denoise: the denoiser.
        z: unit Gaussian noise, float [B, 3, H, W].
        labels: class indices [B], -1 for no class.

    Returns:
        images, float32 [B, 3, H, W], about [-1, 1], not clipped.
    """
    sigmas = karras_sigmas(num_steps, sigma_min, sigma_max, rho).flip(0).float().to(z.device)
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])                               # t_N = 0
    x = z.float() * sigmas[0]
    for i in range(num_steps):
        t, t_next = sigmas[i], sigmas[i + 1]
        d = (x - denoise(x, t, labels)) / t                                         # dx/dt at t
        x_next = x + (t_next - t) * d                                               # Euler step
        if i < num_steps - 1:
            d_next = (x_next - denoise(x_next, t_next, labels)) / t_next            # dx/dt at t_next
            x_next = x + (t_next - t) * (d + d_next) / 2                            # trapezoidal correction
        x = x_next
    return x


def guided(denoise, cfg_scale=1.0, cfg_interval=None, guide=None, autoguidance_scale=1.0):
    """The denoiser D, guided away from its estimate without a class, D(-1), and from a weaker denoiser's, D_weak.

        D + (w - 1) (D - D(-1)) + (v - 1) (D - D_weak)

    The first is classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), the second autoguidance (Karras et al.
    2024, arXiv 2406.02507, section 4): the weaker denoiser makes the same errors as D, only larger.

    Args:
        denoise: D; for w != 1 it must be trained with label dropout: label -1 means no class.
        cfg_scale: w; 1 is off and costs nothing.
        cfg_interval: low, high: both act only at low < sigma <= high, as guidance at high noise reduces mode coverage
            (Kynkaanniemi et al. 2024, arXiv 2404.07724); None: everywhere. If all images have the same sigma, as in a
            sampler, guidance costs no evaluation outside the interval.
        guide: D_weak, smaller than D or trained for fewer steps; needed for v != 1.
        autoguidance_scale: v; 1 is off and costs nothing.
    """
    w, v = cfg_scale, autoguidance_scale
    if w == v == 1:
        return denoise
    low, high = cfg_interval or (0, math.inf)

    def denoise_guided(x_t, sigma, labels):
        sigma = torch.as_tensor(sigma, device=x_t.device)
        inside = (low < sigma) & (sigma <= high)                                    # [], or [B, 1, 1, 1]
        x0_hat = denoise(x_t, sigma, labels)
        if cfg_interval and sigma.ndim == 0 and not inside:
            return x0_hat
        away = 0                                                                    # [B, 3, H, W]
        if w != 1:
            away = away + (w - 1) * (x0_hat - denoise(x_t, sigma, torch.full_like(labels, -1)))
        if v != 1:
            away = away + (v - 1) * (x0_hat - guide(x_t, sigma, labels))
        return x0_hat + inside * away

    return denoise_guided


def denoising_sigmas(conditioning_sigma, num_steps, sigma_min=SIGMA_MIN):
    """Noise levels at which a few-step generator is evaluated, most noise first: a list of num_steps floats.

    Equation 5 from conditioning_sigma down, without its last level, sigma_min: 80 and 2.5 for two steps from 80.
    """
    if num_steps == 1:
        return [conditioning_sigma]
    return [conditioning_sigma, *karras_sigmas(num_steps + 1, sigma_min, conditioning_sigma).flip(0)[1:-1].tolist()]


def few_step_sample(generator, z, labels, sigmas, renoise):
    """Sample a generator at a descending list of noise levels (DMD2, section 4.4), one evaluation each.

    Args:
        generator: a denoiser (x_t, sigma, labels) -> x0_hat.
        z: unit Gaussian noise, float [B, 3, H, W].
        labels: class indices [B], -1 for no class.
        sigmas: the noise levels; a list of one makes it the one-step generator of section 3, G(z sigma, sigma, y).
        renoise: i -> fresh unit noise [B, 3, H, W], for i = 1 .. len(sigmas) - 1.

    Returns:
        images, float32 [B, 3, H, W]; gradients, if enabled, come from the last evaluation alone.
    """
    grad, x_gen = torch.is_grad_enabled(), 0
    for i, sigma in enumerate(sigmas):
        sigma = torch.full((), sigma, device=z.device)          # a float would be compiled anew for each level
        x_t = x_gen + sigma * (renoise(i) if i else z)
        with torch.set_grad_enabled(grad and i == len(sigmas) - 1):
            x_gen = generator(x_t, sigma, labels)                                   # [B, 3, H, W]
    return x_gen
