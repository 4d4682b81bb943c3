"""The optimizer of both phases: Adam, or Muon for the convolutions inside a network and Adam for the rest of it.

    optimizer = Optimizer("muon", {net: 4e-3})      # network -> its learning rate
    loss.backward()
    optimizer.step(0.5)                             # at half that rate
    optimizer.zero_grad()
"""

import math

import torch

MOMENTUM = 0.95


def orthogonal(matrix):
    """About U V^T of a matrix U S V^T [n, k]: the same directions, with singular values of 0.6 to 1.3.

    Five steps of Newton-Schulz' iteration, with the coefficients of Jordan et al. 2024
    (kellerjordan.github.io/posts/muon), which favour speed over exactness; the least of the values may stay smaller.
    """
    x = matrix.mT if len(matrix) > matrix.shape[1] else matrix                      # the smaller product
    x = x / (x.norm() + 1e-7)                       # no singular value above 1
    for _ in range(5):
        # X <- 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if len(matrix) > matrix.shape[1] else x


def direction(update, dtype):
    """Where Muon steps for an update U [out, in, h, w]: 0.2 sqrt(max(n, k)) orthogonal(U) of its matrix [n, k]."""
    # A channels_last weight lies in memory as [out, h, w, in]: in this order of the columns nothing is copied.
    matrix = update.permute(0, 2, 3, 1)                                             # [out, h, w, in]
    found = orthogonal(matrix.flatten(1).to(dtype)).to(update.dtype).contiguous()   # [n, k] = [out, h w in]
    return found.mul_(0.2 * max(found.shape) ** 0.5).view(matrix.shape).permute(0, 3, 1, 2)


class Replayed:
    """A function of a list of tensors to another, whose kernels a GPU records at the first call and then replays.

    The recording is of these shapes, and returns the same memory each time: use what it returns before the next call.
    """

    def __init__(self, function):
        self.function, self.inputs = function, []

    def __call__(self, tensors):
        if not tensors or not tensors[0].is_cuda:
            return self.function(tensors)
        if [t.shape for t in tensors] != [t.shape for t in self.inputs]:
            self.inputs = [t.clone() for t in tensors]
            self.function(self.inputs)              # what the libraries make at their first use must not be recorded
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(self.inputs)
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        return self.outputs


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps along the gradient's momentum made orthogonal, as a matrix [out, h w in].

    The step is 0.2 sqrt(max(out, h w in)) times as long (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that it is
    as large as Adam's on average and one learning rate does for both.

    torch.optim.Muon takes matrices alone, and computes in bf16 on any machine: by the product that torch has for CPUs
    without bf16, a step took 34 times as long as in float32 (docs/tuning.md).

    Args:
        groups: as for any optimizer of torch, of weights [out, in, h, w].
        bf16: whether to compute the products so, where it is fast; else they are float32.
    """

    def __init__(self, groups, bf16):
        super().__init__(groups, dict(lr=0.0))
        dtype = torch.bfloat16 if bf16 else torch.float32
        # Replayed, as launching these small products one by one took a third of a step on an H100 (docs/tuning.md).
        self.directions = [
            Replayed(lambda updates: [direction(update, dtype) for update in updates]) for _ in self.param_groups
        ]

    @torch.no_grad()
    def step(self):
        for group, directions in zip(self.param_groups, self.directions, strict=True):
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if weight not in self.state:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            # M <- mu M + (1 - mu) G;    W <- W - lr 0.2 sqrt(max(n, k)) orthogonal(mu M + (1 - mu) G)
            gradients = [weight.grad for weight in weights]
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)
            torch._foreach_add_(weights, directions(updates), alpha=-group["lr"])


class Optimizer:
    """Steps networks, each at its own learning rate.

    Args:
        name: "adam", or "muon" for all convolutions but those from or to pixels and logits, and Adam for the rest.
        rates: network -> peak learning rate; the networks are on their device.
        bf16: whether Muon computes its products so.
    """

    def __init__(self, name, rates, bf16=False):
        def inside(weight):
            return name == "muon" and weight.ndim == 4 and min(weight.shape[:2]) > 3

        def groups(muon):
            return [
                dict(params=[p for p in network.parameters() if inside(p) == muon], lr=lr)
                for network, lr in rates.items()
            ]

        self.networks, self.rates = list(rates), list(rates.values())
        self.parts = dict(adam=torch.optim.Adam(groups(False), fused=True))
        if name == "muon":
            self.parts["muon"] = Muon(groups(True), bf16)

    def step(self, factor=1.0):
        """One step at factor times the peak learning rates."""
        for part in self.parts.values():
            for group, lr in zip(part.param_groups, self.rates, strict=True):
                group["lr"] = lr * factor
            part.step()

    def zero_grad(self):
        for network in self.networks:
            network.zero_grad()

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        """Raises KeyError or ValueError if it is that of other networks or of another optimizer."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def lr_factor(step, args):
    """Learning rate at a step, as a fraction of its peak: a linear rise, then constant or half a cosine to zero."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2 if args.lr_schedule == "cosine" else 1.0
