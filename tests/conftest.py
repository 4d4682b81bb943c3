import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                 # the nets here are tiny: threads would only wait for one another

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class GaussianDenoiser(torch.nn.Module):
    """The ideal denoiser of data N(mu, s0^2 I), which DMD2's networks approximate: E[x_0 | x_t]."""

    def __init__(self, mu, s0):
        super().__init__()
        self.mu, self.s0 = mu, s0

    def forward(self, x, sigma, labels):
        sigma = torch.as_tensor(sigma, dtype=x.dtype)
        return (self.s0**2 * x + sigma**2 * self.mu) / (self.s0**2 + sigma**2)
