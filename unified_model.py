"""UnifiedModel: the generator and its guidance, and the two turns of DMD2.

    model = UnifiedModel(teacher, conditioning_sigma=80.0)
    x_gen = model.generate(z, labels, rng)
    losses, log = model.fit_turn(z, labels, x_ode)                # of the first steps, where there are pairs
    losses, log = model.generator_turn(x_gen, labels, rng)        # every dfake_gen_update_ratio steps
    losses, log = model.guidance_turn(x_gen, labels, rng)         # every step
    losses, log = model.gan_turn(x_gen, labels, x_real, real_labels, rng)       # of the last steps, both sides' turn
"""

import copy

import torch.nn.functional as F
from torch import nn

from diffusion import SIGMA_MAX, SIGMA_MIN, denoising_sigmas, few_step_sample
from guidance import GuidanceModel, fresh_random


class UnifiedModel(nn.Module):
    """feedforward_model, a generator that starts as a copy of the teacher, and guidance_model.

    Args:
        teacher: a denoiser (x_t, sigma, labels) -> x0_hat; it is copied, not kept.
        conditioning_sigma: noise level sigma_cond that the generator starts from.
        num_denoising_steps: evaluations per image, at the levels of diffusion.denoising_sigmas.
        sigma_min: least noise of the Karras schedule.
        guidance: further arguments of GuidanceModel.
    """

    def __init__(
        self, teacher, conditioning_sigma=SIGMA_MAX, num_denoising_steps=1, sigma_min=SIGMA_MIN, **guidance
    ):
        super().__init__()
        self.denoising_sigmas = denoising_sigmas(conditioning_sigma, num_denoising_steps, sigma_min)
        self.feedforward_model = copy.deepcopy(teacher).train().requires_grad_(True)
        self.guidance_model = GuidanceModel(teacher, sigma_min=sigma_min, **guidance)

    def generate(self, z, labels, rng=None, num_steps=None):
        """Generated images to learn from; z and the result are [B, 3, 32, 32], labels [B].

        One step: x_gen = G(z sigma_cond, sigma_cond, y). Several: the generator's image after 1 to num_denoising_steps
        of them, num_steps or drawn by rng, so that each is trained on what it will be given when sampling (DMD2,
        section 4.5, backward simulation); gradients come from the last one alone.
        """
        rng = rng or fresh_random(z.device)
        sigmas = self.denoising_sigmas[: num_steps or 1 + rng.choice(len(self.denoising_sigmas))]
        return few_step_sample(self.feedforward_model, z, labels, sigmas, lambda i: rng.normal(*z.shape))

    def fit_turn(self, z, labels, x_ode):
        """The loss of a generator that is to begin as the teacher's sampler, and an empty dict.

        x_ode [B, 3, 32, 32] is the image that the teacher's ODE makes of the noise z, for the same labels (DMD,
        arXiv 2311.18828, section 3.3, kept up through the training there, with a perceptual distance for the square;
        DMD2's one-step SDXL begins with it).
        """
        sigma = self.denoising_sigmas[:1]
        x_gen = few_step_sample(self.feedforward_model, z, labels, sigma, renoise=None)
        # L_fit = mean((G(z sigma_cond, sigma_cond, y) - x_ode)^2)
        return dict(loss_fit=F.mse_loss(x_gen, x_ode)), {}

    def generator_turn(self, x_gen, labels, rng=None):
        """The generator's losses and the DM gradient, two dicts; x_gen carries the gradient to the generator alone."""
        guidance = self.guidance_model
        losses = {}
        losses["loss_dm"], log = guidance.compute_distribution_matching_loss(x_gen, labels, rng)
        if guidance.cls_head is not None:
            losses["gen_cls_loss"], _ = guidance.compute_generator_cls_loss(x_gen, labels, rng)
        return losses, log

    def guidance_turn(self, x_gen, labels, rng=None, x_real=None, real_labels=None):
        """The losses of fake_unet and cls_head and the mean logits, two dicts; no gradient goes back to the generator.

        x_real [B, 3, 32, 32] and real_labels [B] are needed where there is a GAN.
        """
        guidance = self.guidance_model
        losses, log = {}, {}
        losses["loss_fake"], _ = guidance.compute_loss_fake(x_gen, labels, rng)
        if guidance.cls_head is not None:
            losses["cls_loss"], log = guidance.compute_cls_loss(x_gen, labels, x_real, real_labels, rng)
        return losses, log

    def gan_turn(self, x_gen, labels, x_real, real_labels, rng=None):
        """The losses of a GAN alone, the generator's and the discriminator's, and the mean logits, two dicts."""
        return self.guidance_model.compute_gan_losses(x_gen, labels, x_real, real_labels, rng)
