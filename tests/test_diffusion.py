import numpy as np
import pytest
import torch
from conftest import GaussianDenoiser

import diffusion
from support import sampling


def test_karras_schedule():
    sigmas = diffusion.karras_sigmas()
    assert len(sigmas) == 1000
    assert sigmas[0].item() == pytest.approx(0.002) and sigmas[-1].item() == pytest.approx(80.0)
    assert (sigmas.diff() > 0).all()
    # Equation 5 by hand at one inner index: rank 700 from below is i = 299 from above.
    by_hand = (80 ** (1 / 7) + 299 / 999 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert sigmas[700].item() == pytest.approx(by_hand, rel=1e-9)
    with pytest.raises(ValueError, match="sigma_min"):
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


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_few_steps_of_an_ideal_generator_give_the_datas_mean_and_std(num_steps):
    mu, s0, seen = 0.3, 0.2, []

    def generator(x_t, sigma, labels):              # the end of the probability flow through (x_t, sigma), exact
        seen.append(sigma)
        return mu + (x_t - mu) * s0 / (s0**2 + sigma**2) ** 0.5

    sigmas = diffusion.denoising_sigmas(80.0, num_steps)
    z = torch.randn(64, 3, 32, 32)
    images = diffusion.few_step_sample(generator, z, None, sigmas, lambda i: torch.randn_like(z))
    assert images.mean().item() == pytest.approx(mu, abs=2e-3) and images.std().item() == pytest.approx(s0, rel=0.01)
    assert seen == sigmas and len(sigmas) == num_steps and sigmas == sorted(sigmas, reverse=True) and sigmas[0] == 80


def test_few_step_levels_are_evenly_spread_by_equation_5():
    wanted = [(80 ** (1 / 7) * (4 - i) / 4 + 0.002 ** (1 / 7) * i / 4) ** 7 for i in range(4)]
    np.testing.assert_allclose(diffusion.denoising_sigmas(80.0, 4), wanted)
    assert diffusion.denoising_sigmas(17.3, 1) == [17.3]


def test_only_the_last_of_several_steps_takes_a_gradient():
    weight = torch.ones(2, requires_grad=True)
    levels = {80.0: 0, 2.0: 1}

    def generator(x_t, sigma, labels):
        return weight[levels[float(sigma)]] * x_t

    z = torch.ones(1, 3, 2, 2)
    diffusion.few_step_sample(generator, z, None, [80.0, 2.0], lambda i: z).sum().backward()
    assert weight.grad.tolist() == [0, (80 + 2) * 12]


def test_guidance_moves_from_the_unconditional_estimate_through_the_conditional_one():
    def denoise(x_t, sigma, labels):                # 1 where there is a class, 0.25 where there is none
        return torch.where(labels >= 0, 1.0, 0.25).view(-1, 1, 1, 1).expand_as(x_t)

    x, labels = torch.zeros(3, 3, 2, 2), torch.tensor([0, 5, 9])
    assert diffusion.guided(denoise, 1.0) is denoise
    for scale, wanted in ((0.0, 0.25), (3.0, 2.5)):
        guided = diffusion.guided(denoise, scale)(x, 1.0, labels)
        torch.testing.assert_close(guided, torch.full_like(x, wanted))
    sigma = torch.tensor([0.5, 0.51, 2.0]).view(3, 1, 1, 1)         # of the interval its upper end alone
    guided = diffusion.guided(denoise, 3.0, (0.5, 2.0))
    assert guided(x, sigma, labels)[:, 0, 0, 0].tolist() == [1.0, 2.5, 2.5]
    assert guided(x, 2.01, labels)[:, 0, 0, 0].tolist() == [1.0, 1.0, 1.0]


def test_autoguidance_moves_on_from_the_weaker_denoiser():
    asked = []

    def denoise(x_t, sigma, labels):
        asked.extend(labels.tolist())
        return torch.where(labels >= 0, 1.0, 0.25).view(-1, 1, 1, 1).expand_as(x_t)

    def weaker(x_t, sigma, labels):                 # 0, 0.5 and 0.9 for the classes below
        return labels.view(-1, 1, 1, 1).expand_as(x_t) / 10

    x, labels = torch.zeros(3, 3, 2, 2), torch.tensor([0, 5, 9])
    guided = diffusion.guided(denoise, guide=weaker, autoguidance_scale=3.0)
    torch.testing.assert_close(guided(x, 1.0, labels)[:, 0, 0, 0], torch.tensor([3.0, 2.0, 1.2]))
    assert asked == [0, 5, 9]                       # never without a class: that is the other guidance
    both = diffusion.guided(denoise, 2.0, (0.5, 2.0), weaker, 3.0)                  # 0.75 more, within the interval
    torch.testing.assert_close(both(x, 1.0, labels)[:, 0, 0, 0], torch.tensor([3.75, 2.75, 1.95]))
    sigma = torch.tensor([0.5, 0.51, 2.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(both(x, sigma, labels)[:, 0, 0, 0], torch.tensor([1.0, 2.75, 1.95]))
    alone = diffusion.guided(denoise, 2.0, guide=weaker)
    torch.testing.assert_close(alone(x, 1.0, labels), torch.full_like(x, 1.75))


def test_guidance_costs_further_evaluations_only_in_its_interval():
    seen = []

    def denoise(x_t, sigma, labels):
        seen.append((float(sigma), int(labels[0])))
        return x_t / 2

    def weaker(x_t, sigma, labels):
        seen.append((float(sigma), "weaker"))
        return x_t / 3

    levels = diffusion.karras_sigmas(18)
    low, high = float(levels[3]), float(levels[8])  # five levels within, each of them asked twice by Heun's method
    state = dict(kind="teacher", sigma_min=0.002, sigma_max=80.0)
    within = (low * 1.01, high * 1.01)
    for w, v, interval, wanted in (
        (1.0, 1.0, None, 35), (4.0, 1.0, None, 70), (4.0, 1.0, within, 45), (1.0, 2.0, within, 45),
        (4.0, 2.0, within, 55),
    ):
        seen.clear()
        guidance = dict(cfg_scale=w, cfg_interval=interval, guide=weaker, autoguidance_scale=v)
        diffusion.heun_sample(diffusion.guided(denoise, **guidance), torch.zeros(1, 3, 2, 2), torch.ones(1).long())
        assert len(seen) == wanted == sampling.evaluations(state, 18, guidance)
        more = {sigma for sigma, asked in seen if asked in (-1, "weaker")}
        assert all(interval is None or interval[0] < sigma <= interval[1] for sigma in more)
        assert sum(asked == "weaker" for _, asked in seen) == (0 if v == 1 else 10)


def test_all_noise_levels_share_one_compiled_graph():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    generator = torch.compile(GaussianDenoiser(0.3, 0.2), backend=backend)
    z = torch.randn(2, 3, 4, 4)
    with torch.no_grad():                           # the one that takes a gradient is another
        diffusion.few_step_sample(generator, z, None, [80.0, 9.0, 2.0, 0.5], lambda i: z)
    assert len(graphs) == 1
