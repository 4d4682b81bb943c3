"""Optimizer and learning-rate schedule: Adam, or Muon for the convolutions inside a network and Adam for the rest.

    optimizer = Optimizer("muon", {net: 4e-3})      # network -> its peak learning rate
    optimizer.zero_grad()
    optimizer.backward(loss)
    grad_norm = optimizer.clip(10.0)
    optimizer.step(lr_factor(step, steps, warmup_steps=100, schedule="cosine"))
"""

import math

import torch
from torch.nn.utils import clip_grad_norm_

from support import processes
from support.muon import Muon

# Loss scaling for float16, whose smallest number is 6e-8: as torch.amp.GradScaler does it, except that a step is either
# taken for all networks or for none.
FIRST_SCALE, STEPS_TO_DOUBLE = 2.0**16, 2000
# Muon on a CPU (docs/tuning.md). Not on a GPU, where a recorded step must be the same each time.
MUON_ON_CPU = dict(every=8, momentum=0.92)


class Optimizer:
    """Updates networks, each at its own learning rate.

    Args:
        name: "adam"; or "muon": Muon for the convolutions, except those from or to pixels or logits, Adam for the rest.
        rates: network -> peak learning rate; the networks are already on their device.
        bf16: whether Muon computes its last matrix products in bf16.
        fp16: whether the networks run in float16, which needs loss scaling.
        betas: Adam's.
    """

    def __init__(self, name, rates, bf16=False, fp16=False, betas=(0.9, 0.999)):
        def inside(weight):
            return name == "muon" and weight.ndim == 4 and min(weight.shape[:2]) > 3

        def groups(muon):
            return [
                dict(params=[p for p in network.parameters() if inside(p) == muon], lr=lr)
                for network, lr in rates.items()
            ]

        self.networks, self.rates = list(rates), list(rates.values())
        self.recordable = any(p.is_cuda for network in rates for p in network.parameters())
        adam = torch.optim.Adam(groups(False), betas=betas, fused=True, capturable=self.recordable)
        self.optimizers = dict(adam=adam)
        if name == "muon":
            self.optimizers["muon"] = Muon(groups(True), bf16, **({} if self.recordable else MUON_ON_CPU))
        self.scale, self.good_steps = FIRST_SCALE if fp16 else 1.0, 0

    def parameters(self):
        return [p for network in self.networks for p in network.parameters()]

    def backward(self, loss):
        """Backpropagate a loss; its gradients are added to those of earlier microbatches."""
        (loss * self.scale).backward()

    def clip(self, max_norm):
        """Average the gradients over the processes, then scale them down where their norm is above max_norm.

        Returns:
            the norm before clipping, a 0-d tensor. 0 where the gradients overflowed in float16: they are then dropped,
            so that step() changes nothing, and the loss scale is halved.
        """
        processes.average_gradients(self.parameters())
        if self.scale != 1:
            torch._foreach_div_([p.grad for p in self.parameters() if p.grad is not None], self.scale)
        norm = clip_grad_norm_(self.parameters(), max_norm)
        if self.scale == 1 or norm.isfinite():      # without loss scaling an infinite norm means divergence
            self.good_steps += 1
        else:
            self.zero_grad()
            self.scale, self.good_steps, norm = self.scale / 2, 0, torch.zeros_like(norm)
        if self.scale != 1 and self.good_steps == STEPS_TO_DOUBLE:
            self.scale, self.good_steps = 2 * self.scale, 0
        return norm

    def step(self, factor=1.0):
        """One update at factor times the peak learning rates; factor is a float, or a 0-d tensor in a CUDA graph."""
        for optimizer in self.optimizers.values():
            for group, lr in zip(optimizer.param_groups, self.rates, strict=True):
                group["lr"] = lr * factor
            optimizer.step()

    def zero_grad(self):
        for network in self.networks:
            network.zero_grad()

    def state_dict(self):
        scale = {} if self.scale == 1 else dict(scale=(self.scale, self.good_steps))
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()} | scale

    def load_state_dict(self, state):
        """Raises KeyError or ValueError if the state is of other networks or of another kind of optimizer."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        for group in self.optimizers["adam"].param_groups:
            group["capturable"] = self.recordable   # of this device, not of the one that saved the state
        if self.scale != 1:                         # the state may come from a run in another precision
            self.scale, self.good_steps = state.get("scale", (self.scale, self.good_steps))


def lr_factor(i, steps, warmup_steps=0, schedule="constant"):
    """Learning rate at step i of a phase of so many steps, as a fraction of its peak.

    A linear warm-up, then constant ("constant") or half a cosine that falls to zero ("cosine").
    """
    if i < warmup_steps:
        return (i + 1) / warmup_steps
    progress = (i - warmup_steps) / max(1, steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1.0
