"""How fast this machine trains and samples, and how near that is to what its arithmetic allows.

    python -m tools.benchmark                            # the 64-channel network on the best device
    python -m tools.benchmark --channels 32 --batch_size 32 --modes fp32 bf16
    python -m tools.benchmark --teacher edm-cifar10-32x32-cond-vp.pkl

Times, each in float32 (contiguous, no TF32), in bf16 (channels_last) and in bf16 compiled:
    teacher_step     forward, backward, optimizer and EMA of train0.py
    generator_turn   of train.py: generate, DM loss, backward, optimizer and EMA
    guidance_turn    of train.py: generate without gradient, fake loss, backward, optimizer
    sample_one_step  one evaluation an image
    sample_heun      18 Heun steps, 35 evaluations an image
The modes take turns, so that a slow minute of the machine is shared: medians and quartiles of the repeats.
"""

import copy
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import diffusion
from model import SimpleUNet
from support import checkpoint, errors, flags, hardware, networks, records, resume
from support.ema import EMA
from support.optimizers import Optimizer
from support.randomness import StepRandom
from unified_model import UnifiedModel

# precision, memory format, compiled
MODES = dict(
    fp32=("fp32", torch.contiguous_format, False), bf16=("bf16", torch.channels_last, False),
    compiled=("bf16", torch.channels_last, True),
)


def parse_args(argv=None):
    parser = flags.Parser(description="Time the parts of training and sampling.")
    parser.add_argument("--seed", type=flags.natural, default=0, help="of weights and images")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, mps")
    parser.add_argument("--channels", type=flags.number(int, 8), default=64, help="of the first level, a multiple of 8")
    parser.add_argument("--teacher", type=flags.path, help="time the network of this checkpoint, or .pkl of EDM's")
    parser.add_argument("--batch_size", type=flags.count, default=64, help="images per step")
    parser.add_argument("--optimizer", choices=["adam", "muon"], default="adam", help="as in the training scripts")
    parser.add_argument("--repeats", type=flags.number(int, 3), default=7, help="timed runs of each part in each mode")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="which to time")
    parser.add_argument("--out", type=flags.path, default="runs/benchmark.json", help="the JSON")
    args = parser.parse_args(argv)
    args.precision = "auto"
    if args.channels % 8:
        parser.error(f"--channels {args.channels} is not a multiple of 8")
    if Path(args.out).is_dir() or not flags.writable(args.out):
        parser.error(f"cannot write --out {args.out}")
    return args


def network(args):
    """The network to time: of --channels, or of --teacher."""
    if args.teacher:
        with resume.restoring(args.teacher):
            return networks.averaged(checkpoint.load(args.teacher)).requires_grad_(True)
    torch.manual_seed(args.seed)
    net = SimpleUNet(args.channels)
    for parameter in net.parameters():              # a fresh network's zeros would make its arithmetic too easy
        torch.nn.init.normal_(parameter, std=0.02)
    return net


def parts(args, net, device, mode):
    """name -> function that does the part once, with networks of its own for this mode."""
    precision, memory_format, compiled = MODES[mode]
    teacher = copy.deepcopy(net)
    model = UnifiedModel(teacher).to(device, memory_format=memory_format)
    teacher = teacher.to(device, memory_format=memory_format)
    generator, fake_unet = model.feedforward_model, model.guidance_model.fake_unet
    sampled = copy.deepcopy(teacher).eval().requires_grad_(False)                   # as networks.averaged gives it
    bf16 = hardware.uses_bf16(device, precision)
    optimizers = {net: Optimizer(args.optimizer, {net: 1e-6}, bf16) for net in (teacher, generator, fake_unet)}
    emas = {net: EMA(net, 0.999) for net in (teacher, generator)}
    if compiled:
        torch._dynamo.config.recompile_limit = 32   # they all share one forward, each with and without gradient
        for net in (teacher, generator, fake_unet, model.guidance_model.real_unet, sampled):
            net.compile()
    rng = StepRandom(args.seed, 0, device)
    z = rng.normal(args.batch_size, 3, 32, 32).to(memory_format=memory_format)
    labels = torch.arange(args.batch_size, device=device) % max(1, net.label_dim)
    sigma = diffusion.lognormal_sigma(rng.normal(args.batch_size, 1, 1, 1))
    x_0 = torch.rand_like(z) * 2 - 1
    x_t = x_0 + sigma * z

    def update(net, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizers[net].step()
        optimizers[net].zero_grad()
        if net in emas:
            emas[net].update_parameters(net)

    def autocast():
        return hardware.autocast(device, precision)

    def teacher_step():
        with autocast():
            x0_hat = teacher(x_t, sigma, labels)
        update(teacher, (diffusion.karras_weight(sigma) * (x0_hat - x_0) ** 2).mean())

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

    @torch.no_grad()
    def sample_one_step():
        with autocast():
            diffusion.few_step_sample(sampled, z, labels, [80.0], None)

    def sample_heun():
        with autocast():
            diffusion.heun_sample(sampled, z, labels, 18)

    return dict(
        teacher_step=teacher_step, generator_turn=generator_turn, guidance_turn=guidance_turn,
        sample_one_step=sample_one_step, sample_heun=sample_heun,
    )


def milliseconds(function, device):
    """Of one call; on CUDA of five in a row by events, as the host's clock would only see the launches."""
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


def matmul_peak(device, dtype):
    """Measured FLOP/s of a large matrix product, the best of ten; in float32 where dtype is emulated."""
    n = 8192 if device.type == "cuda" else 2048
    if dtype == torch.bfloat16 and not hardware.has_fast_bf16(device):
        dtype = torch.float32                       # an emulated product, 100 times as slow, is nobody's peak
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(milliseconds(lambda: a @ b, device) / 1e3 for _ in range(10))


def main(argv=None):
    args = parse_args(argv)
    device = hardware.start(args)
    began = time.perf_counter()
    net = network(args)
    functions = {mode: parts(args, net, device, mode) for mode in args.modes}
    names = list(functions[args.modes[0]])
    flops, peak, times = {}, {}, {(mode, name): [] for mode in args.modes for name in names}
    for name, function in parts(args, net, device, "fp32").items():
        with FlopCounterMode(display=False) as counter:
            function()
        flops[name] = counter.get_total_flops()
    for mode in args.modes:
        hardware.allow_tf32(mode != "fp32")
        peak[mode] = matmul_peak(device, torch.float32 if mode == "fp32" else torch.bfloat16)
        for name in names:
            functions[mode][name]()                 # warm up; compiles
    for _ in range(args.repeats):
        for mode, name in times:
            hardware.allow_tf32(mode != "fp32")
            times[mode, name].append(milliseconds(functions[mode][name], device))

    table = {}
    for mode in args.modes:
        table[mode] = dict(matmul_gflops=round(peak[mode] / 1e9, 1))
        print(f"{mode}: matrix product {peak[mode] / 1e9:.0f} GFLOP/s")
        for name in names:
            low, median, high = statistics.quantiles(times[mode, name], n=4)
            images_per_second, share = args.batch_size / median * 1e3, flops[name] / (median / 1e3) / peak[mode]
            table[mode][name] = dict(
                ms=round(median, 2), quartiles_ms=[round(low, 2), round(high, 2)],
                images_per_second=round(images_per_second, 1), fraction_of_matmul=round(share, 3),
            )
            print(f"  {name:16} {median:10.2f} ms  {images_per_second:10.1f} images/s  {100 * share:5.1f} % of it")
    report = dict(
        what="medians and quartiles; modes in turn; fraction of this machine's measured matrix product",
        network=networks.described(net), batch_size=args.batch_size, optimizer=args.optimizer, repeats=args.repeats,
        seed=args.seed, gflop_per_image={name: round(n / args.batch_size / 1e9, 6) for name, n in flops.items()},
        modes=table, seconds=round(time.perf_counter() - began, 1),
    )
    records.write_json(args.out, report, device)
    print(args.out)


if __name__ == "__main__":
    errors.run(main)
