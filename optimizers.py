"""The optimizer of both phases: Adam, or Muon for the convolutions inside a network and Adam for the rest of it.

    optimizer = Optimizer("muon", {net: 3e-3})      # network -> its learning rate
    loss.backward()
    optimizer.step(0.5)                             # at half that rate
    optimizer.zero_grad()
"""

import torch


def matrix(weight):
    """A convolution's tensor [out, in, h, w], channels_last, as the matrix [out, h w in] that shares its memory.

    Raises RuntimeError if it is not channels_last: a copy in its place would be trained, and the network not.
    """
    return weight.permute(0, 2, 3, 1).view(len(weight), -1)


class ConvMuon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), which steps matrices, for convolutions.

    The step of a matrix is its gradient's momentum made orthogonal, at 0.2 sqrt(the longer side) (Liu et al. 2025,
    arXiv 2502.16982, section 2.2): as large as Adam's on average, so that one learning rate does for both.

    Args:
        groups: as for any optimizer of torch, of weights [out, in, h, w] in channels_last.
    """

    def __init__(self, groups):
        self.weights = [weight for group in groups for weight in group["params"]]
        groups = [dict(group, params=[matrix(weight.detach()) for weight in group["params"]]) for group in groups]
        super().__init__(groups, weight_decay=0, adjust_lr_fn="match_rms_adamw")

    def step(self):
        matrices = (m for group in self.param_groups for m in group["params"])
        for weight, m in zip(self.weights, matrices, strict=True):
            m.grad = matrix(weight.grad.contiguous(memory_format=torch.channels_last))
        super().step()
        for group in self.param_groups:
            for m in group["params"]:
                m.grad = None


class Optimizer:
    """Steps networks, each at its own learning rate.

    Args:
        name: "adam", or "muon" for all convolutions but those from or to pixels and logits, and Adam for the rest.
        rates: network -> peak learning rate; the networks on their device and in channels_last.
    """

    def __init__(self, name, rates):
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
            self.parts["muon"] = ConvMuon(groups(True))

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
        state = dict(adam=state) if "param_groups" in state else state              # before there was a choice
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
