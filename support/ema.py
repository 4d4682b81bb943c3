"""The exponential moving average (EMA) of a network's weights: what is sampled from, measured and distilled."""

import torch
from torch.optim.swa_utils import AveragedModel


class EMA(AveragedModel):
    """Exponential moving average of a network's weights: torch's AveragedModel with a decay that grows.

    At update n the decay is min(decay, (1 + n) / (10 + n)): while a run is young the horizon is a ninth of it, so that
    the average never holds the noise of the start, however short the run is.
    """

    def __init__(self, model, decay):
        super().__init__(model)
        self.decay = decay
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model):
        # AveragedModel's own method copies its counter to the device and waits for it, in every step; here the counter
        # stays on the CPU. Buffers are copied, as there.
        n = int(self.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n))
        averaged, current = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for averaged, current in zip(self.module.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)
        self.n_averaged += 1
