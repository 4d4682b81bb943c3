import json

import pytest
import torch
from conftest import call

from tools import benchmark


def test_every_step_is_timed_and_its_arithmetic_counted(tmp_path):
    out = tmp_path / "new" / "benchmark.json"
    flags = ["--channels", "8", "--batch_size", "2", "--repeats", "1", "--device", "cpu", "--optimizer", "muon"]
    assert call(benchmark, *flags, "--out", str(out)) == 0
    report = json.loads(out.read_text())
    for part in report["parts"].values():
        launched = part["launched"]
        assert launched["images_per_second"] == pytest.approx(2000 / launched["ms"], rel=0.05)
        flops = part["gflop_per_image"] * launched["images_per_second"]
        assert launched["fraction_of_matmul"] == pytest.approx(flops / report["matmul_gflops"], rel=0.05)
    # In units of one evaluation, of which a training step makes 3: it, and both halves of its backward pass.
    one = report["parts"]["teacher_step"]["gflop_per_image"] / 3
    # The guided teacher takes 2, fake_unet 1 and 3, the generator 3; in the other turn only its image is made.
    assert report["parts"]["both_turns"]["gflop_per_image"] == pytest.approx(9 * one, rel=0.02)
    assert report["parts"]["guidance_turn"]["gflop_per_image"] == pytest.approx(4 * one, rel=0.02)
    # The generator takes 3; then there are real_unet's way down and the heads, whose width is not that of the network.
    assert report["parts"]["gan_turn"]["gflop_per_image"] > 3.5 * one


def test_a_trace_gives_the_time_of_kernels_and_counts_a_graph_as_one_launch():
    def event(cat, name, dur=1.0):
        return dict(cat=cat, name=name, dur=dur, ph="X")

    events = [event("kernel", "conv", 1500), event("gpu_memcpy", "copy", 250), event("gpu_memset", "fill", 250)]
    events += [event("cuda_runtime", name) for name in ("cudaLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync")]
    events += [event("cuda_driver", "cuLaunchKernelEx"), event("cuda_runtime", "cudaDeviceSynchronize", 9e9)]
    events += [event("gpu_user_annotation", "Optimizer.step", 9e9), dict(ph="M", name="process_name")]
    whole, kernels = benchmark.read_trace(dict(traceEvents=events))
    assert whole == dict(kernel_ms=2.0, launches=4) and kernels == dict(conv=1.5, copy=0.25, fill=0.25)


def test_a_matrix_product_is_counted_as_2_n_cubed(monkeypatch):
    products = []

    def one_second(call, device, repeats):
        products.append(call(0))
        return dict(ms=1000.0)

    monkeypatch.setattr(benchmark, "time_step", one_second)
    assert benchmark.matmul_peak(torch.device("cpu"), bf16=False) == 2 * 2048**3
    assert products[0].shape == (2048, 2048) and products[0].dtype == torch.float32
