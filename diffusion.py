"""Karras et al. 2022 (EDM, arXiv 2206.00364): noise schedule, sigma sampling, loss weight, samplers.

Everything here takes a denoiser `denoise(x_t, sigma, labels) -> x0_hat` and knows nothing of what is inside it.
"""

import torch

SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
SIGMA_DATA = 0.5
RHO = 7.0
NUM_TRAIN_TIMESTEPS = 1000


def karras_sigmas(num_steps=NUM_TRAIN_TIMESTEPS, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO):
    """Noise levels of equation 5, smallest first: float64 [num_steps]; a timestep t indexes them."""
    if num_steps < 1 or not 0 < sigma_min <= sigma_max:
        got = f"{num_steps}, {sigma_min}, {sigma_max}"
        raise ValueError(f"need num_steps >= 1 and 0 < sigma_min <= sigma_max, got {got}")
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64).flip(0) if num_steps > 1 else torch.zeros(1).double()
    # sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


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
        z: unit Gaussian noise, float [B, 3, 32, 32].
        labels: class indices [B] or one-hot rows.

    Returns:
        images, float32 [B, 3, 32, 32], about [-1, 1], not clipped.
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


def one_step_sample(generator, z, labels, conditioning_sigma):
    """x_gen = G(z sigma_cond, sigma_cond, y) (DMD2, section 3): one evaluation; gradients flow where they are on."""
    return generator(z * conditioning_sigma, conditioning_sigma, labels)            # [B, 3, 32, 32]
