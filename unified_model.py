"""UnifiedModel: the one-step generator and its guidance, and the two turns of DMD2.

    model = UnifiedModel(teacher, conditioning_sigma=80.0)
    x_gen = model.generate(z, labels)
    loss_dm, log = model.generator_turn(x_gen, labels, rng)       # every dfake_gen_update_ratio steps
    loss_fake, log = model.guidance_turn(x_gen, labels, rng)      # every step
"""

import copy

from torch import nn

from diffusion import SIGMA_MAX, one_step_sample
from guidance import GuidanceModel


class UnifiedModel(nn.Module):
    """feedforward_model, a generator that starts as a copy of the teacher, and guidance_model.

    Args:
        teacher: a denoiser (x_t, sigma, labels) -> x0_hat; it is copied, not kept.
        conditioning_sigma: noise level sigma_cond from which the generator makes an image in one evaluation.
        guidance: further arguments of GuidanceModel.
    """

    def __init__(self, teacher, conditioning_sigma=SIGMA_MAX, **guidance):
        super().__init__()
        self.conditioning_sigma = conditioning_sigma
        self.feedforward_model = copy.deepcopy(teacher).train().requires_grad_(True)
        self.guidance_model = GuidanceModel(teacher, **guidance)

    def generate(self, z, labels):
        """x_gen = G(z sigma_cond, sigma_cond, y): unit noise and classes [B] to images, both [B, 3, 32, 32]."""
        return one_step_sample(self.feedforward_model, z, labels, self.conditioning_sigma)

    def generator_turn(self, x_gen, labels, rng=None):
        """The generator's loss and a dict of pictures; x_gen carries the gradient to feedforward_model alone."""
        return self.guidance_model.compute_distribution_matching_loss(x_gen, labels, rng)

    def guidance_turn(self, x_gen, labels, rng=None):
        """fake_unet's loss and a dict of pictures; no gradient goes back to the generator."""
        return self.guidance_model.compute_loss_fake(x_gen, labels, rng)
