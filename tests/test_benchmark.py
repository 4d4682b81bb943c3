import json

import pytest
import torch
from conftest import call

from support import hardware
from tools import benchmark


def test_every_part_is_timed_in_every_mode_and_the_arithmetic_is_counted(tmp_path):
    out = tmp_path / "new" / "benchmark.json"
    flags = ["--channels", "8", "--batch_size", "2", "--repeats", "3", "--modes", "fp32", "bf16", "--device", "cpu"]
    assert call(benchmark, *flags, "--out", str(out)) == 0
    report = json.loads(out.read_text())
    flops = report["gflop_per_image"]
    assert set(report["modes"]) == {"fp32", "bf16"} and len(flops) == 5
    for mode in report["modes"].values():
        for name in flops:
            low, high = mode[name]["quartiles_ms"]
            assert 0 < low <= mode[name]["ms"] <= high
            assert mode[name]["images_per_second"] == pytest.approx(2000 / mode[name]["ms"], rel=0.05)
    # In units of one forward: Heun 35; a training step 3, but for the first layer, which has no gradient to pass on.
    one = flops["sample_one_step"]
    assert flops["sample_heun"] == pytest.approx(35 * one, rel=0.01)
    assert flops["teacher_step"] == pytest.approx(3 * one, rel=0.05)
    assert flops["guidance_turn"] == pytest.approx(4 * one, rel=0.05)
    assert flops["generator_turn"] == pytest.approx(5 * one, rel=0.05)


def test_a_matrix_product_is_counted_as_2_n_cubed(monkeypatch):
    products = []

    def one_second(function, device):
        products.append(function())
        return 1000.0

    monkeypatch.setattr(benchmark, "milliseconds", one_second)
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda device: False)
    assert benchmark.matmul_peak(torch.device("cpu"), torch.bfloat16) == 2 * 2048**3
    assert products[0].shape == (2048, 2048) and products[0].dtype == torch.float32
