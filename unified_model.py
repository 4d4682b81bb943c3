"""UnifiedModel: the generator and its guidance, and the two turns of DMD2.

    model = UnifiedModel(teacher, conditioning_sigma=80.0)
    z, labels = model.random_inputs(batch_size, num_classes, rng)
    x_gen = model.generate(z, labels, rng)
    losses, log = model.generator_turn(x_gen, labels, rng)        # every dfake_gen_update_ratio steps
    losses, log = model.guidance_turn(x_gen, labels, rng)         # every step

The images of a generator of several evaluations are told from one another by `level`, the evaluation that made them.
"""

import copy

import torch
from torch import nn

from diffusion import SIGMA_MAX, SIGMA_MIN, denoising_sigmas, few_step_sample
from guidance import GuidanceModel, fresh_random


class UnifiedModel(nn.Module):
    """feedforward_model, a generator that starts as a copy of the teacher, and guidance_model.

    Args:
        teacher: a denoiser (x_t, sigma, labels) -> x0_hat; it is copied, not kept.
        conditioning_sigma: noise level sigma_cond that the generator starts from.
        num_denoising_steps: evaluations per image, at the levels of diffusion.denoising_sigmas.
        sigma_min: lowest noise of the Karras schedule.
        shape: of one image; None: that of the teacher's.
        guidance: further arguments of GuidanceModel.
    """

    def __init__(
        self, teacher, conditioning_sigma=SIGMA_MAX, num_denoising_steps=1, sigma_min=SIGMA_MIN, shape=None, **guidance,
    ):
        super().__init__()
        self.shape = shape or (3, teacher.image_size, teacher.image_size)
        self.denoising_sigmas = denoising_sigmas(conditioning_sigma, num_denoising_steps, sigma_min)
        self.feedforward_model = copy.deepcopy(teacher).train().requires_grad_(True)
        self.guidance_model = GuidanceModel(
            teacher, sigma_min=sigma_min, denoising_sigmas=self.denoising_sigmas, **guidance)

    def random_inputs(self, n, num_classes, rng):
        """What the generator starts from: z ~ N(0, I), float [n, 3, H, W], and classes y, uniform, [n]."""
        return rng.normal(n, *self.shape).to(memory_format=torch.channels_last), rng.integers(0, num_classes - 1, n)

    def generate(self, z, labels, rng=None, num_steps=None):
        """Generated images to train on; z and the result are [B, 3, H, W], labels [B].

        One step: x_gen = G(z sigma_cond, sigma_cond, y). With several, the generator's image after num_steps of them,
        where None draws 1 .. num_denoising_steps from rng: so each step is trained on the inputs that it gets when
        sampling (DMD2, section 4.5, backward simulation). Gradients come from the last evaluation alone.
        """
        rng = rng or fresh_random(z.device)
        sigmas = self.denoising_sigmas[: num_steps or 1 + rng.choice(len(self.denoising_sigmas))]
        return few_step_sample(self.feedforward_model, z, labels, sigmas, lambda i: rng.normal(*z.shape))

    def denoise_again(self, x, labels, level, rng):
        """What the generator makes of images x [B, 3, H, W] at a later noise level: G(x + sigma_i eps, sigma_i, y)."""
        sigma = torch.full((), self.denoising_sigmas[level], device=x.device)
        return self.feedforward_model(x + sigma * rng.normal(*x.shape), sigma, labels)

    def generator_turn(self, x_gen, labels, rng=None, level=0):
        """The generator's losses, and the DM gradient to look at: two dicts. Gradients reach only x_gen."""
        guidance = self.guidance_model
        losses = {}
        losses["loss_dm"], log = guidance.compute_distribution_matching_loss(x_gen, labels, rng, level)
        if guidance.cls_head is not None:
            losses["gen_cls_loss"], _ = guidance.compute_generator_cls_loss(x_gen, labels, rng, level)
        return losses, log

    def guidance_turn(self, x_gen, labels, rng=None, x_real=None, real_labels=None, level=0):
        """The losses of fake_unet and cls_head, and the mean logits: two dicts. x_gen gets no gradient.

        x_real [B, 3, H, W] and real_labels [B] are needed where there is a classifier head.
        """
        guidance = self.guidance_model
        losses, log = {}, {}
        losses["loss_fake"], _ = guidance.compute_loss_fake(x_gen, labels, rng, level)
        if guidance.cls_head is not None:
            losses["cls_loss"], log = guidance.compute_cls_loss(x_gen, labels, x_real, real_labels, rng, level)
        return losses, log
