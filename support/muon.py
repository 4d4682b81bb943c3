"""Muon (Jordan et al. 2024): steps along an orthogonalized momentum, for the convolutions inside a network."""

import torch

from support import hardware

# (a, b, c) of polynomials a x + b x^3 + c x^5, applied one after another to singular values in [0.01, 1]. Each is the
# best approximation of 1 on the range that the ones before it leave; after the last the error is at most 0.27 (Polar
# Express: Amsel et al. 2025, arXiv 2505.16932).
POLYNOMIALS = (
    (8.093369, -23.620430, 17.446152),
    (3.636587, -2.721927, 0.536546),
    (2.661300, -1.977155, 0.452617),
)


def symmetric(a, b):
    """a b^T [..., n, n] where the result is known to be symmetric; on a CPU in float32 only 5/8 of it is computed."""
    n = a.shape[-2]
    if n <= 128 or a.is_cuda or a.dtype != torch.float32:       # extra launches and copies would cost what it saves
        return a @ b.mT
    a_1, a_2 = a.split([n // 2, n - n // 2], dim=-2)
    b_1, b_2 = b.split([n // 2, n - n // 2], dim=-2)
    corner = a_1 @ b_2.mT                                                           # [..., n/2, n/2]
    top, bottom = torch.cat([symmetric(a_1, b_1), corner], -1), torch.cat([corner.mT, symmetric(a_2, b_2)], -1)
    return torch.cat([top, bottom], -2)


def inverse_root(gram, dtype):
    """Approximate G^(-1/2) of positive semidefinite matrices [m, n, n]; too small where an eigenvalue is near 0."""
    norm = gram.norm(dim=(1, 2), keepdim=True) + 1e-14          # at least the largest eigenvalue, [m, 1, 1]
    gram, q = gram / norm, None
    for i, (a, b, c) in enumerate(POLYNOMIALS, 1):
        last = i == len(POLYNOMIALS)
        if last:                                    # by now the eigenvalues that matter are above bf16's rounding
            gram, q = gram.to(dtype), q.to(dtype)
        # P = a I + b G + c G^2;    Q <- Q P;    G <- P^2 G
        p = symmetric(gram, gram).mul_(c).add_(gram, alpha=b)
        p.diagonal(dim1=1, dim2=2).add_(a)
        q = p if q is None else symmetric(q, p)
        if not last:
            gram = symmetric(symmetric(p, p), gram)
    return q / norm.sqrt()


def orthogonalize(matrices, dtype=torch.float32, scales=None, rate=1.0):
    """Replace each matrix U S V^T [n, k] by approximately U V^T: the same directions, singular values near 1.

    Muon's iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon) applies odd polynomials to X. The same
    result is Q X, or X Q where X is tall, with Q a polynomial of the smaller of X X^T and X^T X: then all products but
    two are of small square matrices, and those of one size run as a batch. Singular values below 0.01 of the largest
    stay below 1.

    Args:
        matrices: a list of float32 [n, k].
        dtype: of the result and of the last products, where bf16 loses no more than in Muon's own iteration. The other
            products stay float32, on a GPU too: X X^T holds squared singular values, and bf16 would lose small ones.
        scales: a factor for each result, floats; None: 1.
        rate: one more factor for all, a float, or a 0-d tensor in a CUDA graph.

    Yields:
        the results one by one: on a CPU, memory that was just used is many times as fast as new memory.
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
    """A view [out, in h w] of a weight [out, in, h, w], in memory order: that of the columns does not matter."""
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    return (weight.permute(0, 2, 3, 1) if channels_last else weight).view(len(weight), -1)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): each step goes along the orthogonalized momentum of a weight seen as [out, h w in].

    The step is scaled by 0.2 sqrt(max(out, h w in)) (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that its RMS
    is that of an Adam step and one learning rate serves both.

    Not torch.optim.Muon, which takes only matrices and always computes in bf16: on CPUs without bf16 a step took 34
    times as long as in float32 (docs/tuning.md).

    Args:
        groups: parameter groups of torch.optim, of weights [out, in, h, w].
        bf16: compute the last products in bf16; else in float32.
        every: a weight whose products cost more than a tenth of the group's average moves in every so-many-th step
            only, by as many times the step; these weights take turns. The momentum sees all gradients. In SimpleUNet
            they are 15 of 27, with 0.99 of the cost.
        momentum: mu in the formula below.

    step() overwrites the gradients.
    """

    def __init__(self, groups, bf16, every=1, momentum=0.95):
        super().__init__(groups, dict(lr=0.0, step=0))
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.every, self.momentum = every, momentum

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
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_lerp_(momenta, [weight.grad for weight in weights], 1 - self.momentum)
            step = group.get("step", 0)             # older checkpoints have none
            group["step"] = step + 1
            costs = [min(x.shape) ** 2 * max(x.shape) for x in map(as_matrix, weights)]
            costly = [i for i, cost in enumerate(costs) if 10 * cost > sum(costs) / len(costs)]
            waiting = [i for turn, i in enumerate(costly) if (step + turn) % self.every]
            due = [i for i in range(len(weights)) if i not in waiting]
            if not due:
                continue
            weights, momenta = [weights[i] for i in due], [momenta[i] for i in due]
            gradients = [weight.grad for weight in weights]
            # In place: on a CPU new memory takes six times as long.
            torch._foreach_lerp_(gradients, momenta, self.momentum)
            updates = [as_matrix(gradient) for gradient in gradients]
            steps = [self.every if i in costly else 1 for i in due]
            lengths = [n * 0.2 * max(x.shape) ** 0.5 for n, x in zip(steps, updates, strict=True)]
            moves = orthogonalize(updates, self.dtype, lengths, group["lr"])
            for weight, move in zip(weights, moves, strict=True):
                as_matrix(weight).sub_(move)
