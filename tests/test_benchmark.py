import json
import sys

import pytest
import torch
from conftest import call

import benchmark


def test_every_part_is_timed_in_every_mode_and_the_arithmetic_is_counted(tmp_path):
    out = tmp_path / "new" / "benchmark.json"
    flags = ["--channels", "8", "--batch_size", "2", "--repeats", "3", "--modes", "fp32", "bf16", "--device", "cpu"]
    assert call(benchmark, *flags, "--out", str(out)) == 0
    report = json.loads(out.read_text())
    flops = report["gflop_per_image"]
    assert set(report["modes"]) == {"fp32", "bf16"} and len(flops) == 7
    for mode in report["modes"].values():
        for name in flops:
            low, high = mode[name]["quartiles_ms"]
            assert 0 < low <= mode[name]["ms"] <= high
            assert (mode[name]["peak_memory_mib"] is None) == (name == "loop" or sys.platform != "linux")
            assert mode[name]["images_per_second"] == pytest.approx(2000 / mode[name]["ms"], rel=0.05)
    for name, mode in report["modes"].items():
        ratio = mode["sample_heun"]["ms"] / mode["sample_one_step"]["ms"]
        assert report["ratios"][name]["one_step_to_heun_images"] == pytest.approx(ratio, rel=0.01) and ratio > 5
    for shares in (shares for mode in report["operators"].values() for shares in mode.values()):
        assert 0.1 < sum(shares.values()) <= 1.001 and list(shares.values()) == sorted(shares.values(), reverse=True)
    # "convolution_backward", or "_slow_conv2d_backward" on a CPU whose oneDNN has no bf16.
    assert any("conv" in name and "backward" in name for name in report["operators"]["bf16"]["teacher_step"])
    assert not any("backward" in name for name in report["operators"]["bf16"]["sample_heun"])
    # In units of one forward: Heun 35; a training step 3, but for the first layer, which has no gradient to pass on.
    one = flops["sample_one_step"]
    assert flops["sample_heun"] == pytest.approx(35 * one, rel=0.01) and flops["loop"] == 0
    assert flops["teacher_step"] == pytest.approx(3 * one, rel=0.05)
    assert flops["guidance_turn"] == flops["guidance_floor"] == pytest.approx(4 * one, rel=0.05)
    assert flops["generator_turn"] == pytest.approx(5 * one, rel=0.05)


def test_a_matrix_product_is_counted_as_2_n_cubed():
    seen = []

    def timed(function, device):
        seen.append(function())
        return 1000.0                               # a second

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "timed", timed)
        assert benchmark.matmul_peak(torch.device("cpu"), torch.float32, n=16) == 2 * 16**3
        patch.setattr(benchmark.runtime, "has_fast_bf16", lambda device: False)
        benchmark.matmul_peak(torch.device("cpu"), torch.bfloat16, n=16)
    assert seen[0].shape == (16, 16) and seen[-1].dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_peak_memory_is_that_of_one_call():
    device = torch.device("cpu")

    def peak(mib):
        return benchmark.peak_memory(lambda: torch.ones(mib * 2**18), device)

    before = peak(1)
    assert peak(400) - before == pytest.approx(400, abs=40) and peak(1) - before < 40        # the larger one is gone
