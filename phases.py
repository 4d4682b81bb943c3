"""A student's training has up to three phases, one after another: the fit, the two turns of DMD2, the GAN.

    phases = [Fit(..., steps=200), DMD2(..., start=200, steps=1500), GAN(..., start=1700, steps=200)]
    phase, i = current(phases, step)
    log = phase.step(i, rngs)

Which phase a step belongs to follows from its number alone, also in a resumed run.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from support.ema import EMA
from unified_model import UnifiedModel


@dataclass
class Phase:
    """What the phases share. Each has step(i, rngs, *real) -> log, which trains on one batch.

    i is the step's number within the phase, rngs has one StepRandom per microbatch, and real is a batch of images and
    their classes where needs_images. The log has the losses as 0-d tensors.
    """

    model: UnifiedModel                             # its feedforward_model is the generator
    ema: EMA                                        # of the generator
    start: int                                      # first step of the phase, in the run
    steps: int                                      # how many it has
    batch_size: int                                 # images for one rng of step()
    num_classes: int = 10
    num_denoising_steps: int = 1                    # evaluations per image of the generator
    warmup_steps: int = 0                           # linear learning-rate warm-up
    lr_schedule: str = "constant"                   # after it, as in support.optimizers.lr_factor
    max_grad_norm: float = 10.0                     # longer gradients are scaled down
    flip: bool = True                               # mirror half of the real images
    autocast: Callable = nullcontext                # () -> context in which the networks run
    record: Callable = lambda train_step: train_step            # decorator of the step, as of support.recorded
    optimizers: dict = field(default_factory=dict)  # name -> Optimizer
    needs_images = False

    def __post_init__(self):
        self.generator, self.guidance = self.model.feedforward_model, self.model.guidance_model
        self.train_step = self.record(self.train_step)

    @property
    def part_size(self):
        """Images of a microbatch."""
        return self.batch_size // self.num_denoising_steps

    def parts(self, rngs):
        """The microbatches of a step, (rng, level): for each rng one for each evaluation of the generator.

        So each evaluation and its fake_unet learn in each step, as fast as the only one of a one-step generator does.
        """
        return [(rng, level) for rng in rngs for level in range(self.num_denoising_steps)]

    def real_parts(self, rngs, x_real, real_labels):
        """The real images of each, (x_real, real_labels)."""
        n, chunks = self.num_denoising_steps, zip(x_real.chunk(len(rngs)), real_labels.chunk(len(rngs)), strict=True)
        # Strided, so that several processes divide the images among the evaluations as one does.
        return [(x[level::n], labels[level::n]) for x, labels in chunks for level in range(n)]

    def state_dict(self):
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state):
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def current(phases, step):
    """The phase that a step of the run belongs to, and the step's number within it."""
    phase = next(phase for phase in reversed(phases) if phase.start <= step)
    return phase, step - phase.start
