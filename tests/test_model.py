import pytest
import torch
from conftest import trained_net

from model import SimpleUNet


@pytest.mark.parametrize("channels", [8, 16, 24, 32, 40, 56])
def test_shapes(channels):
    net = SimpleUNet(channels=channels, label_dim=7)
    x, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 6])
    assert net(x, torch.rand(3) + 0.1, labels).shape == x.shape
    features = net(x, torch.rand(3) + 0.1, labels, return_features=True)
    wanted = [(2 * channels, 16), (4 * channels, 8), (8 * channels, 4), (8 * channels, net.bottleneck_size)]
    assert [(level.shape[1], level.shape[2]) for level in features] == wanted
    assert net.feature_channels == [c for c, _ in wanted]
    assert net(x[:1], 80.0, labels[:1]).shape == (1, 3, 32, 32)


def test_widths_are_those_of_the_architecture():
    net = SimpleUNet(channels=64)
    assert [blocks[0].conv1.out_channels for blocks in net.down] == [128, 256, 512]
    assert [blocks[0].conv1.out_channels for blocks in net.up] == [64, 128, 256]


def test_every_form_of_sigma_means_the_same():
    net = trained_net(channels=16)
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([2, 5])
    wanted = net(x, torch.full((2, 1, 1, 1), 0.7), labels)
    for sigma in (0.7, torch.tensor(0.7), torch.full((2,), 0.7), torch.tensor(0.7, dtype=torch.float64)):
        torch.testing.assert_close(net(x, sigma, labels), wanted)
    with pytest.raises(ValueError, match="sigma"):
        net(x, torch.ones(3), labels)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_untrained_net_is_its_preconditioning_in_float32(bf16):
    # The last convolution starts at zero, so F = 0 and x0_hat = c_skip x: table 1 of Karras et al. with sigma_data 0.5.
    x = torch.randn(4, 3, 32, 32)
    sigma = torch.tensor([0.002, 0.5, 1.0, 80.0])
    wanted = (0.25 / (sigma**2 + 0.25)).reshape(4, 1, 1, 1) * x
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        x0_hat = SimpleUNet(channels=16)(x, sigma, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(x0_hat, wanted)


def test_the_network_sees_unit_variance_and_is_scaled_by_c_out():
    net = SimpleUNet(channels=16)
    seen = {}

    def network(x, c_noise, labels, return_features):
        seen.update(std=x.std().item(), c_noise=c_noise)
        return torch.ones_like(x)

    net.network = network
    x_0, labels = 0.5 * torch.randn(64, 3, 32, 32), torch.zeros(64, dtype=torch.long)
    for sigma in (0.01, 1.0, 80.0):
        x_t = x_0 + sigma * torch.randn_like(x_0)
        f_part = net(x_t, sigma, labels) - 0.25 / (sigma**2 + 0.25) * x_t
        assert seen["std"] == pytest.approx(1, abs=0.02)
        torch.testing.assert_close(seen["c_noise"], torch.full((64,), sigma).log() / 4)
        torch.testing.assert_close(f_part.mean().item(), 0.5 * sigma / (sigma**2 + 0.25) ** 0.5, rtol=1e-4, atol=0)


def test_sigma_and_label_change_the_image():
    net = trained_net(channels=16)
    x, zero, one = torch.randn(1, 3, 32, 32), torch.tensor([0]), torch.tensor([1])
    features = net(x, 1.0, zero, return_features=True)
    assert not torch.allclose(net(x, 1.0, zero), net(x, 1.0, one))
    # Neighbouring noise levels are told apart at both ends of the schedule, where a raw embedding could not.
    for low, high in ((0.002, 0.004), (40.0, 80.0)):
        a, b = (net.network(x, torch.tensor([s]).log() / 4, zero) for s in (low, high))
        assert (a - b).abs().mean() > 1e-3 * a.abs().mean()
    for other in net(x, 1.0, one, return_features=True), net(x, 2.0, zero, return_features=True):
        assert not any(torch.allclose(a, b) for a, b in zip(features, other, strict=True))


def test_gradient_reaches_every_parameter():
    net = trained_net(channels=16, blocks=2)
    (net(torch.randn(2, 3, 32, 32), torch.tensor([0.3, 3.0]), torch.arange(2)) ** 2).mean().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_bf16_network_stays_close_to_float32_and_returns_float32():
    net = trained_net(channels=16).to(memory_format=torch.channels_last)
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for sigma in (0.01, 1.0, 80.0):
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x * sigma, sigma, labels)
        assert low.dtype == torch.float32
        assert (low - net(x * sigma, sigma, labels)).abs().mean() < 0.02


@pytest.mark.parametrize("config", [dict(channels=12), dict(channels=0), dict(label_dim=0), dict(blocks=0)])
def test_bad_configurations_are_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        SimpleUNet(**config)


def test_no_class_is_minus_one_and_differs_from_every_class():
    net = trained_net(channels=8)
    x, none = torch.randn(10, 3, 32, 32), torch.full((10,), -1)
    without = net(x, 0.7, none)
    differences = (net(x, 0.7, torch.arange(10)) - without).abs().amax((1, 2, 3))
    assert (differences > 1e-4).all()
