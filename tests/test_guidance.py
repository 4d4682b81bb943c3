import pytest
import torch
from conftest import GaussianDenoiser
from torch import nn

from diffusion import karras_sigmas, karras_weight
from guidance import GuidanceModel
from model import SimpleUNet
from support.errors import UsageError
from support.randomness import StepRandom
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


def test_where_the_teacher_changes_nothing_there_is_no_gradient_and_no_nan():
    x_gen = torch.full((4, 3, 32, 32), 0.5).requires_grad_()
    guidance = GuidanceModel(GaussianDenoiser(0.5, 0.0))            # p_real = 0, by which the gradient is divided
    loss, _ = guidance.compute_distribution_matching_loss(x_gen, LABELS)
    loss.backward()
    assert loss.item() == 0 and not x_gen.grad.any()


@pytest.mark.formula
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


def test_several_steps_draw_their_own_noise_where_none_is_given():
    model, z = UnifiedModel(small_net(), 80.0, 3), torch.randn(4, 3, 32, 32)
    images = [model.generate(z, LABELS) for _ in range(8)]          # of one, two and three steps
    assert all(image.shape == z.shape and image.isfinite().all() for image in images)
    assert any(not torch.equal(image, images[0]) for image in images)


class Affine(nn.Module):
    """x -> a + b x / sigma: the generator that can turn unit noise into any Gaussian."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(-0.4)), nn.Parameter(torch.tensor(0.9))

    def forward(self, x, sigma, labels):
        return self.a + self.b * x / sigma


def test_with_exact_scores_the_generator_converges_to_the_data():
    mu, s0 = 0.3, 0.2
    model = UnifiedModel(Affine(), shape=(3, 32, 32))
    generator, guidance = model.feedforward_model, model.guidance_model
    guidance.real_unet = GaussianDenoiser(mu, s0)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.02)
    labels = torch.zeros(256, dtype=torch.long)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        rng = StepRandom(0, step)
        x_gen = model.generate(rng.normal(256, 3, 4, 4), labels)
        guidance.fake_unet = GaussianDenoiser(generator.a.item(), abs(generator.b.item()))     # exact at every step
        loss = model.generator_turn(x_gen, labels, rng)[0]["loss_dm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert generator.a.item() == pytest.approx(mu, abs=0.01)
    assert abs(generator.b.item()) == pytest.approx(s0, rel=0.05)


@pytest.mark.formula
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

    guidance = GuidanceModel(Spy(0.0, 1.0), min_step_percent=0.3, max_step_percent=0.4, fake_noise="dm")
    seen.clear()
    guidance.compute_loss_fake(x, labels)
    assert sigmas[300] == seen[0].min() and sigmas[400] == seen[0].max()


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.4), (-0.1, 0.5), (0.1, 1.1)])
def test_bad_ranges_are_refused(low, high):
    with pytest.raises(ValueError, match="min_step_percent <= max_step_percent"):
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
        losses, _ = model.guidance_turn(x_gen, LABELS, rng)
        assert list(losses) == ["loss_fake"]
        losses["loss_fake"].backward()
        assert all(p.grad is None for p in generator.parameters())
        assert all(p.grad is not None for p in guidance.fake_unet.parameters())
        optimizer.step()
        optimizer.zero_grad()

        losses, _ = model.generator_turn(x_gen, LABELS, rng)
        assert list(losses) == ["loss_dm"]
        losses["loss_dm"].backward()
        assert all(p.grad is None for p in guidance.parameters())
        assert sum(p.grad.abs().sum() for p in generator.parameters()) > 0
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in guidance.real_unet.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(p.requires_grad for p in guidance.real_unet.parameters())


# --- classifier head, several steps, guidance -------------------------------------------------------------------------


def with_head(**kwargs):
    return UnifiedModel(small_net(), cls_head=True, **kwargs)


def turns(model, rng, x_gen=None):
    """Losses of a generator turn and of a guidance turn."""
    x_gen = model.generate(rng.normal(4, 3, 32, 32), LABELS, rng) if x_gen is None else x_gen
    losses, _ = model.generator_turn(x_gen, LABELS, rng)
    x_real = 0.5 * rng.normal(4, 3, 32, 32)
    return losses, model.guidance_turn(x_gen, LABELS, rng, x_real, LABELS.flip(0))[0]


def test_without_a_classifier_head_losses_and_random_numbers_are_the_seeds():
    teacher = small_net()
    plain, headed = UnifiedModel(teacher), UnifiedModel(teacher, cls_head=True)
    assert not any("cls_head" in name for name in plain.state_dict())
    rng, rng_headed = StepRandom(0, 0), StepRandom(0, 0)
    x_gen = plain.generate(rng.normal(4, 3, 32, 32), LABELS, rng)
    assert torch.equal(x_gen, headed.generate(rng_headed.normal(4, 3, 32, 32), LABELS, rng_headed))
    losses, _ = plain.generator_turn(x_gen, LABELS, rng)
    more, _ = headed.generator_turn(x_gen, LABELS, rng_headed)
    assert set(losses) == {"loss_dm"} and set(more) == {"loss_dm", "gen_cls_loss"}
    assert torch.equal(losses["loss_dm"], more["loss_dm"])          # the head's random numbers come last


@pytest.mark.formula
def test_the_classifier_heads_losses_are_softplus_of_the_logits():
    model = with_head()
    guidance = model.guidance_model
    x_gen, x_real = images(), torch.randn(4, 3, 32, 32)
    labels, real_labels = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])
    rng = StepRandom(5, 0)
    logits = []
    for x, y in ((x_gen, labels), (x_real, real_labels)):
        sigma = guidance.sigmas[rng.integers(0, 999, 4, 1, 1, 1)]
        x_t = x + sigma * rng.normal(4, 3, 32, 32)
        logits.append(guidance.logits(x_t, sigma, y).detach())
        features = guidance.fake_unet(x_t, sigma, y, return_features=True)[-1]
        assert torch.equal(logits[-1], guidance.cls_head(features).detach())
        assert (guidance.logits(x_t, sigma, y.flip(0)) - logits[-1]).abs().max() > 1e-3             # y matters
    logits = torch.cat(logits)
    loss, log = guidance.compute_cls_loss(x_gen, labels, x_real, real_labels, StepRandom(5, 0))
    wanted = logits[:4].exp().log1p().mean() + (-logits[4:]).exp().log1p().mean()
    torch.testing.assert_close(loss, wanted)
    assert log["logit_fake"] == logits[:4].mean() and log["logit_real"] == logits[4:].mean()
    rng = StepRandom(5, 0)
    sigma = guidance.sigmas[rng.integers(0, 999, 4, 1, 1, 1)]
    logits = guidance.logits(x_gen + sigma * rng.normal(4, 3, 32, 32), sigma, labels)
    loss, _ = guidance.compute_generator_cls_loss(x_gen, labels, StepRandom(5, 0))
    torch.testing.assert_close(loss, (-logits).exp().log1p().mean())


def test_the_classifier_heads_noise_stays_below_its_timestep_and_0_is_clean():
    guidance = with_head(diffusion_gan_max_timestep=10).guidance_model
    x = torch.zeros(256, 3, 2, 2)
    _, sigma = guidance.diffusion_gan_noise(x, StepRandom(0, 0))
    assert sigma.min() == guidance.sigmas[0] and sigma.max() == guidance.sigmas[9]
    guidance.diffusion_gan_max_timestep = 0
    x_t, sigma = guidance.diffusion_gan_noise(x, StepRandom(0, 0))
    assert torch.equal(x_t, x) and (sigma == guidance.sigmas[0]).all() and sigma.shape == (256, 1, 1, 1)


def test_each_loss_of_the_classifier_head_trains_its_own_side():
    model = with_head()
    generator, guidance = model.feedforward_model, model.guidance_model
    rng = StepRandom(0, 0)
    losses, _ = turns(model, rng)
    losses["gen_cls_loss"].backward()
    assert all(p.grad is None for p in guidance.parameters())
    assert sum(p.grad.abs().sum() for p in generator.parameters()) > 0
    generator.zero_grad(set_to_none=True)

    _, losses = turns(model, rng)
    losses["cls_loss"].backward()
    assert all(p.grad is None for p in generator.parameters())
    assert all(p.grad is None for p in guidance.real_unet.parameters())
    assert all(p.grad is not None for p in guidance.cls_head.parameters())
    way_down = [p.grad for name, p in guidance.fake_unet.named_parameters() if name.startswith(("stem", "down"))]
    assert all(grad is not None and grad.any() for grad in way_down)
    assert all(p.requires_grad for p in (*guidance.cls_head.parameters(), *guidance.fake_unet.parameters()))


def test_the_head_learns_to_tell_real_from_generated_and_moves_the_generator_towards_real():
    guidance = with_head().guidance_model
    optimizer = torch.optim.Adam([p for p in guidance.parameters() if p.requires_grad], lr=1e-3)
    for step in range(60):                          # real images are brighter
        rng = StepRandom(0, step)
        x_gen, x_real = (0.3 * rng.normal(16, 3, 32, 32) + mean for mean in (-0.4, 0.4))
        labels = rng.integers(0, 9, 16)
        loss, log = guidance.compute_cls_loss(x_gen, labels, x_real, labels, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert log["logit_real"] > log["logit_fake"] + 1
    x_gen.requires_grad_()
    guidance.compute_generator_cls_loss(x_gen, labels, StepRandom(0, 99))[0].backward()
    assert x_gen.grad.mean() < 0                    # descent makes the generated images brighter


def test_cfg_scale_is_for_the_real_score_alone():
    class ByLabel(GaussianDenoiser):
        """mu where there is a class, 0 where there is none."""

        def forward(self, x, sigma, labels):
            mu, s0 = (labels >= 0).float().view(-1, 1, 1, 1) * self.mu, self.s0
            return (s0**2 * x + sigma**2 * mu) / (s0**2 + sigma**2)

    x_gen = images()
    guided, plain = GuidanceModel(ByLabel(0.3, 0.2), cfg_scale=2.0), GuidanceModel(ByLabel(0.6, 0.2))
    plain.fake_unet = ByLabel(0.3, 0.2)             # uncond + 2 (cond - uncond) = a teacher of mean 2 * 0.3
    grads = [g.compute_distribution_matching_loss(x_gen, LABELS, StepRandom(0, 0))[1]["grad"] for g in (guided, plain)]
    torch.testing.assert_close(*grads)

    def grad(step, scale, interval=None):           # at the one noise level of this fraction of the steps
        model = GuidanceModel(ByLabel(0.3, 0.2), step, step, cfg_scale=scale, cfg_interval=interval)
        return model.compute_distribution_matching_loss(x_gen, LABELS, StepRandom(0, 0))[1]["grad"]

    assert torch.equal(grad(0.5, 2.0, (0.1, 10.0)), grad(0.5, 2.0))                 # at a noise of 2.5
    torch.testing.assert_close(grad(0.9, 2.0, (0.1, 10.0)), grad(0.9, 1.0), rtol=0, atol=1e-6)      # and of 44
    assert grad(0.9, 2.0).abs().mean() > 1e-3


def test_autoguidance_is_for_the_real_score_alone_and_its_guide_never_trains():
    x_gen = images()
    auto = GuidanceModel(GaussianDenoiser(0.3, 0.2), guide=GaussianDenoiser(0.1, 0.2), autoguidance_scale=2.0)
    plain = GuidanceModel(GaussianDenoiser(0.5, 0.2))               # 0.3 + (2 - 1) (0.3 - 0.1)
    plain.fake_unet = GaussianDenoiser(0.3, 0.2)
    grads = [g.compute_distribution_matching_loss(x_gen, LABELS, StepRandom(0, 0))[1]["grad"] for g in (auto, plain)]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().mean() > 1e-3

    weaker = small_net()
    model = UnifiedModel(small_net(), guide=weaker, autoguidance_scale=2.0).train()
    guide = model.guidance_model.guide
    assert guide is not weaker and not guide.training and not any(p.requires_grad for p in guide.parameters())
    assert {f"guidance_model.guide.{name}" for name in weaker.state_dict()} <= model.state_dict().keys()


def test_every_weight_learns_from_several_steps_in_bf16():
    model = UnifiedModel(small_net(), num_denoising_steps=2)
    calls = []
    model.feedforward_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for step in range(6):
        rng = StepRandom(0, step)
        with torch.autocast("cpu", torch.bfloat16):         # its copies made without a gradient must not be used again
            x_gen = model.generate(rng.normal(4, 3, 32, 32), LABELS, rng)
        x_gen.square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.feedforward_model.parameters())
        model.feedforward_model.zero_grad()
    assert calls.count(True) == 6 and False in calls        # in some of the six there were two


def test_several_steps_train_on_the_generators_own_images_of_every_step():
    seen = []

    class Spy(Affine):
        def forward(self, x, sigma, labels):
            seen.append((sigma, torch.is_grad_enabled()))
            return super().forward(x, sigma, labels)

    model = UnifiedModel(Spy(), num_denoising_steps=4, shape=(3, 32, 32))
    lengths = set()
    for step in range(40):
        seen.clear()
        rng = StepRandom(0, step)
        assert model.generate(rng.normal(2, 3, 4, 4), LABELS[:2], rng).requires_grad
        assert [sigma for sigma, _ in seen] == model.denoising_sigmas[: len(seen)]
        assert [grad for _, grad in seen] == [False] * (len(seen) - 1) + [True]
        lengths.add(len(seen))
    assert lengths == {1, 2, 3, 4}


# --- a generator of several evaluations -------------------------------------------------------------------------------


def test_an_evaluation_before_the_last_has_the_dm_loss_only_at_the_noise_that_the_next_begins_with():
    seen = []

    class Spy(GaussianDenoiser):
        def forward(self, x, sigma, labels):
            seen.append(sigma.flatten())
            return super().forward(x, sigma, labels)

    x, labels, sigmas = torch.zeros(4096, 3, 2, 2), torch.zeros(4096, dtype=torch.long), karras_sigmas().float()
    for fake_noise in ("all", "dm"):
        teacher, levels = Spy(0.0, 1.0), [80, 2, 1]
        guidance = GuidanceModel(teacher, max_step_percent=0.7, fake_noise=fake_noise, denoising_sigmas=levels)
        for level, lowest in enumerate([sigmas[sigmas >= 2].min(), sigmas[sigmas >= 1].min(), sigmas[20]]):
            seen.clear()
            guidance.compute_distribution_matching_loss(x, labels, level=level)
            assert [(sigma.min(), sigma.max()) for sigma in seen] == [(lowest, sigmas[700])] * 2, level
            seen.clear()
            guidance.compute_loss_fake(x, labels, level=level)
            assert (seen[0].min(), seen[0].max()) == ((lowest, sigmas[700]) if fake_noise == "dm" else (sigmas[0], 80))
    one = GuidanceModel(GaussianDenoiser(0, 1), denoising_sigmas=[80.0])
    assert one.dm_steps == [(20, 980)] == GuidanceModel(GaussianDenoiser(0, 1)).dm_steps and len(one.fakes) == 1


def test_a_noise_range_that_leaves_an_evaluation_without_dm_loss_is_refused():
    with pytest.raises(UsageError, match=r"first of 2 evaluations needs noise above 20.* --max_step_percent 0.6"):
        GuidanceModel(GaussianDenoiser(0, 1), max_step_percent=0.6, denoising_sigmas=[80, 20])
    GuidanceModel(GaussianDenoiser(0, 1), max_step_percent=0.8, denoising_sigmas=[80, 20])


@pytest.mark.parametrize("cls_head", [False, True])
def test_each_evaluation_trains_a_fake_unet_and_a_classifier_head_of_its_own(cls_head):
    model = UnifiedModel(small_net(), num_denoising_steps=3, cls_head=cls_head)
    guidance, rng = model.guidance_model, StepRandom(0, 0)
    assert len(guidance.fakes) == 3 and len(guidance.heads) == (3 if cls_head else 0)
    assert len({id(p) for network in guidance.fakes for p in network.parameters()}) == 3 * len(
        list(guidance.fake_unet.parameters()))
    for level in range(3):
        model.zero_grad()
        x_gen, real = model.generate(rng.normal(4, 3, 32, 32), LABELS, rng, level + 1), (images(), LABELS)
        losses, _ = model.guidance_turn(x_gen, LABELS, rng, *real, level=level)
        sum(losses.values()).backward()
        for networks in (guidance.fakes, guidance.heads):
            for i, network in enumerate(networks):
                assert all((p.grad is not None) == (i == level) for p in network.parameters()), (level, i)
        model.zero_grad()
        sum(model.generator_turn(x_gen, LABELS, rng, level)[0].values()).backward()
        assert all(p.grad is None for p in guidance.parameters())
        assert all(p.requires_grad for network in guidance.fakes for p in network.parameters())


def test_evaluations_that_make_one_mode_each_are_moved_to_the_other_although_together_they_make_the_data():
    class TwoPoints(nn.Module):
        """E[x_0 | x_t] of points at 1 and -1, of weights e^w to 1; w is learned, and says what a fake_unet has seen."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x, sigma, labels):
            return torch.tanh(x / sigma**2 + self.w / 2)

    sigmas = [80.0, 1.0]
    guidance = GuidanceModel(TwoPoints(), 0.3, 0.5, denoising_sigmas=sigmas)
    optimizer = torch.optim.Adam([p for p in guidance.parameters() if p.requires_grad], lr=0.1)
    x_gen = [torch.full((256, 1, 1, 1), value) for value in (1.0, -1.0)]            # of the two evaluations
    for step in range(200):
        optimizer.zero_grad()
        guidance.compute_loss_fake(x_gen[step % 2], None, StepRandom(0, step), level=step % 2)[0].backward()
        optimizer.step()
    grads = [guidance.compute_distribution_matching_loss(x, None, StepRandom(1, 0), level)[1]["grad"].mean()
             for level, x in enumerate(x_gen)]
    assert grads[0] > 0.3 and grads[1] < -0.3, grads                # descent goes to the other mode; shared: about 0


# --- the whole algorithm on eight modes of known density --------------------------------------------------------------

ANGLES = 2 * torch.pi * torch.arange(8) / 8
MODES, MODE_STD = 0.7 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1), 0.05    # [8, 2]


class MixtureDenoiser(nn.Module):
    """E[x_0 | x_t] of eight Gaussians on a circle, exact."""

    def forward(self, x, sigma, labels):
        x_t, variance = x.flatten(1), MODE_STD**2 + sigma.flatten(1) ** 2           # [B, 2], [B, 1]
        posterior = (-((x_t[:, None] - MODES) ** 2).sum(-1) / (2 * variance)).softmax(1)                # [B, 8]
        means = (MODE_STD**2 * x_t[:, None] + sigma.flatten(1)[:, None] ** 2 * MODES) / variance[:, None]
        return (posterior[:, :, None] * means).sum(1).view_as(x)


class SmallDenoiser(nn.Module):
    """A preconditioned perceptron for "images" of two numbers, [B, 2, 1, 1]."""

    feature_channels, bottleneck_size, label_dim = [16], 4, 1

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(
            nn.Linear(18, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 16), nn.SiLU()
        )
        self.up = nn.Sequential(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x, sigma, labels, return_features=False):
        sigma = torch.as_tensor(sigma).float().reshape(-1, 1).expand(len(x), 1)
        scale = (sigma**2 + 0.25).sqrt()
        angles = sigma.log() / 4 * 2 ** torch.linspace(0, 5, 8)
        h = self.down(torch.cat([x.flatten(1) / scale, angles.cos(), angles.sin()], dim=1))
        if return_features:
            return [h[:, :, None, None].expand(-1, -1, 4, 4)]
        return (0.25 / scale**2 * x.flatten(1) + 0.5 * sigma / scale * self.up(h)).view_as(x)


def real_points(rng, n):
    return (MODES[rng.integers(0, 7, n)] + MODE_STD * rng.normal(n, 2)).view(n, 2, 1, 1)


@pytest.fixture(scope="module")
def small_teacher():
    torch.manual_seed(0)
    net, n = SmallDenoiser(), 256
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(600):
        rng = StepRandom(1, step)
        x_0, sigma = real_points(rng, n), (1.5 * rng.normal(n, 1, 1, 1) - 0.5).exp()
        loss = (karras_weight(sigma) * (net(x_0 + sigma * rng.normal(n, 2, 1, 1), sigma, None) - x_0) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def distilled_shares(teacher, cls_head, steps=800, n=256):
    """Share of 4000 samples within 4 standard deviations of each mode; one fake update per generator update."""
    torch.manual_seed(0)
    labels = torch.zeros(n, dtype=torch.long)
    model = UnifiedModel(teacher, cls_head=cls_head, shape=(2, 1, 1))
    generator, guidance = model.feedforward_model, model.guidance_model
    guidance.real_unet = MixtureDenoiser()
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.99))
    guidance_optimizer = torch.optim.Adam([p for p in guidance.parameters() if p.requires_grad], lr=2e-3)
    for step in range(steps):
        rng = StepRandom(0, step)
        x_gen = model.generate(rng.normal(n, 2, 1, 1), labels, rng)
        losses, _ = model.generator_turn(x_gen, labels, rng)
        generator_optimizer.zero_grad()
        sum(losses.values()).backward()
        generator_optimizer.step()
        losses, _ = model.guidance_turn(x_gen, labels, rng, real_points(rng, n), labels)
        guidance_optimizer.zero_grad()
        sum(losses.values()).backward()
        guidance_optimizer.step()
    with torch.no_grad():
        points = model.generate(StepRandom(9, 0).normal(4000, 2, 1, 1), None).flatten(1)
    distance, mode = (points[:, None] - MODES).norm(dim=-1).min(1)
    return torch.stack([((mode == k) & (distance < 4 * MODE_STD)).float().mean() for k in range(8)])


def test_with_one_fake_update_per_turn_dm_alone_loses_modes_and_the_classifier_head_covers_them_all(small_teacher):
    alone, headed = (distilled_shares(small_teacher, cls_head) for cls_head in (False, True))
    # Equal shares are an eighth.
    assert alone.min() < 0.01, f"every mode has a share of {alone.min():.3f} or more without the head: none is lost"
    assert headed.min() > 0.03, f"a mode has a share of {headed.min():.3f} only: the head does not bring it back"
