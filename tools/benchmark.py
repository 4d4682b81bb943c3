"""How fast the training steps run here, and how near that is to what the machine's arithmetic allows.

    python -m tools.benchmark                            # the 64-channel network on the best device
    python -m tools.benchmark --channels 32 --batch_size 64 --precision fp32
    python -m tools.benchmark --teacher edm-cifar10-32x32-cond-vp.pkl --batch_size 64

The steps are those of train0.py and train.py by preset cifar10_gpu, taken out of their loops:
    teacher_step     forward, backward, clipping, optimizer and EMA of train0.py
    both_turns       of train.py, as in every dfake_gen_update_ratio-th step
    guidance_turn    of train.py, as in the other steps
    gan_turn         of train.py, as in its --gan_steps
On CUDA each launched kernel by kernel, and recorded and replayed as one (support/recorded.py). Milliseconds a step: of
the whole, of the host until all is launched, of the kernels alone; and how many launches the host makes.
"""

import contextlib
import io
import json
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
import train0
from support import errors, flags, hardware, records
from support.randomness import StepRandom
from support.recorded import WARM_UP, Recorded

PARTS = ("teacher_step", "both_turns", "guidance_turn", "gan_turn")
KERNELS = 12                                        # so many of those that take longest are named, on CUDA


def parse_args(argv=None):
    parser = flags.Parser(description="Time the steps of training.")
    flags.add_common(parser, compile=None)
    parser.add_argument("--channels", type=flags.number(int, 8), default=64, help="of the first level, a multiple of 8")
    parser.add_argument(
        "--teacher", type=flags.path, help="distil this one, without guidance; default: one of --channels, with it"
    )
    parser.add_argument("--batch_size", type=flags.count, help="images per step; default: 512 on CUDA, else 64")
    parser.add_argument("--optimizer", choices=["adam", "muon"], default="muon", help="as in the training scripts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which to time")
    parser.add_argument("--repeats", type=flags.count, help="timed steps of each part; default: 20 on CUDA, else 3")
    parser.add_argument(
        "--max_seconds", type=flags.positive, help="begin no further part after so many; default: no limit"
    )
    parser.add_argument("--out", type=flags.path, default="runs/benchmark.json", help="the JSON")
    args = parser.parse_args(argv)
    if args.channels % 8:
        parser.error(f"--channels {args.channels} is not a multiple of 8")
    if Path(args.out).is_dir() or not flags.writable(args.out):
        parser.error(f"cannot write --out {args.out}")
    return args


class Taken(BaseException):
    """Carries a training script's step, and the arguments of its first call, out of the loop."""


def take(script, argv):
    """The step (rngs, *arguments) of a training script, and such arguments."""
    def carry_out(step):
        def first_call(rngs, *arguments):
            raise Taken(step, arguments)
        return first_call

    with mock.patch.object(script, "recorded", lambda device, wanted: carry_out):
        try:
            script.main(argv)
        except Taken as taken:
            return taken.args
        finally:                                    # no loop is there any more that would look at a signal to stop
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def steps(args, device, folder):
    """Yields name, step and arguments of each part; those of train.py with --teacher, or one of three steps.

    With --teacher there is no gan_turn, as the images that it learned from may not be here.
    """
    common = ["--preset", "cifar10_gpu", "--seed", str(args.seed), "--device", str(device)]
    common += ["--precision", args.precision, "--batch_size", str(args.batch_size), "--optimizer", args.optimizer]
    compiled = ["--compile" if args.compile else "--no-compile"]
    network = ["--dataset", "shapes", "--channels", str(args.channels)]
    if "teacher_step" in args.parts and not args.teacher:
        yield "teacher_step", *take(train0, [*common, *network, *compiled, "--run_dir", f"{folder}/taken"])
    if set(args.parts) - {"teacher_step"}:
        teacher = ["--teacher", f"{folder}/teacher"]            # no longer with the zeros that a network starts with
        if args.teacher:
            teacher = ["--teacher", args.teacher, "--cfg_scale", "1", "--autoguidance_scale", "1"]
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                few = ["--no-compile", "--steps", "3", "--batch_size", "8", "--warmup_steps", "0"]
                train0.main([*common, *network, *few, "--run_dir", teacher[1]])
        run = ["--fit_steps", "0", "--gan_steps", "0", "--run_dir", f"{folder}/student"]
        step, (_, *others) = take(train, [*common, *compiled, *teacher, *run])
        for name in ("both_turns", "guidance_turn"):
            if name in args.parts:
                yield name, step, (name == "both_turns", *others)
        if "gan_turn" in args.parts and not args.teacher:
            run = ["--fit_steps", "0", "--run_dir", f"{folder}/gan"]
            gan = ["--warmup_steps", "0", "--steps", "1", "--gan_steps", "1"]
            yield "gan_turn", *take(train, [*common, *compiled, *teacher, *run, *gan])


def stepper(step, seed, device, arguments):
    """i -> the step with the random numbers of step i, drawn as the loops do."""
    return lambda i: step([StepRandom(seed, i, device)], *arguments)


def wait(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def time_step(call, device, repeats):
    """Of call(i), which is warm: milliseconds of calls in a row, and those of the host in one alone."""
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
    """Of call(i) on CUDA: milliseconds of the kernels, and the host's launches; and of each kernel, by its name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(repeats):
            call(i)
        torch.cuda.synchronize()
    trace = Path(folder) / "trace.json"
    profile.export_chrome_trace(str(trace))
    parts = read_trace(json.loads(trace.read_text()))
    return ({name: number / repeats for name, number in part.items()} for part in parts)


def read_trace(trace):
    """From a trace of torch.profiler: milliseconds of all kernels, copies and fills, and the launches of them; and each
    kernel's milliseconds.

    A graph counts as one launch, whatever it holds.
    """
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
    """Arithmetic of the networks in call(0), forward and backward, in FLOP; that of the optimizer is left out."""
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
        for name, step, arguments in steps(args, device, folder):
            if args.max_seconds and time.perf_counter() - began > args.max_seconds:
                print(f"{name}: left out, after {args.max_seconds:g} seconds")
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
        **(dict(teacher=args.teacher) if args.teacher else dict(channels=args.channels)),
        optimizer=args.optimizer, seed=args.seed, parts=parts, seconds=round(time.perf_counter() - began, 1),
    )
    records.write_json(args.out, report, device)
    print(args.out)


if __name__ == "__main__":
    errors.run(main)
