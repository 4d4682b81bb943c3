"""The optimizer of both phases: Adam, or Muon for the convolutions inside a network and Adam for the rest of it.

    optimizer = Optimizer("muon", {net: 4e-3})      # network -> its learning rate
    optimizer.backward(loss)
    grad_norm = optimizer.clip(10.0)
    optimizer.step(0.5)                             # at half that rate
    optimizer.zero_grad()
"""

import math

import torch
from torch.nn.utils import clip_grad_norm_

from support import hardware, processes

MOMENTUM = 0.95
# (a, b, c) of polynomials a x + b x^3 + c x^5, to be applied in turn: each comes as near to 1 as its degree can on what
# those before make of [0.01, 1], and the last to within 0.27 (Polar Express: Amsel et al. 2025, arXiv 2505.16932).
POLYNOMIALS = (
    (8.093369, -23.620430, 17.446152),
    (3.636587, -2.721927, 0.536546),
    (2.661300, -1.977155, 0.452617),
)
# Of the loss in float16, whose least number is 6e-8: as in torch.amp.GradScaler, but that a step is not taken in part.
FIRST_SCALE, STEPS_TO_DOUBLE = 2.0**16, 2000


def symmetric(a, b):
    """a b^T [..., n, n] where that is known to be symmetric: in float32 on a CPU by blocks, for 5/8 of it."""
    n = a.shape[-2]
    if n <= 128 or a.is_cuda or a.dtype != torch.float32:       # whose launches, or copies, would cost what that saves
        return a @ b.mT
    a_1, a_2 = a.split([n // 2, n - n // 2], dim=-2)
    b_1, b_2 = b.split([n // 2, n - n // 2], dim=-2)
    corner = a_1 @ b_2.mT                                                           # [..., n/2, n/2]
    top, bottom = torch.cat([symmetric(a_1, b_1), corner], -1), torch.cat([corner.mT, symmetric(a_2, b_2)], -1)
    return torch.cat([top, bottom], -2)


def inverse_root(gram, dtype):
    """About G^(-1/2) of positive semidefinite matrices [m, n, n]; less where an eigenvalue is near 0."""
    norm = gram.norm(dim=(1, 2), keepdim=True) + 1e-14          # at least the largest eigenvalue, [m, 1, 1]
    gram, q = gram / norm, None
    for i, (a, b, c) in enumerate(POLYNOMIALS, 1):
        last = i == len(POLYNOMIALS)
        if last:                                    # all eigenvalues that count are above bf16's rounding by now
            gram, q = gram.to(dtype), q.to(dtype)
        # P = a I + b G + c G^2;    Q <- Q P;    G <- P^2 G
        p = symmetric(gram, gram).mul_(c).add_(gram, alpha=b)
        p.diagonal(dim1=1, dim2=2).add_(a)
        q = p if q is None else symmetric(q, p)
        if not last:
            gram = symmetric(symmetric(p, p), gram)
    return q / norm.sqrt()


def orthogonalize(matrices, dtype=torch.float32, scales=None, rate=1.0):
    """Each matrix U S V^T [n, k] as about U V^T: the same directions, with singular values near 1.

    Muon's iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon) applies odd polynomials to X. Here it is
    Q X, or X Q where X is tall, with Q a polynomial of the small one of X X^T and X^T X: all products but two are of
    small squares, those of one size in a batch. What is below 0.01 of the largest singular value stays smaller.

    Args:
        matrices: float32.
        dtype: of the last products, on which bf16 costs no more than it does in Muon's iteration, and of the result.
            The others stay float32, on a GPU too: X X^T has the squares of the singular values, so its rounding reaches
            the small ones.
        scales: factors of the results, floats; None: 1.
        rate: one more, of all of them; where it is recorded, a 0-d tensor.

    Yields:
        the results one by one, as on a CPU memory that was just in use is many times as fast as new memory.
    """
    scales = scales or [1.0] * len(matrices)
    tall = [len(x) > x.shape[1] for x in matrices]
    with hardware.full_float32(matrices[0].device):
        short = [x.mT if is_tall else x for x, is_tall in zip(matrices, tall, strict=True)]
        grams, roots = [symmetric(x, x) for x in short], [None] * len(matrices)     # [n, n], n <= k
        for n in {len(gram) for gram in grams}:
            same = [i for i, gram in enumerate(grams) if len(gram) == n]
            for i, q in zip(same, inverse_root(torch.stack([grams[i] for i in same]), dtype), strict=True):
                roots[i] = q
        for x, is_tall, q, scale in zip(matrices, tall, roots, scales, strict=True):
            q, x = (q * scale * rate).to(dtype), x.to(dtype)
            yield x @ q if is_tall else q @ x


def as_matrix(weight):
    """A view [out, in h w] of a weight [out, in, h, w] as it lies in memory; no order of the columns matters here."""
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    return (weight.permute(0, 2, 3, 1) if channels_last else weight).view(len(weight), -1)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps along the gradient's momentum made orthogonal, as a matrix [out, h w in].

    The step is 0.2 sqrt(max(out, h w in)) times as long (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that it is
    as large as Adam's on average and one learning rate does for both.

    torch.optim.Muon takes matrices alone, and computes in bf16 on any machine: by the product that torch has for CPUs
    without bf16, a step took 34 times as long as in float32 (docs/tuning.md).

    Args:
        groups: as for any optimizer of torch, of weights [out, in, h, w].
        bf16: whether to compute the last products so, where it is fast; else they are float32.

    step() overwrites the gradients.
    """

    def __init__(self, groups, bf16):
        super().__init__(groups, dict(lr=0.0))
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
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
            torch._foreach_lerp_(gradients, momenta, MOMENTUM)  # in place: on a CPU new memory takes six times as long
            updates = [as_matrix(gradient) for gradient in gradients]
            lengths = [0.2 * max(x.shape) ** 0.5 for x in updates]
            steps = orthogonalize(updates, self.dtype, lengths, group["lr"])
            for weight, step in zip(weights, steps, strict=True):
                as_matrix(weight).sub_(step)


class Optimizer:
    """Steps networks, each at its own learning rate.

    Args:
        name: "adam", or "muon" for all convolutions but those from or to pixels and logits, and Adam for the rest.
        rates: network -> peak learning rate; the networks are on their device.
        bf16: whether Muon computes its products so.
        fp16: whether the networks run in float16, so that the loss must be scaled up.
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
        self.parts = dict(adam=torch.optim.Adam(groups(False), betas=betas, fused=True, capturable=self.recordable))
        if name == "muon":
            self.parts["muon"] = Muon(groups(True), bf16)
        self.scale, self.good_steps = FIRST_SCALE if fp16 else 1.0, 0

    def parameters(self):
        return [p for network in self.networks for p in network.parameters()]

    def backward(self, loss):
        """Add a loss's gradients to the networks' own."""
        (loss * self.scale).backward()

    def clip(self, max_norm):
        """Average the gradients over the processes, and shorten them where they are longer than max_norm.

        Returns:
            the length that they had, a 0-d tensor. 0 where they overflowed in float16: then there are none any more, no
            step is taken, and the next ones are scaled by half as much.
        """
        processes.average_gradients(self.parameters())
        if self.scale != 1:
            torch._foreach_div_([p.grad for p in self.parameters() if p.grad is not None], self.scale)
        norm = clip_grad_norm_(self.parameters(), max_norm)
        if self.scale == 1 or norm.isfinite():      # at a scale of 1 the run has diverged
            self.good_steps += 1
        else:
            self.zero_grad()
            self.scale, self.good_steps, norm = self.scale / 2, 0, torch.zeros_like(norm)
        if self.scale != 1 and self.good_steps == STEPS_TO_DOUBLE:
            self.scale, self.good_steps = 2 * self.scale, 0
        return norm

    def step(self, factor=1.0):
        """One step at factor times the peak learning rates; where the step is recorded factor is a 0-d tensor."""
        for part in self.parts.values():
            for group, lr in zip(part.param_groups, self.rates, strict=True):
                group["lr"] = lr * factor
            part.step()

    def zero_grad(self):
        for network in self.networks:
            network.zero_grad()

    def state_dict(self):
        scale = {} if self.scale == 1 else dict(scale=(self.scale, self.good_steps))
        return {name: part.state_dict() for name, part in self.parts.items()} | scale

    def load_state_dict(self, state):
        """Raises KeyError or ValueError if it is that of other networks or of another optimizer."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for group in self.parts["adam"].param_groups:
            group["capturable"] = self.recordable   # here, whatever it was where the state was saved
        if self.scale != 1:                         # it may have been of another precision before
            self.scale, self.good_steps = state.get("scale", (self.scale, self.good_steps))


def lr_factor(step, args):
    """Learning rate at a step, as a fraction of its peak: a linear rise, then constant or half a cosine to zero.

    Before that, in the first --fit_steps of train.py, half a cosine of their own; in its last --gan_steps all of this,
    with zero for the rise, while the discriminator learns alone.
    """
    fit_steps = getattr(args, "fit_steps", 0)
    if step < fit_steps:
        return half_cosine(step / fit_steps)
    gan_steps = getattr(args, "gan_steps", 0)
    gan_start = args.steps - gan_steps
    in_gan = gan_steps and step >= gan_start
    start, end = (gan_start, args.steps) if in_gan else (fit_steps, gan_start)
    step, steps = step - start, end - start
    if step < args.warmup_steps:
        return 0.0 if in_gan else (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    return half_cosine(progress) if args.lr_schedule == "cosine" else 1.0


def half_cosine(progress):
    """From 1 to 0 on the way from 0 to 1."""
    return (1 + math.cos(math.pi * progress)) / 2
