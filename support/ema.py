"""The exponential moving average (EMA) of a network's weights: what is sampled from, measured and distilled."""

import torch
from torch.optim.swa_utils import AveragedModel

ETA = 3                                             # higher: the mean forgets its first weights sooner


class EMA(AveragedModel):
    """Exponential moving average of a network's weights: torch's AveragedModel with a decay that grows.

    At update n the decay is min(decay, (1 + n) / (10 + n)): early in a run the averaging horizon is a ninth of the
    steps so far, so that the average forgets the initial weights however short the run is. After begin_mean() an update
    can take a mean instead, in which the n-th weights count about n^ETA: weight averaging (SWA, Izmailov et al. 2018,
    arXiv 1803.05407) that forgets where the phase began (Shamir & Zhang 2013, arXiv 1212.1824, section 4).
    """

    def __init__(self, model, decay):
        super().__init__(model)
        device = next(model.parameters()).device
        if device.type == "cuda":
            self.n_averaged = self.n_averaged.to(device)
        self.decay = decay
        self.eval().requires_grad_(False)

    def begin_mean(self):
        """Begin weight averaging: the average so far is the first of the weights in the mean that follows."""
        self.n_averaged.fill_(1)

    @torch.no_grad()
    def update_parameters(self, model, mean=False):
        # AveragedModel's own method waits for the device in every step. Here a GPU keeps the counter itself, so that a
        # CUDA graph can capture the update. Buffers are copied, as in AveragedModel.
        n = self.n_averaged.double()
        decay = n / (n + 1 + ETA) if mean else ((1 + n) / (10 + n)).clamp(max=self.decay)
        weight = 1 - decay
        averaged, current = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(averaged, current, [weight.float()] * len(averaged) if n.is_cuda else weight.item())
        for averaged, current in zip(self.module.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)
        self.n_averaged += 1
