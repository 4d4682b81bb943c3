import numpy as np
import pytest
import torch
from conftest import GaussianDenoiser

import diffusion


def test_karras_schedule():
    sigmas = diffusion.karras_sigmas()
    assert len(sigmas) == 1000
    assert sigmas[0].item() == pytest.approx(0.002) and sigmas[-1].item() == pytest.approx(80.0)
    assert (sigmas.diff() > 0).all()
    # Equation 5 by hand at one inner index: rank 700 from below is i = 299 from above.
    by_hand = (80 ** (1 / 7) + 299 / 999 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert sigmas[700].item() == pytest.approx(by_hand, rel=1e-9)
    with pytest.raises(ValueError):
        diffusion.karras_sigmas(10, 1.0, 0.5)


def test_lognormal_sigma_has_the_paper_distribution():
    log_sigma = diffusion.lognormal_sigma(torch.randn(200_000)).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.02)


def test_weight_makes_the_error_of_F_count_equally():
    # lambda(sigma) c_out(sigma)^2 = 1 (Karras et al., equation 8 and table 1).
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(diffusion.karras_weight(sigma) * c_out**2, torch.ones_like(sigma))


@pytest.mark.parametrize(("mu", "s0"), [(0.3, 0.2), (-0.5, 0.05)])
def test_heun_with_the_ideal_denoiser_gives_the_data(mu, s0):
    # The ODE is linear here: its exact solution is mu + (x_T - mu) s0 / sqrt(s0^2 + sigma_max^2).
    z = torch.randn(200, 3, 32, 32)
    images = diffusion.heun_sample(GaussianDenoiser(mu, s0), z, None, num_steps=64)
    exact = mu + (80 * z - mu) * s0 / (s0**2 + 80**2) ** 0.5
    assert images.mean().item() == pytest.approx(mu, abs=0.01)
    assert images.std().item() == pytest.approx(s0, rel=0.02)
    assert (images - exact).abs().max().item() < 0.05 * s0 * z.abs().max().item()


def test_heun_is_second_order_and_counts_its_evaluations():
    z = torch.randn(20, 3, 8, 8, dtype=torch.float32)
    exact = 0.2 + (80 * z - 0.2) * 0.3 / (0.09 + 6400) ** 0.5
    ideal, calls = GaussianDenoiser(0.2, 0.3), []

    def denoise(x, sigma, labels):
        calls.append(float(sigma))
        return ideal(x, sigma, labels)

    errors = []
    for n in (16, 32):
        calls.clear()
        errors.append((diffusion.heun_sample(denoise, z, None, n) - exact).abs().mean().item())
        assert len(calls) == 2 * n - 1
        assert calls[0] == pytest.approx(80.0) and min(calls) == pytest.approx(0.002)
    assert errors[0] / errors[1] > 3                # 4 in the limit; a first-order method gives 2


def test_one_step_of_the_ideal_denoiser_is_the_mean_of_the_data():
    images = diffusion.one_step_sample(GaussianDenoiser(0.3, 0.2), torch.randn(8, 3, 32, 32), None, 80.0)
    np.testing.assert_allclose(images.mean().item(), 0.3, atol=1e-3)
    assert images.std().item() < 1e-3
