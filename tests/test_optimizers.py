"""The optimizer against known answers: what Muon's step is, which weights it steps, and at which rate."""

import pytest
import torch
from torch import nn

from guidance import ClassifierHead
from model import SimpleUNet
from optimizers import ConvMuon, Optimizer


def conv(c_in, c_out, size=3):
    return nn.Conv2d(c_in, c_out, size).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("c_in", "c_out", "size"), [(16, 32, 3), (64, 16, 1), (8, 96, 1)])
def test_a_step_of_muon_is_orthogonal_and_as_large_as_adams(c_in, c_out, size):
    net = conv(c_in, c_out, size)
    before = net.weight.detach().clone()
    net.weight.grad = torch.randn_like(net.weight) * 1e3            # whose size does not matter
    ConvMuon([dict(params=[net.weight], lr=1e-2)]).step()
    step = (before - net.weight.detach()).flatten(1) / 1e-2
    assert (step * net.weight.grad.flatten(1)).sum() > 0            # downhill
    values = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)            # Newton-Schulz: all about 1
    assert values.min() > 0.5 and values.max() < 1.3
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


def test_muon_takes_the_convolutions_inside_and_adam_the_rest():
    net, head = SimpleUNet(16), ClassifierHead(128)
    networks = [network.to(memory_format=torch.channels_last) for network in (net, head)]
    optimizer = Optimizer("muon", dict.fromkeys(networks, 1e-2))
    inside = {id(weight) for weight in optimizer.parts["muon"].weights}
    rest = {id(p) for group in optimizer.parts["adam"].param_groups for p in group["params"]}
    everything = {id(p): name for network in networks for name, p in network.named_parameters()}
    assert inside | rest == set(everything) and not inside & rest
    for name, p in [*net.named_parameters(), *head.named_parameters()]:
        edge = name in ("stem.weight", "out_conv.weight", "layers.6.weight")        # pixels, pixels and the logit
        assert (id(p) in inside) == (p.ndim == 4 and not edge), name

    before = {id(p): p.detach().clone() for network in networks for p in network.parameters()}
    for network in networks:
        for p in network.parameters():
            p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(not torch.equal(p, before[id(p)]) for network in networks for p in network.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for network in networks for p in network.parameters())


def test_a_weight_that_muon_could_not_reach_is_refused():
    with pytest.raises(RuntimeError):
        Optimizer("muon", {nn.Conv2d(8, 8, 3): 1e-2})               # not channels_last: a copy would be trained


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


def test_a_state_of_before_there_was_a_choice_is_adams():
    net = conv(8, 8)
    old = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    net(torch.randn(2, 8, 8, 8)).square().mean().backward()
    old.step()
    optimizer = Optimizer("adam", {net: 1e-3})
    optimizer.load_state_dict(old.state_dict())
    state = optimizer.state_dict()["adam"]["state"]
    assert torch.equal(state[0]["exp_avg"], old.state_dict()["state"][0]["exp_avg"]) and state[0]["step"] == 1
    with pytest.raises((KeyError, ValueError)):
        Optimizer("muon", {net: 1e-3}).load_state_dict(old.state_dict())
