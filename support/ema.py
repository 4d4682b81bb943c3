"""The exponential moving average (EMA) of a network's weights: what is sampled from, measured and distilled."""

import torch
from torch.optim.swa_utils import AveragedModel


class EMA(AveragedModel):
    """Exponential moving average of a network's weights: torch's AveragedModel with a decay that grows.

    At update n the decay is min(decay, (1 + n) / (10 + n)): while a run is young the horizon is a ninth of it, so that
    the average never holds the noise of the start, however short the run is. After begin_mean() an update may ask for
    the plain mean instead (Izmailov et al. 2018, arXiv 1803.05407).
    """

    def __init__(self, model, decay):
        super().__init__(model)
        device = next(model.parameters()).device
        if device.type == "cuda":
            self.n_averaged = self.n_averaged.to(device)
        self.decay = decay
        self.eval().requires_grad_(False)

    def begin_mean(self):
        """The average so far is the first of the weights that update_parameters(mean=True) takes the mean of."""
        self.n_averaged.fill_(1)

    @torch.no_grad()
    def update_parameters(self, model, mean=False):
        # AveragedModel's own method waits for the device in every step; here a GPU counts for itself, which can be
        # recorded. Buffers are copied, as there.
        n = self.n_averaged.double()
        decay = n / (n + 1) if mean else ((1 + n) / (10 + n)).clamp(max=self.decay)
        weight = 1 - decay
        averaged, current = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(averaged, current, [weight.float()] * len(averaged) if n.is_cuda else weight.item())
        for averaged, current in zip(self.module.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)
        self.n_averaged += 1
