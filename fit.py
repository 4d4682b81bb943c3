"""The fit, the first phase: regression of the generator on the teacher's ODE pairs of noise and image.

    fit = Fit(model, ema, start=0, steps=200, batch_size=64, pairs=Pairs(...),
              optimizers=dict(generator=Optimizer(...)))
    log = fit.step(i, rngs)                         # i = 0 .. 199

At noise of 80 a copy of the teacher makes one blurred image per class; after the fit the generator makes a different
image of each noise, which the DM loss then improves. DMD (arXiv 2311.18828, section 3.3) keeps such a regression loss
throughout, with a perceptual distance; DMD2's one-step SDXL begins with it, as here. A generator of several evaluations
learns them in turn, by chance: the later ones restore the same image, noised to their level.
"""

from dataclasses import dataclass

import torch.nn.functional as F

from phases import Phase
from support import processes
from support.meter import add_microbatch
from support.optimizers import lr_factor
from support.pairs import Pairs


@dataclass
class Fit(Phase):
    """The steps of the fit. Optimizers: "generator", with which the DMD2 phase continues."""

    pairs: Pairs = None                             # of noise and the guided teacher's images

    def step(self, i, rngs):
        factor = lr_factor(i, self.steps, self.warmup_steps, self.lr_schedule)
        level = rngs[0].choice(self.num_denoising_steps)        # of the generator's evaluations
        return self.train_step(rngs, level, *self.pairs(i, *processes.SHARE), factor)

    def train_step(self, rngs, level, z, labels, x_ode, factor):
        log, k, optimizer = {}, len(rngs), self.optimizers["generator"]
        optimizer.zero_grad()
        for rng, z_k, labels_k, x_ode_k in zip(rngs, z.chunk(k), labels.chunk(k), x_ode.chunk(k), strict=True):
            with self.autocast():
                if level == 0:
                    x_gen = self.model.generate(z_k, labels_k, rng, num_steps=1)    # [B, 3, H, W]
                else:
                    x_gen = self.model.denoise_again(x_ode_k, labels_k, level, rng)
            # L_fit = mean((G(z sigma_cond, sigma_cond, y) - x_ode)^2)
            # and at a later level i: mean((G(x_ode + sigma_i eps, sigma_i, y) - x_ode)^2)
            loss = F.mse_loss(x_gen, x_ode_k)
            optimizer.backward(loss / k)
            add_microbatch(log, k, loss_fit=loss)

        log["generator_grad_norm"] = optimizer.clip(self.max_grad_norm)
        optimizer.step(factor)
        self.ema.update_parameters(self.generator)
        return log
