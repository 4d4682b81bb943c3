"""The optimizer against known answers: what Muon's step is, which weights it steps, and at which rate."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES
from torch import nn

from guidance import ClassifierHead
from model import SimpleUNet
from support.muon import POLYNOMIALS, Muon, orthogonalize
from support.optimizers import MUON_ON_CPU, Optimizer


def conv(c_in, c_out, size=3):
    return nn.Conv2d(c_in, c_out, size).to(memory_format=torch.channels_last)


def test_each_polynomial_is_the_nearest_to_1():
    """By Chebyshev's theorem: its error is equally large, with alternating signs, at four points of the interval."""
    low, high = 0.01, 1.0
    for a, b, c in POLYNOMIALS:
        x = torch.linspace(low, high, 100_001, dtype=torch.double)
        error = a * x + b * x**3 + c * x**5 - 1
        worst = error.abs().max()
        turns = error[1:-1][(error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) < 0]
        expected = worst * torch.tensor([-1, 1, -1, 1], dtype=torch.double)
        torch.testing.assert_close(torch.stack([error[0], *turns, error[-1]]), expected, rtol=0, atol=5e-5)
        low, high = 1 - worst, 1 + worst
    assert worst < 0.27


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
def test_orthogonalize_keeps_the_directions_and_evens_the_sizes(dtype, near, device):
    shapes = [(16, 144), (96, 16), (33, 33), (16, 40)]
    parts = [torch.linalg.svd(torch.randn(shape, device=device), full_matrices=False) for shape in shapes]
    given = [u * (1e3 * torch.logspace(0, -1.5, len(s), device=device)) @ v for u, s, v in parts]
    for (u, _, v), x in zip(parts, orthogonalize(given, dtype), strict=True):
        values = torch.linalg.multi_dot([u.mT, x.float(), v.mT])                    # diagonal: in the same directions
        torch.testing.assert_close(values, values.diagonal().diag(), rtol=0, atol=near)
        assert (values.diagonal() - 1).abs().max() < 0.27 + near


@pytest.mark.parametrize("device", DEVICES)
def test_orthogonalize_scales_each_result(device):
    given = [torch.randn(shape, device=device) for shape in ((4, 9), (9, 4), (4, 4))]
    plain, scaled = orthogonalize(given), orthogonalize(given, scales=[1.0, 2.0, 3.0])
    for one, other, scale in zip(plain, scaled, (1, 2, 3), strict=True):
        torch.testing.assert_close(other, scale * one)


@pytest.mark.parametrize("device", DEVICES)                         # a GPU records the step and replays it
@pytest.mark.parametrize(("c_in", "c_out", "size"), [(16, 32, 3), (64, 16, 1), (8, 96, 1), (8, 96, 3)])
def test_muon_steps_where_torchs_does_on_the_weights_matrix(c_in, c_out, size, device):
    net, matrix = conv(c_in, c_out, size).to(device), nn.Parameter(torch.zeros(c_out, c_in * size**2, device=device))
    with torch.no_grad():
        matrix.copy_(net.weight.flatten(1))
    start = matrix.detach().clone()
    theirs = torch.optim.Muon([matrix], lr=1e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    ours = Muon([dict(params=[net.weight], lr=1e-2)], bf16=True)                         # as torch's always is
    for _ in range(3):
        net.weight.grad = 1e3 * torch.randn_like(net.weight)        # whose size does not matter
        matrix.grad = net.weight.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    moved, by_ours = matrix.detach() - start, net.weight.detach().flatten(1) - start
    assert F.cosine_similarity(by_ours.flatten(), moved.flatten(), dim=0) > 0.98
    assert by_ours.norm().item() == pytest.approx(moved.norm().item(), rel=0.25)  # theirs evens them less
    assert moved.square().mean().sqrt().item() > 0.2e-2             # 0.2 lr a step, where they agree


@pytest.mark.parametrize("device", DEVICES)
def test_muon_steps_several_weights_each_by_its_own_gradient(device):
    """Also where a GPU's recording has to begin anew, as other weights have gradients."""
    def steps(together):
        torch.manual_seed(0)
        weights = [conv(*shape).to(device).weight for shape in ((8, 96, 3), (16, 8, 1), (8, 8, 3))]
        groups = [weights] if together else [[weight] for weight in weights]
        optimizers = [Muon([dict(params=group, lr=1e-2)], bf16=False) for group in groups]
        for present in (3, 3, 2, 2, 3):
            for i, weight in enumerate(weights):
                gradient = torch.randn(weight.shape).to(device, memory_format=torch.channels_last)
                weight.grad = gradient if i < present else None
            for optimizer in optimizers:
                optimizer.step()
        return weights

    for one, two in zip(steps(True), steps(False), strict=True):
        torch.testing.assert_close(one, two)


def test_the_weights_that_cost_muon_most_move_in_turn_by_several_steps():
    def moves(every, steps, weights):
        optimizer, found = Muon([dict(params=weights, lr=1e-2)], bf16=False, every=every), []
        for step in range(steps):
            before = [weight.detach().clone() for weight in weights]
            for i, weight in enumerate(weights):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
            found.append([(w.detach() - old) for w, old in zip(weights, before, strict=True)])
        return found

    # by their products 36,864, 128, 36,864 and 4,608: a tenth of the average is 1,962
    shapes, turns = [(16, 16, 3, 3), (8, 4, 1, 1), (16, 16, 3, 3), (8, 8, 3, 3)], {0: 0, 2: 1, 3: 2}
    plain, taking_turns = (moves(every, 6, [nn.Parameter(torch.ones(shape)) for shape in shapes]) for every in (1, 2))
    for step in range(6):
        for i in range(4):                          # along the momentum of all gradients until then
            waits = i in turns and (step + turns[i]) % 2
            wanted = 0 * plain[step][i] if waits else plain[step][i] * (2 if i in turns else 1)
            torch.testing.assert_close(taking_turns[step][i], wanted, rtol=1e-4, atol=1e-6)


def test_muon_waits_in_steps_in_which_no_weight_has_its_turn():
    weight = nn.Parameter(torch.ones(8, 8, 3, 3))
    optimizer, moved = Muon([dict(params=[weight], lr=1e-2)], bf16=False, every=3), []
    for _ in range(6):
        before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
        optimizer.step()
        moved.append(not torch.equal(weight.detach(), before))
    assert moved == [True, False, False, True, False, False]


def test_muon_resumes_between_the_turns_to_the_bit():
    """Also from the state of an older checkpoint, which has no step."""
    def trained(steps, weights, state=None):
        optimizer = Muon([dict(params=weights, lr=1e-2)], bf16=True, every=2)
        if state:
            optimizer.load_state_dict(copy.deepcopy(state))
        for step in steps:
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return optimizer.state_dict()

    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(8, 16, 3, 3)), nn.Parameter(torch.randn(8, 8, 3, 3))]
    parts, older = copy.deepcopy(whole), copy.deepcopy(whole)
    trained(range(7), whole)
    state = trained(range(3), parts)
    trained(range(3, 7), parts, state)
    assert all(map(torch.equal, whole, parts))

    state = trained(range(4), older)
    for group in state["param_groups"]:
        del group["step"]
    trained(range(4, 7), older, state)
    assert all(map(torch.equal, whole, older))


def test_muon_takes_the_convolutions_inside_and_adam_the_rest():
    net, head = (network.to(memory_format=torch.channels_last) for network in (SimpleUNet(16), ClassifierHead(128)))
    optimizer = Optimizer("muon", dict.fromkeys((net, head), 1e-2))
    inside, rest = (
        {id(p) for group in optimizer.optimizers[name].param_groups for p in group["params"]}
        for name in ("muon", "adam")
    )
    named = [*net.named_parameters(), *head.named_parameters()]
    assert inside | rest == {id(p) for _, p in named} and not inside & rest
    for name, p in named:
        edge = name in ("stem.weight", "out_conv.weight", "layers.6.weight")        # pixels, pixels and the logit
        assert (id(p) in inside) == (p.ndim == 4 and not edge), name

    before = [p.detach().clone() for _, p in named]
    for _ in range(MUON_ON_CPU["every"]):
        for _, p in named:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert all(not torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for _, p in named)
    before = [p.detach().clone() for _, p in named]
    optimizer.step()                                                # without gradients, of either
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


def test_a_step_of_muon_goes_down_and_is_as_large_as_adams():
    moved = {}
    for name in ("adam", "muon"):
        torch.manual_seed(0)
        net = conv(16, 32)
        before = net.weight.detach().clone()
        net.weight.grad = torch.randn_like(net.weight)
        Optimizer(name, {net: 1e-2}).step()
        moved[name] = before - net.weight.detach()
        assert F.cosine_similarity(moved[name].flatten(), net.weight.grad.flatten(), dim=0) > 0.7
    # Adam's first step is lr everywhere; those that follow average to about a fifth of it.
    # The only weight waits for its turn after this step.
    assert moved["muon"].square().mean().sqrt().item() == pytest.approx(0.2e-2 * MUON_ON_CPU["every"], rel=0.3)
    assert moved["adam"].square().mean().sqrt().item() == pytest.approx(1e-2, rel=0.01)


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_each_network_steps_at_its_own_rate_times_the_factor(name):
    def moved(rates, factor):
        torch.manual_seed(0)
        networks = [conv(8, 8), conv(8, 8)]
        optimizer = Optimizer(name, dict(zip(networks, rates, strict=True)))
        before = [p.detach().clone() for network in networks for p in network.parameters()]
        for network in networks:
            for p in network.parameters():
                p.grad = torch.ones_like(p) + torch.arange(p.numel()).view(p.shape) % 5
        optimizer.step(factor)
        after = [p.detach() for network in networks for p in network.parameters()]
        return [(a - b).abs().mean().item() for a, b in zip(after, before, strict=True)]

    weight, bias, weight_2, bias_2 = moved((1e-2, 3e-2), 1.0)
    assert weight_2 == pytest.approx(3 * weight, rel=1e-3) and bias_2 == pytest.approx(3 * bias, rel=1e-3)
    assert moved((1e-2, 3e-2), 0.5) == pytest.approx([weight / 2, bias / 2, weight_2 / 2, bias_2 / 2], rel=1e-3)


def test_gradients_below_float16_are_kept_by_scaling_and_overflow_takes_no_step():
    def gradient(fp16, size):
        """Of the loss size * mean(w x) for w in float32 and x = 1 in float16."""
        net = nn.Linear(4, 1, bias=False)
        optimizer = Optimizer("adam", {net: 1.0}, fp16=fp16)
        before = net.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            optimizer.backward(size * net(torch.ones(8, 4)).float().mean())
        norm, scale = optimizer.clip(1e9), optimizer.scale
        found = None if net.weight.grad is None else net.weight.grad.clone()
        optimizer.step()
        return found, norm, scale, (net.weight - before).abs().mean().item()

    assert not gradient(False, 1e-9)[0].any()       # an eighth of that is no number of float16
    found, norm, scale, moved = gradient(True, 1e-9)
    assert found.flatten().tolist() == pytest.approx([1e-9] * 4, rel=1e-2)
    assert norm.item() == pytest.approx(2e-9, rel=1e-2)
    assert scale == 2**16 and moved > 0
    found, norm, scale, moved = gradient(True, 1e3)                 # times 2^16 / 8 is none either
    assert found is None and norm == 0 and scale == 2**15 and moved == 0
    assert not gradient(False, 1e9)[1].isfinite()                   # a run without scaling stops by that


def test_the_scale_of_the_loss_grows_is_saved_and_is_one_for_other_precisions():
    net = nn.Linear(2, 2)
    optimizer = Optimizer("adam", {net: 1e-3}, fp16=True)
    net.weight.grad = torch.zeros(2, 2)
    for _ in range(2000):
        optimizer.clip(1.0)
    assert optimizer.scale == 2**17
    again, other = (Optimizer("adam", {net: 1e-3}, fp16=fp16) for fp16 in (True, False))
    for loaded in again, other:
        loaded.load_state_dict(optimizer.state_dict())
    assert (again.scale, other.scale) == (2**17, 1)
