"""How fast this machine trains and samples, and how near that is to what its arithmetic allows.

    python benchmark.py                                  # the 64-channel network on the best device
    python benchmark.py --channels 32 --batch_size 32 --modes fp32 bf16

Times, each in float32 eager (contiguous, no TF32), bf16 (channels_last) and bf16 compiled:
    teacher_step     forward, backward, optimizer and EMA of train0.py
    generator_turn   of train.py: generate, DM loss, backward, optimizer and EMA
    guidance_turn    of train.py: generate without gradient, fake loss, backward, optimizer
    guidance_floor   the least a guidance turn could take: one generator forward and one training step of fake_unet
    loop             what a step does beside its networks: random numbers, a batch of the dataset, the meter, and a line
                     to TensorBoard and log.jsonl, which the scripts write every --log_every steps only
    sample_one_step  one evaluation an image
    sample_heun      18 Heun steps, 35 evaluations an image
The modes take turns, so that a slow minute of the machine is shared; medians and quartiles of the repeats. Peak memory
is that of a process which does the part alone. Of the eager modes also the operators that take most of the time.
"""

import copy
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import cli
import data
import diffusion
import records
import runtime
from model import SimpleUNet
from optimizers import Optimizer
from randomness import StepRandom
from unified_model import UnifiedModel

MODES = {"fp32": ("fp32", torch.contiguous_format, False), "bf16": ("bf16", torch.channels_last, False),
         "compiled": ("bf16", torch.channels_last, True)}


def parse_args(argv=None):
    parser = cli.Parser(description="Time the parts of training and sampling.")
    parser.add_argument("--seed", type=cli.natural, default=0, help="of weights and images")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, mps")
    parser.add_argument("--channels", type=cli.number(int, 8), default=64, help="of the first level, a multiple of 8")
    parser.add_argument("--batch_size", type=cli.count, default=64, help="images per step")
    parser.add_argument("--optimizer", choices=["adam", "muon"], default="adam", help="as in the training scripts")
    parser.add_argument("--repeats", type=cli.number(int, 3), default=7, help="timed runs of each part in each mode")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="which to time")
    parser.add_argument("--out", type=cli.path, default="results/benchmark.json", help="the JSON")
    args = parser.parse_args(argv)
    args.precision = "auto"
    if args.channels % 8:
        parser.error(f"--channels {args.channels} is not a multiple of 8")
    if Path(args.out).is_dir() or not cli.writable(args.out):
        parser.error(f"cannot write --out {args.out}")
    return args


def parts(args, device, mode, run=None):
    """name -> function that does the part once, with networks of its own for this mode; run: a RunFolder to log to."""
    precision, memory_format, compiled = MODES[mode]
    torch.manual_seed(args.seed)
    teacher = SimpleUNet(args.channels)
    for parameter in teacher.parameters():          # a fresh network's zeros would make its arithmetic too easy
        torch.nn.init.normal_(parameter, std=0.02)
    model = UnifiedModel(teacher).to(device, memory_format=memory_format)
    teacher = teacher.to(device, memory_format=memory_format)
    generator, fake_unet = model.feedforward_model, model.guidance_model.fake_unet
    sampled = copy.deepcopy(teacher).eval().requires_grad_(False)                   # as checkpoint.ema_model gives it
    trained = (teacher, generator, fake_unet)
    bf16 = runtime.uses_bf16(device, precision)
    optimizers = {net: Optimizer(args.optimizer, {net: 1e-6}, bf16) for net in trained}
    emas = {net: checkpoint.EMA(net, 0.999) for net in (teacher, generator)}
    if compiled:
        torch._dynamo.config.recompile_limit = 32   # they all share one forward, each with and without gradient
        for net in (teacher, generator, fake_unet, model.guidance_model.real_unet, sampled):
            net.compile()
    images = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8)
    dataset = data.Dataset(images, torch.arange(10_000) % 10, [str(i) for i in range(10)])
    batches, meter = data.Batches(dataset, args.batch_size, args.seed, device), runtime.Meter(0, device)
    rng = StepRandom(args.seed, 0, device)
    z = rng.normal(args.batch_size, 3, 32, 32).to(memory_format=memory_format)
    sigma = diffusion.lognormal_sigma(rng.normal(args.batch_size, 1, 1, 1))
    x_0, labels = batches(0)
    x_t = (x_0 + sigma * z).to(memory_format=memory_format)

    def update(net, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizers[net].step()
        optimizers[net].zero_grad()
        if net in emas:
            emas[net].update_parameters(net)

    def autocast():
        return runtime.autocast(device, precision)

    def train(net):
        with autocast():
            x0_hat = net(x_t, sigma, labels)
        update(net, (diffusion.karras_weight(sigma) * (x0_hat - x_0) ** 2).mean())

    def generator_turn():
        with autocast():
            losses, _ = model.generator_turn(model.generate(z, labels), labels, rng)
        update(generator, losses["loss_dm"])

    def guidance_turn():
        with autocast():
            with torch.no_grad():
                x_gen = model.generate(z, labels)
            losses, _ = model.guidance_turn(x_gen, labels, rng)
        update(fake_unet, losses["loss_fake"])

    def guidance_floor():
        with autocast(), torch.no_grad():
            generator(z, 80.0, labels)
        train(fake_unet)

    def loop():
        step_rng = StepRandom(args.seed, 1, device)
        step_rng.normal(args.batch_size, 3, 32, 32)
        data.random_flip(batches(1)[0], step_rng)
        meter.add(1, loss=sigma[0, 0, 0, 0], grad_norm=sigma[0, 0, 0, 0])
        run.scalars(1, dict(meter.read(), images_per_second=1.0, memory_mib=1.0))

    @torch.no_grad()
    def sample_one_step():
        with autocast():
            diffusion.few_step_sample(sampled, z, labels, [80.0], None)

    def sample_heun():
        with autocast():
            diffusion.heun_sample(sampled, z, labels, 18)

    return dict(
        teacher_step=lambda: train(teacher), generator_turn=generator_turn, guidance_turn=guidance_turn,
        guidance_floor=guidance_floor, loop=loop, sample_one_step=sample_one_step, sample_heun=sample_heun,
    )


def timed(function, device):
    """Milliseconds of one call.

    On CUDA of several without a pause, as in a loop that does not wait for the device, and by events: the host's clock
    would only see the launches.
    """
    if device.type == "cuda":
        calls, start, end = 5, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    start = time.perf_counter()
    function()
    if device.type == "mps":
        torch.mps.synchronize()
    return 1e3 * (time.perf_counter() - start)


def peak_memory(function, device):
    """MiB at the peak of one call: of the GPU, or resident where Linux can tell; else None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        Path("/proc/self/clear_refs").write_text("5")                               # the peak starts anew
        function()
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10)
    except OSError:
        return None


def peak_memory_alone(args, device, mode, name):
    """peak_memory of a part after its warm-up, in a process of its own: what else this one holds does not count."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmark"])   # imports torch once for all
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(measure_memory, args, device, mode, name).result()


def measure_memory(args, device, mode, name):
    runtime.pick_device(args.device)                # its choice of algorithms holds for one process, this is another
    runtime.allow_tf32(mode != "fp32")
    function = parts(args, device, mode)[name]
    function()
    return peak_memory(function, device)


def operators(function, device, most=10):
    """The operators that take most of the time of one call: name -> share of it that is their own."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as seen:
        function()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # An operator's time on the GPU holds that of its kernels, which are in the list once more.
    events = [event for event in seen.key_averages() if event.device_type == DeviceType.CPU]
    times = {event.key: getattr(event, own) for event in events}
    total = sum(times.values())
    largest = sorted(times, key=times.get, reverse=True)[:most]
    return {name: round(times[name] / total, 4) for name in largest} if total else {}


def matmul_peak(device, dtype, n=2048):
    """Measured FLOP/s of a large matrix product, the best of ten; in float32 where ``dtype`` is emulated."""
    n = 8192 if device.type == "cuda" else n
    if dtype == torch.bfloat16 and not runtime.has_fast_bf16(device):
        dtype = torch.float32                       # an emulated product, 100 times as slow, is nobody's peak
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) / 1e3 for _ in range(10))


def main(argv=None):
    args = parse_args(argv)
    device = cli.device(args)
    start = time.perf_counter()
    folder = tempfile.TemporaryDirectory()
    run = runtime.RunFolder(folder.name, None)
    run.begin(0)
    functions = {mode: parts(args, device, mode, run) for mode in args.modes}
    names = list(functions[args.modes[0]])
    flops = {}
    for name in names:
        counter = FlopCounterMode(display=False)
        with counter:
            parts(args, device, "fp32", run)[name]()
        flops[name] = counter.get_total_flops()
    peak = {}
    for mode in args.modes:
        runtime.allow_tf32(mode != "fp32")
        peak[mode] = matmul_peak(device, torch.float32 if mode == "fp32" else torch.bfloat16)

    times = {(mode, name): [] for mode in args.modes for name in names}
    memory, shares = {}, {}
    for mode in args.modes:
        runtime.allow_tf32(mode != "fp32")
        for name in names:
            functions[mode][name]()                 # warm-up; compiles
            if mode != "compiled":
                shares.setdefault(mode, {})[name] = operators(functions[mode][name], device)
    for _ in range(args.repeats):
        for name in names:
            for mode in args.modes:
                runtime.allow_tf32(mode != "fp32")
                times[mode, name].append(timed(functions[mode][name], device))
    run.close()
    folder.cleanup()
    del functions                                   # a GPU's memory is one for all processes
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for mode in args.modes:
        for name in names:
            memory[mode, name] = None if name == "loop" else peak_memory_alone(args, device, mode, name)

    table, ratios = {}, {}
    for mode in args.modes:
        table[mode] = dict(matmul_gflops=round(peak[mode] / 1e9, 1))
        for name in names:
            low, median, high = statistics.quantiles(times[mode, name], n=4)
            table[mode][name] = dict(
                ms=round(median, 2), quartiles_ms=[round(low, 2), round(high, 2)],
                images_per_second=round(args.batch_size / median * 1e3, 1), peak_memory_mib=memory[mode, name],
                fraction_of_matmul=round(flops[name] / (median / 1e3) / peak[mode], 3),
            )
        print(f"{mode}: matrix product {peak[mode] / 1e9:.0f} GFLOP/s")
        for name in names:
            row = table[mode][name]
            print(f"  {name:16} {row['ms']:10.2f} ms  {row['images_per_second']:10.1f} images/s  "
                  f"{100 * row['fraction_of_matmul']:5.1f} % of it  {row['peak_memory_mib'] or '-'} MiB")
        ms = {name: table[mode][name]["ms"] for name in names}
        ratios[mode] = dict(
            one_step_to_heun_images=round(ms["sample_heun"] / ms["sample_one_step"], 2),         # 35 at most
            guidance_turn_to_floor=round(ms["guidance_turn"] / ms["guidance_floor"], 3),
            loop_to_guidance_turn=round(ms["loop"] / ms["guidance_turn"], 5),
        )
    report = dict(
        what="medians and quartiles; modes in turn; fraction of this machine's measured matrix product",
        channels=args.channels, batch_size=args.batch_size, repeats=args.repeats, seed=args.seed,
        gflop_per_image={name: round(value / args.batch_size / 1e9, 6) for name, value in flops.items()},
        modes=table, ratios=ratios, operators=shares, seconds=round(time.perf_counter() - start, 1),
    )
    records.write_json(args.out, report, device)
    print(args.out)


if __name__ == "__main__":
    cli.run(main)
