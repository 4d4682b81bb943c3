import pytest
import torch
from conftest import GaussianDenoiser
from torch import nn

from diffusion import karras_sigmas, karras_weight
from guidance import GuidanceModel
from model import SimpleUNet
from randomness import StepRandom
from unified_model import UnifiedModel

LABELS = torch.arange(4)


def small_net():
    net = SimpleUNet(channels=8)
    for parameter in net.parameters():              # so that no output is trivially zero
        nn.init.normal_(parameter, std=0.1)
    return net


def images():
    return torch.randn(4, 3, 32, 32).requires_grad_()


def test_equal_scores_give_no_gradient():
    x_gen = images()
    loss, log = GuidanceModel(small_net()).compute_distribution_matching_loss(x_gen, LABELS)
    loss.backward()
    assert loss.item() == 0 and not log["grad"].any() and not x_gen.grad.any()


def test_gradient_at_x_gen_is_grad_over_numel_and_grad_is_the_paper_formula():
    guidance = GuidanceModel(GaussianDenoiser(0.3, 0.2))
    guidance.fake_unet = GaussianDenoiser(-0.1, 0.4)
    x_gen = images()
    loss, log = guidance.compute_distribution_matching_loss(x_gen, LABELS, StepRandom(7, 3))
    loss.backward()
    torch.testing.assert_close(x_gen.grad, log["grad"] / x_gen.numel(), rtol=1e-4, atol=1e-9)

    rng = StepRandom(7, 3)                          # the same draws: t uniform in 20..980, then eps
    sigma = karras_sigmas().float()[rng.integers(20, 980, 4, 1, 1, 1)]
    x_t = x_gen.detach() + sigma * rng.normal(4, 3, 32, 32)
    real, fake = (0.04 * x_t + sigma**2 * 0.3) / (0.04 + sigma**2), (0.16 * x_t - sigma**2 * 0.1) / (0.16 + sigma**2)
    weight = (x_gen.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(log["grad"], (fake - real) / weight, rtol=1e-3, atol=1e-4)


def test_a_step_against_the_gradient_moves_towards_the_real_data():
    guidance = GuidanceModel(GaussianDenoiser(0.5, 0.2))
    guidance.fake_unet = GaussianDenoiser(0.0, 0.2)
    x_gen = (0.2 * torch.randn(64, 3, 32, 32)).requires_grad_()
    loss, _ = guidance.compute_distribution_matching_loss(x_gen, torch.zeros(64, dtype=torch.long))
    loss.backward()
    assert x_gen.grad.mean() < 0                    # so descent raises x_gen, from 0 towards 0.5


class Affine(nn.Module):
    """x -> a + b x / sigma: the generator that can turn unit noise into any Gaussian."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(-0.4)), nn.Parameter(torch.tensor(0.9))

    def forward(self, x, sigma, labels):
        return self.a + self.b * x / sigma


def test_with_exact_scores_the_generator_converges_to_the_data():
    mu, s0 = 0.3, 0.2
    model = UnifiedModel(Affine())
    generator, guidance = model.feedforward_model, model.guidance_model
    guidance.real_unet = GaussianDenoiser(mu, s0)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.02)
    labels = torch.zeros(256, dtype=torch.long)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        rng = StepRandom(0, step)
        x_gen = model.generate(rng.normal(256, 3, 4, 4), labels)
        guidance.fake_unet = GaussianDenoiser(generator.a.item(), abs(generator.b.item()))     # exact at every step
        loss, _ = model.generator_turn(x_gen, labels, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert generator.a.item() == pytest.approx(mu, abs=0.01)
    assert abs(generator.b.item()) == pytest.approx(s0, rel=0.05)


def test_fake_loss_is_the_weighted_denoising_error():
    guidance = GuidanceModel(GaussianDenoiser(0.3, 0.2))
    x_gen = images()
    loss, log = guidance.compute_loss_fake(x_gen, LABELS, StepRandom(1, 2))
    rng = StepRandom(1, 2)                          # the same draws: t uniform in 0..999, then eps
    sigma = karras_sigmas().float()[rng.integers(0, 999, 4, 1, 1, 1)]
    x_t = x_gen.detach() + sigma * rng.normal(4, 3, 32, 32)
    denoised = (0.04 * x_t + sigma**2 * 0.3) / (0.04 + sigma**2)
    torch.testing.assert_close(loss, (karras_weight(sigma) * (denoised - x_gen.detach()) ** 2).mean())
    torch.testing.assert_close(log["fake_x0"], denoised)


def test_the_fake_loss_is_least_at_the_score_of_the_generated_images():
    x_gen = 0.1 + 0.3 * torch.randn(512, 3, 8, 8)
    losses = {}
    for mu, s0 in ((0.1, 0.3), (0.2, 0.3), (0.0, 0.3), (0.1, 0.2), (0.1, 0.4)):
        guidance = GuidanceModel(GaussianDenoiser(mu, s0))
        losses[mu, s0] = guidance.compute_loss_fake(x_gen, None, StepRandom(0, 0))[0].item()
    assert min(losses, key=losses.get) == (0.1, 0.3)


def test_noise_levels_stay_in_the_range_asked_for():
    seen = []

    class Spy(GaussianDenoiser):
        def forward(self, x, sigma, labels):
            seen.append(sigma.flatten())
            return super().forward(x, sigma, labels)

    guidance = GuidanceModel(Spy(0.0, 1.0), min_step_percent=0.3, max_step_percent=0.4)
    x, labels = torch.zeros(512, 3, 2, 2), torch.zeros(512, dtype=torch.long)
    sigmas = karras_sigmas().float()
    guidance.compute_distribution_matching_loss(x, labels)
    # 101 levels and 512 draws: both ends are all but certain to turn up, and the fixed seed makes it sure.
    assert sigmas[300] == min(seen[0]) and sigmas[400] == max(seen[0])
    seen.clear()
    for _ in range(20):
        guidance.compute_loss_fake(x, labels)
    assert sigmas[0] == torch.cat(seen).min() and sigmas[999] == torch.cat(seen).max()


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.4), (-0.1, 0.5), (0.1, 1.1)])
def test_bad_ranges_are_refused(low, high):
    with pytest.raises(ValueError):
        GuidanceModel(GaussianDenoiser(0, 1), min_step_percent=low, max_step_percent=high)


def test_each_turn_trains_its_own_network_only_and_the_teacher_stays_as_it_was():
    teacher = small_net()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    model = UnifiedModel(teacher)
    for network in (model.feedforward_model, model.guidance_model.fake_unet, model.guidance_model.real_unet):
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[name])        # all three start from the teacher

    model.train()
    assert not model.guidance_model.real_unet.training and model.guidance_model.fake_unet.training
    generator, guidance = model.feedforward_model, model.guidance_model
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        rng = StepRandom(0, step)
        x_gen = model.generate(rng.normal(4, 3, 32, 32), LABELS)
        loss, _ = model.guidance_turn(x_gen, LABELS, rng)
        loss.backward()
        assert all(p.grad is None for p in generator.parameters())
        assert all(p.grad is not None for p in guidance.fake_unet.parameters())
        optimizer.step()
        optimizer.zero_grad()

        loss, _ = model.generator_turn(x_gen, LABELS, rng)
        loss.backward()
        assert all(p.grad is None for p in guidance.parameters())
        assert sum(p.grad.abs().sum() for p in generator.parameters()) > 0
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in guidance.real_unet.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(p.requires_grad for p in guidance.real_unet.parameters())
