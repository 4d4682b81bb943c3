"""Meter: the losses of the steps since they were last logged."""

import math

import torch

from support import processes
from support.errors import RunError


class NonFiniteError(RunError):
    """A loss or gradient norm became NaN or infinite."""


class Meter:
    """Scalars of the steps since the last reading, kept on the device: only read() and state() synchronise.

    With several processes they are the means over these.
    """

    def __init__(self, device, state=None):
        self.history = {}                           # name -> {step: 0-d tensor}
        for name, entries in (state or {}).items():
            self.history[name] = {step: torch.tensor(value, device=device) for step, value in entries.items()}

    def add(self, step, **scalars):
        for name, value in scalars.items():
            self.history.setdefault(name, {})[step] = value.detach()

    def state(self):
        """The unread scalars as numbers, for a checkpoint. Raises NonFiniteError naming the first bad step."""
        state, bad = {}, []
        for name, entries in self.history.items():
            values = torch.stack([value.float() for value in entries.values()]).cpu().double()
            # In float64, as a resume reads means and takes them again: of equal numbers the mean is the number.
            values = (processes.sum_on_host(values) / processes.WORLD).float().tolist()
            state[name] = dict(zip(entries, values, strict=True))
            bad += [(step, name, value) for step, value in state[name].items() if not math.isfinite(value)]
        if bad:
            step, name, value = min(bad)
            raise NonFiniteError(f"{name} is {value} at step {step}: stopped; the last checkpoint stands")
        return state

    def read(self):
        """Mean of each scalar since the last call, and a new start. Raises NonFiniteError like state()."""
        means = {name: sum(entries.values()) / len(entries) for name, entries in self.state().items()}
        self.history.clear()
        return means
