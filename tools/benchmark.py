"""How fast the training steps run here, and how near that is to what the machine's arithmetic allows.

    python -m tools.benchmark                            # the 64-channel network on the best device
    python -m tools.benchmark --channels 32 --batch_size 64 --precision fp32
    python -m tools.benchmark --teacher edm-cifar10-32x32-cond-vp.pkl --batch_size 64

Each part is one training step, by preset cifar10_gpu: forward, backward, clipping, optimizer and EMA.
    teacher_step     Denoising of train0.py
    both_turns       DMD2 of train.py, in every dfake_gen_update_ratio-th step
    guidance_turn    DMD2 of train.py, in the other steps
    gan_turn         GAN of gan.py
On CUDA each is timed twice: kernels launched one by one, and captured as a CUDA graph (support/recorded.py). It reports
milliseconds per step of the whole, of the host until all is launched and of the kernels, and the number of launches.
"""

import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")       # which torch reads when it is loaded

import copy
import json
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import presets
import train
import train0
from gan import GAN, Discriminator
from model import SimpleUNet
from support import checkpoint, errors, flags, hardware, networks, records
from support.ema import EMA
from support.optimizers import Optimizer
from support.randomness import StepRandom
from support.recorded import WARM_UP, Recorded
from unified_model import UnifiedModel

PARTS = ("teacher_step", "both_turns", "guidance_turn", "gan_turn")
KERNELS = 12                                        # on CUDA, the number of slowest kernels to name


def parse_args(argv=None):
    parser = flags.Parser(description="Time the steps of training.")
    flags.add_common(parser, compile=None)
    flags.add_image_size(parser)
    flags.add_channels(parser)
    parser.add_argument(
        "--teacher", type=flags.path, help="distil this one, unguided; default: one of --channels, guided"
    )
    parser.add_argument("--batch_size", type=flags.count, help="images per step; default: 512 on CUDA, else 64")
    parser.add_argument("--optimizer", choices=["adam", "muon"], default="muon", help="as in the training scripts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to time")
    parser.add_argument("--repeats", type=flags.count, help="timed steps of each part; default: 20 on CUDA, else 3")
    parser.add_argument(
        "--max_seconds", type=flags.positive, help="start no part after so many seconds; default: no limit"
    )
    parser.add_argument("--out", type=flags.output(), default="runs/benchmark.json", help="the JSON")
    return parser.parse_args(argv)


def steps(args, device):
    """Yields name, train_step and arguments of each part, of networks with random weights by preset cifar10_gpu.

    With --teacher the student's parts are of that network, without guidance, as not every teacher can be guided.
    """
    n, bf16, fp16 = args.batch_size, hardware.uses_bf16(device, args.precision), args.precision == "fp16"
    torch.manual_seed(args.seed)
    net = SimpleUNet(args.channels, image_size=args.image_size)
    if args.teacher:
        net = networks.averaged(checkpoint.load(args.teacher, kind="teacher"))
    for weight in net.parameters():                 # products with the zeros that a network starts with may be faster
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    teacher, student = presets.TEACHER["cifar10_gpu"], presets.STUDENT["cifar10_gpu"]
    autocast = partial(hardware.autocast, device, args.precision)
    num_classes = max(1, net.label_dim)
    size = net.image_size
    images, labels = torch.rand(n, 3, size, size, device=device) * 2 - 1, torch.arange(n, device=device) % num_classes

    def optimizer(name, network, **how):
        return Optimizer(name, {network: 1e-3}, bf16, fp16, **how)

    if "teacher_step" in args.parts and not args.teacher:
        trained = copy.deepcopy(net).to(device, memory_format=torch.channels_last)
        denoising = train0.Denoising(
            trained, EMA(trained, 0.999), optimizer(args.optimizer, trained), teacher["p_mean"], teacher["p_std"],
            teacher["label_dropout"], autocast=autocast,
        )
        if args.compile:
            trained.compile()
        yield "teacher_step", denoising.train_step, (images, labels, 1.0)
    if set(args.parts) <= {"teacher_step"}:
        return
    cfg = {} if args.teacher else dict(cfg_scale=student["cfg_scale"], cfg_interval=student["cfg_interval"])
    settings = ("min_step_percent", "max_step_percent", "fake_noise", "diffusion_gan_max_timestep")
    model = UnifiedModel(
        net, student["conditioning_sigma"], **cfg, **{name: student[name] for name in settings}
    ).to(device, memory_format=torch.channels_last)
    generator, guidance = model.feedforward_model, model.guidance_model
    shared = dict(model=model, ema=EMA(generator, 0.99), start=0, steps=1, batch_size=n, num_classes=num_classes,
                  autocast=autocast)
    two_turns = train.DMD2(**shared, optimizers=dict(
        generator=optimizer(args.optimizer, generator), guidance=optimizer(args.optimizer, guidance.fake_unet)))
    if args.compile:                                # as in train.py
        torch._dynamo.config.recompile_limit = 32
        for network in (generator, guidance.fake_unet, guidance.real_unet):
            network.compile(dynamic=False)
    for name in ("both_turns", "guidance_turn"):
        if name in args.parts:
            yield name, two_turns.train_step, (name == "both_turns", None, None, 1.0)
    if "gan_turn" in args.parts:
        discriminator = Discriminator(net.feature_channels, num_classes).to(device, memory_format=torch.channels_last)
        gan = GAN(**shared, discriminator=discriminator, optimizers=dict(
            generator=optimizer("adam", generator), discriminator=optimizer("adam", discriminator)))
        yield "gan_turn", gan.train_step, (True, images, labels, 1.0)


def stepper(step, seed, device, arguments):
    """i -> the step, with the random numbers of step i of a run."""
    return lambda i: step([StepRandom(seed, i, device)], *arguments)


def wait(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def time_step(call, device, repeats):
    """Milliseconds per call of call(i), in a row (ms), and of the host in a single one (host_ms). It must be warm."""
    wait(device)
    start = time.perf_counter()
    for i in range(repeats):
        call(i)
    wait(device)
    whole, hosts = time.perf_counter() - start, []
    for i in range(3):
        start = time.perf_counter()
        call(i)
        hosts.append(time.perf_counter() - start)
        wait(device)
    return dict(ms=1e3 * whole / repeats, host_ms=1e3 * statistics.median(hosts))


def profile_step(call, folder, repeats=3):
    """Of call(i) on CUDA: a dict of kernel_ms and launches, and a dict of each kernel's milliseconds by its name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(repeats):
            call(i)
        torch.cuda.synchronize()
    trace = Path(folder) / "trace.json"
    profile.export_chrome_trace(str(trace))
    parts = read_trace(json.loads(trace.read_text(encoding="utf-8")))
    return ({name: number / repeats for name, number in part.items()} for part in parts)


def read_trace(trace):
    """From a trace of torch.profiler, the two dicts of profile_step; a CUDA graph counts as one launch."""
    kernels, calls = Counter(), Counter()
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[event["name"]] += event["dur"] / 1e3        # microseconds
        elif event.get("cat") in ("cuda_runtime", "cuda_driver"):
            calls[event["name"]] += 1
    words = ("Launch", "Memcpy", "Memset")
    launches = sum(n for name, n in calls.items() if any(w in name for w in words))
    return dict(kernel_ms=kernels.total(), launches=launches), kernels


def count_flops(call):
    """FLOP of the networks in call(0), forward and backward, without the optimizer's."""
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        call(0)
    outermost = [counts for name, counts in counter.get_flop_counts().items() if name != "Global" and "." not in name]
    return sum(sum(counts.values()) for counts in outermost)


def matmul_peak(device, bf16):
    """FLOP/s of a large matrix product on this machine, in bf16 or float32: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    calls = 10 if device.type == "cuda" else 1
    return 2 * n**3 / min(time_step(lambda i: a @ b, device, calls)["ms"] / 1e3 for _ in range(10))


def main(argv=None):
    args = parse_args(argv)
    device = hardware.start(args)
    cuda, bf16, began = device.type == "cuda", hardware.uses_bf16(device, args.precision), time.perf_counter()
    args.compile = cuda if args.compile is None else args.compile
    args.batch_size, args.repeats = args.batch_size or (512 if cuda else 64), args.repeats or (20 if cuda else 3)
    peak = matmul_peak(device, bf16)
    print(f"{'bf16' if bf16 else 'float32'} matrix product: {peak / 1e12:.3g} TFLOP/s")
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, step, arguments in steps(args, device):
            if args.max_seconds and time.perf_counter() - began > args.max_seconds:
                print(f"{name}: skipped after {args.max_seconds:g} seconds")
                continue
            modes = dict(launched=step, recorded=Recorded(step)) if cuda else dict(launched=step)
            flops = count_flops(stepper(step, args.seed, device, arguments))
            parts[name] = dict(gflop_per_image=round(flops / args.batch_size / 1e9, 6))
            for mode, function in modes.items():
                call = stepper(function, args.seed, device, arguments)
                try:
                    for i in range(WARM_UP + 1):
                        call(i)
                except RuntimeError as error:
                    if mode == "launched":
                        raise
                    print(f"{name}: {error}", flush=True)
                    continue
                found = time_step(call, device, args.repeats)
                whole, kernels = profile_step(call, folder) if cuda else ({}, {})
                found.update(whole)
                longest = Counter(kernels).most_common(KERNELS)
                speed, share = args.batch_size / found["ms"] * 1e3, flops / (found["ms"] / 1e3) / peak
                numbers = {key: round(value, 2) for key, value in found.items()}
                parts[name][mode] = dict(
                    numbers, images_per_second=round(speed, 1), fraction_of_matmul=round(share, 4),
                    longest_kernels={kernel[:100]: round(ms, 3) for kernel, ms in longest},
                )
                shown = ", ".join(f"{key} {value:g}" for key, value in numbers.items())
                print(f"{name} {mode}: {speed:.0f} images/s, {100 * share:.1f} % of the product; {shown}", flush=True)
    report = dict(
        what="milliseconds a step; fraction of this machine's measured matrix product", matmul_gflops=peak / 1e9,
        bf16=bf16, compiled=args.compile, batch_size=args.batch_size, repeats=args.repeats,
        **(dict(teacher=args.teacher) if args.teacher else dict(channels=args.channels, image_size=args.image_size)),
        optimizer=args.optimizer, seed=args.seed, parts=parts, **hardware.peak_memory(device),
        seconds=round(time.perf_counter() - began, 1),
    )
    records.write_json(args.out, report, device)
    print(args.out)


if __name__ == "__main__":
    errors.run(main)
