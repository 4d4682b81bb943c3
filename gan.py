"""The GAN phase, the last: the generator trains against a discriminator, without the DM loss.

    discriminator = Discriminator(teacher.feature_channels, num_classes)
    gan = GAN(model, ema, start=6000, steps=1500, batch_size=64, discriminator=discriminator,
              optimizers=dict(generator=Optimizer(...), discriminator=Optimizer(...)))
    log = gan.step(i, rngs, x_real, real_labels)    # i = 0 .. 1499

The discriminator reads the features of a frozen network at every resolution: the teacher's of a noised image, as in
LADD (latent adversarial diffusion distillation, Sauer et al. 2024, arXiv 2403.12015, section 3), or those of a
classifier, as in Projected GAN (Sauer et al. 2021, arXiv 2111.01007, section 3). It is not the classifier head of
guidance.py: that one reads fake_unet, which changes with the generator, and trains beside the DM loss. A generator of
several evaluations has a discriminator for each, for the reason that guidance.py gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from guidance import fresh_random, frozen
from model import group_norm
from phases import Phase
from support import data
from support.meter import add_microbatch
from support.optimizers import lr_factor

CLASSIFIER_NOISE = 0.05                             # standard deviation; images span [-1, 1]


class FeatureHead(nn.Module):
    """Features [B, C, H, W] of one resolution and classes [B] to a logit [B]."""

    def __init__(self, channels, classes, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, channels, affine=False),            # the scale differs with resolution and sigma
            nn.Conv2d(channels, width, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1), group_norm(width), nn.LeakyReLU(0.2),
        )
        self.out = nn.Linear(width, 1)
        self.label_embedding = nn.Embedding(classes, width)
        nn.init.normal_(self.label_embedding.weight, std=0.05)

    def forward(self, features, labels):
        h = self.layers(features).float().mean((2, 3))                              # [B, width]
        # D(h, y) = w h + b + v_y h (projection discriminator, Miyato & Koyama 2018, arXiv 1802.05637, equation 3)
        return self.out(h).flatten() + (self.label_embedding(labels) * h).sum(1)


def teacher_features(guidance, x, labels, rng):
    """The teacher's features [B, C, h, w], at several resolutions, of images x [B, 3, H, W] with random noise."""
    return guidance.real_unet(*guidance.diffusion_gan_noise(x, rng), labels, return_features=True)


def classifier_features(classifier, x, labels, rng):
    """Those of a support.classifier.Classifier, of the images shifted at random and with a little noise.

    Both keep the heads from learning single images (DiffAugment, Zhao et al. 2020, arXiv 2006.10738), and the generator
    from patterns that only this classifier sees. No class goes in: the heads know it.
    """
    x = data.random_shift(x + CLASSIFIER_NOISE * rng.normal(*x.shape), x.shape[-1] // 8, rng)
    return classifier.maps(x)


class Discriminator(nn.Module):
    """Features of L resolutions and classes [B] to logits [B, L], one head each; high for real images.

    Args:
        feature_channels: the channels of each.
        classes: their number.
        evaluations: of the generator; each has its own heads, those of its `level`.
    """

    def __init__(self, feature_channels, classes, evaluations=1):
        super().__init__()
        self.heads = nn.ModuleList(FeatureHead(channels, classes) for channels in feature_channels)
        self.later = nn.ModuleList(Discriminator(feature_channels, classes) for _ in range(evaluations - 1))

    def forward(self, features, labels, level=0):
        heads = self.later[level - 1].heads if level else self.heads
        return torch.stack([head(h, labels) for head, h in zip(heads, features, strict=True)], 1)


def compute_gan_losses(features, discriminator, x_gen, labels, x_real, real_labels, rng=None, level=0):
    """The losses of generator and discriminator on the same images (hinge loss, arXiv 1705.02894, section 3).

    Args:
        features: (x, labels, rng) -> features, teacher_features or classifier_features of a network.
        discriminator: a Discriminator of these features.
        x_gen: generated images, float [B, 3, H, W], with a gradient to the generator.
        labels: the classes they were generated for, [B].
        x_real, real_labels: images of the dataset, float [B, 3, H, W] in [-1, 1], and their own classes, [B].
        rng: StepRandom; None: one seeded by torch's global generator.
        level: which of the generator's evaluations made x_gen, 0 is the first.

    Returns:
        a dict of two scalars: loss_gan, which gives gradients to the generator alone, and loss_discriminator, which
        gives them to the discriminator alone; and a dict with logit_fake and logit_real, 0-d means.
    """
    rng = rng or fresh_random(x_gen.device)
    fake = features(x_gen, labels, rng)
    with torch.no_grad():
        real = features(x_real, real_labels, rng)
    with frozen(discriminator):
        # L_gan = -mean(D(x_gen))
        loss_gan = -discriminator(fake, labels, level).mean()
    fake = discriminator([h.detach() for h in fake], labels, level)                 # [B, L]
    real = discriminator(real, real_labels, level)                                  # [B, L]
    # L_discriminator = mean(max(0, 1 + D(x_gen))) + mean(max(0, 1 - D(x_real)))
    # Hinge each head by itself: a hinge on the mean of the heads saturates once one head is confident.
    loss_discriminator = F.relu(1 + fake).mean() + F.relu(1 - real).mean()
    losses = dict(loss_gan=loss_gan, loss_discriminator=loss_discriminator)
    return losses, dict(logit_fake=fake.detach().mean(), logit_real=real.detach().mean())


@dataclass
class GAN(Phase):
    """The steps of the GAN phase; optimizers: generator, discriminator.

    At its end the EMA holds an average of the generator's weights over the phase, mostly its last half.
    """

    discriminator: Discriminator = None             # of these features
    features: Callable = None                       # as compute_gan_losses takes them; None: the teacher's
    discriminator_warmup_steps: int = 100           # first steps, in which only the discriminator trains
    needs_images = True

    def __post_init__(self):
        super().__post_init__()
        self.features = self.features or partial(teacher_features, self.guidance)

    def step(self, i, rngs, x_real, real_labels):
        if i == 0:                                  # GAN iterates oscillate: the student is their average
            self.ema.begin_mean()
        trains_generator = i >= self.discriminator_warmup_steps
        j = max(0, i - self.discriminator_warmup_steps)
        factor = lr_factor(j, self.steps - self.discriminator_warmup_steps, self.warmup_steps, self.lr_schedule)
        return self.train_step(rngs, trains_generator, x_real, real_labels, factor)

    def train_step(self, rngs, trains_generator, x_real, real_labels, factor):
        log, parts, optimizers = {}, self.parts(rngs), self.optimizers
        k = len(parts)                              # microbatches
        optimizers["generator"].zero_grad()
        optimizers["discriminator"].zero_grad()
        real_parts = self.real_parts(rngs, x_real, real_labels)
        for (rng, level), (x_real_k, real_labels_k) in zip(parts, real_parts, strict=True):
            z, labels = self.model.random_inputs(self.part_size, self.num_classes, rng)     # [B, 3, H, W], [B]
            with torch.set_grad_enabled(trains_generator), self.autocast():
                x_gen = self.model.generate(z, labels, rng, num_steps=level + 1)    # [B, 3, H, W]
            real = data.random_flip(x_real_k, rng) if self.flip else x_real_k, real_labels_k
            with self.autocast():
                losses, logits = compute_gan_losses(
                    self.features, self.discriminator, x_gen, labels, *real, rng, level)
            if trains_generator:
                optimizers["generator"].backward(losses["loss_gan"] / k)
            optimizers["discriminator"].backward(losses["loss_discriminator"] / k)
            add_microbatch(log, k, **losses, **logits)

        if trains_generator:
            log["generator_grad_norm"] = optimizers["generator"].clip(self.max_grad_norm)
            optimizers["generator"].step(factor)
            self.ema.update_parameters(self.generator, mean=True)
        log["discriminator_grad_norm"] = optimizers["discriminator"].clip(self.max_grad_norm)
        optimizers["discriminator"].step()          # at a constant rate, to keep up with the generator to the end
        return log
