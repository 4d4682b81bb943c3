"""Meter: the losses of the steps since the last log line."""

import math

import torch

from support import processes
from support.errors import RunError


class NonFiniteError(RunError):
    """A loss, a gradient norm or an image became NaN or infinite."""


def add_microbatch(log, k, **means):
    """Add the means (0-d tensors) over one of k equal microbatches to those of the whole batch: log, name -> mean."""
    for name, mean in means.items():
        log[name] = log.get(name, 0) + mean.detach() / k


class Meter:
    """Scalars of the steps since the last reading, kept on the device: only read() and state() synchronise with it.

    With several processes they are averaged over the processes.
    """

    def __init__(self, device, state=None):
        self.history = {}                           # name -> {step: 0-d tensor}
        for name, entries in (state or {}).items():
            self.history[name] = {step: torch.tensor(value, device=device) for step, value in entries.items()}

    def add(self, step, **scalars):
        for name, value in scalars.items():
            self.history.setdefault(name, {})[step] = value.detach()

    def state(self):
        """The scalars not yet read, as numbers, for a checkpoint. Raises NonFiniteError naming the first bad step."""
        state, bad = {}, []
        for name, entries in self.history.items():
            values = torch.stack([value.float() for value in entries.values()]).cpu().double()
            # In float64: a resumed run averages these means again, and the mean of equal numbers must be the number.
            values = (processes.sum_on_host(values) / processes.WORLD).float().tolist()
            state[name] = dict(zip(entries, values, strict=True))
            bad += [(step, name, value) for step, value in state[name].items() if not math.isfinite(value)]
        if bad:
            step, name, value = min(bad)
            raise NonFiniteError(f"{name} is {value} at step {step}: stopped; the last checkpoint stands")
        return state

    def read(self):
        """Mean of each scalar since the last call, which starts a new reading. Raises NonFiniteError like state()."""
        means = {name: sum(entries.values()) / len(entries) for name, entries in self.state().items()}
        self.history.clear()
        return means
