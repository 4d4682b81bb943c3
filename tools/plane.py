"""DMD2 on a plane: points instead of images, which show in half a minute what a loss does.

    python -m tools.plane                                       # eight Gaussians, into runs/plane.gif and plane.png
    python -m tools.plane --data grid --seeds 0 1 2             # three runs: mean and deviation
    python -m tools.plane --without fake_unet                   # what goes wrong without it
    python -m tools.plane --teacher wrong --gan_steps 400       # real points correct a teacher that is wrong
    python -m tools.plane --data moons --cfg_scale 2 --num_denoising_steps 2

Networks, losses and phases are those of the project: model.py's preconditioning around a small MLP, guidance.py,
unified_model.py, fit.py, train.py and gan.py. The flags that train.py has too mean the same. The teacher is exact, the
data's own denoiser in closed form, unless --teacher says otherwise.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import settings
import train
import train0
from gan import Discriminator
from model import Denoiser
from phases import current
from support import errors, files, flags, plots, processes, records
from support.ema import EMA
from support.optimizers import Optimizer
from support.points import MIXTURES, Mixture, sliced_distance
from support.randomness import StepRandom
from unified_model import UnifiedModel

DATA_SEED, PAIRS_SEED, EVAL_SEED = 2**20, 2**21, 2**22          # away from that of the training steps
TEACHER_STEPS, TEACHER_BATCH = 1500, 512
EVAL_POINTS, ARROWS, ARROW_SIGMA = 4096, 160, 0.3
FRAMES = 40
NAMES = dict(Fit="the fit", DMD2="DMD2's two turns", GAN="the GAN")


class PointNet(Denoiser):
    """A denoiser of points [B, 2, 1, 1]: an MLP of three layers with EDM's preconditioning.

    Args:
        width: of its layers.
        label_dim: number of classes.
    """

    bottleneck_size = 1

    def __init__(self, width, label_dim):
        super().__init__()
        self.config, self.label_dim, self.sigma_data = dict(width=width, label_dim=label_dim), label_dim, 0.5
        self.feature_channels = [width] * 3
        self.register_buffer("freqs", torch.logspace(0, 4, 16, base=2))
        self.label_embedding = nn.Embedding(label_dim, width)
        self.embedding = nn.Linear(2 * len(self.freqs), width)
        self.stem = nn.Linear(2, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, 2)

    def network(self, x, c_noise, labels, return_features=False):
        angles = c_noise[:, None] * self.freqs                                      # [B, 16]
        emb = self.embedding(torch.cat([angles.cos(), angles.sin()], 1))            # [B, width]
        emb = emb + self.label_embedding(labels.clamp(min=0)) * (labels >= 0)[:, None]
        h, features = self.stem(x.flatten(1)), []
        for layer in self.layers:
            h = h + layer(F.silu(h + emb))                                          # [B, width]
            features.append(h[:, :, None, None])
        return features if return_features else self.out(F.silu(h))[:, :, None, None]


def train_teacher(data, width, seed, label_dropout=0.1):
    """A PointNet that has learned to denoise the data's points, by the step of train0.py; its EMA."""
    torch.manual_seed(seed)
    net = PointNet(width, data.num_classes)
    ema = EMA(net, 0.99)
    denoising = train0.Denoising(
        net, ema, Optimizer("adam", {net: 3e-3}), p_mean=-0.8, p_std=1.4, label_dropout=label_dropout, flip=False
    )
    for step in range(TEACHER_STEPS):
        points = data.sample(TEACHER_BATCH, StepRandom(seed + DATA_SEED, step))
        denoising.train_step([StepRandom(seed, step)], *points, 1 - step / TEACHER_STEPS)
    return ema.module


def wrong(data):
    """The data as a bad teacher knows it: of each class, every second mode has a tenth of its weight."""
    weights = data.weights.clone()
    for label in range(data.num_classes):
        rare = data.modes[data.classes == label].unique()[1::2]
        weights[torch.isin(data.modes, rare)] /= 10
    return Mixture(data.means, data.stds, weights.tolist(), data.classes.tolist(), data.modes.tolist())


class NoFake(nn.Module):
    """Replaces fake_unet: p_fake = 0, so only the teacher acts."""

    def __init__(self, guidance):
        super().__init__()
        self.ignored = nn.Parameter(torch.zeros(()))
        add_noise = guidance.add_noise

        def remember(x, *args):
            self.clean = x.detach()
            return add_noise(x, *args)

        guidance.add_noise = remember

    def forward(self, x_t, sigma, labels):
        return self.clean + 0 * self.ignored


class PointPairs:
    """ODE pairs as support.pairs.Pairs, of points: step -> z, labels, x_ode."""

    def __init__(self, model, num_pairs, num_classes, batch_size, seed):
        self.model, self.num_classes, self.batch_size, self.seed = model, num_classes, batch_size, seed + PAIRS_SEED
        self.num_batches, self.made = -(-num_pairs // batch_size), {}

    def __call__(self, step, *share):
        batch = step % self.num_batches
        if batch not in self.made:
            rng = StepRandom(self.seed, batch)
            z, labels = self.model.random_inputs(self.batch_size, self.num_classes, rng)
            self.made[batch] = z, labels, self.model.guidance_model.sample_teacher(z, labels, num_steps=18)
        return self.made[batch]


class Distillation:
    """A student on the plane: its model and phases, by the flags of parse_args."""

    def __init__(self, args, seed):
        self.args, self.seed, self.data = args, seed, MIXTURES[args.data]()
        known = wrong(self.data) if args.teacher == "wrong" else self.data
        net = train_teacher(known, args.width, seed)
        torch.manual_seed(seed)                     # of the classifier head and the discriminator
        self.model = UnifiedModel(
            net, args.conditioning_sigma, args.num_denoising_steps, shape=(2, 1, 1),
            min_step_percent=args.min_step_percent, max_step_percent=args.max_step_percent, cfg_scale=args.cfg_scale,
            cfg_interval=args.cfg_interval, fake_noise=args.fake_noise, cls_head=args.gen_cls_loss_weight > 0,
            diffusion_gan_max_timestep=args.diffusion_gan_max_timestep,
        )
        guidance = self.guidance = self.model.guidance_model
        classes, evaluations = self.data.num_classes, args.num_denoising_steps
        discriminator = Discriminator(net.feature_channels, classes, evaluations) if args.gan_steps else None
        if args.teacher != "trained":               # the features, for the discriminator, stay the MLP's
            guidance.real_unet = Exact(known, guidance.real_unet).eval().requires_grad_(False)
        if args.without == "fake_unet":
            guidance.fake_unet = NoFake(guidance)   # one for all evaluations, as it learns nothing
            guidance.later_fakes = nn.ModuleList([guidance.fake_unet] * (evaluations - 1))
        self.ema = EMA(self.model.feedforward_model, args.ema_decay)
        pairs = PointPairs(self.model, args.ode_pairs, self.data.num_classes, args.batch_size, seed)
        self.phases = train.make_phases(
            args, self.model, discriminator, self.ema, pairs, self.data.num_classes, torch.device("cpu"))
        rng = StepRandom(seed + EVAL_SEED, 0)
        self.real, self.labels = self.data.sample(EVAL_POINTS, rng)
        self.z = rng.normal(EVAL_POINTS, 2, 1, 1)
        self.eps = rng.normal(16, ARROWS, 2, 1, 1)

    def step(self, step):
        """One step of the training. Returns the phase that it belongs to, and its log."""
        phase, i = current(self.phases, step)
        rng = StepRandom(self.seed + DATA_SEED, step)
        real = self.data.sample(self.args.batch_size, rng) if phase.needs_images else ()
        shares = processes.shares(self.args.accumulate)
        return phase, phase.step(i, [StepRandom(self.seed, step, "cpu", *share) for share in shares], *real)

    @torch.no_grad()
    def points(self):
        """Points of the generator's EMA for a fixed noise, [4096, 2, 1, 1]; classes as in the data."""
        rng, generator = StepRandom(self.seed + EVAL_SEED, 1), self.model.feedforward_model
        self.model.feedforward_model = self.ema.module
        try:
            return self.model.generate(self.z, self.labels, rng, self.args.num_denoising_steps)
        finally:
            self.model.feedforward_model = generator

    @torch.no_grad()
    def arrows(self, x):
        """Where the DM gradient moves points [N, 2, 1, 1] at one noise level: mean of real(x_t) - fake(x_t), [N, 2]."""
        labels, moves, sigma = self.labels[: len(x)], 0, torch.tensor(ARROW_SIGMA)
        for eps in self.eps:
            x_t = x + sigma * eps
            if self.args.without == "fake_unet":
                self.guidance.fake_unet.clean = x
            real, fake = self.guidance.guided_teacher(), self.guidance.fakes[-1]    # x are final points
            moves = moves + real(x_t, sigma, labels) - fake(x_t, sigma, labels)
        return moves.flatten(1) / len(self.eps)

    def measure(self, x):
        """Of points [4096, 2, 1, 1]: distance to the data, modes with a fifth of their true share, all shares."""
        shares, true = self.data.mode_shares(x), self.data.true_shares()
        modes = int((shares > true / 5).sum())
        return dict(distance=sliced_distance(x, self.real), modes=modes, shares=shares.tolist())


class Exact(nn.Module):
    """The exact denoiser of a mixture, with the features of a trained network for the discriminator."""

    def __init__(self, mixture, net):
        super().__init__()
        self.mixture, self.net = mixture, net

    def forward(self, x_t, sigma, labels, return_features=False):
        if return_features:
            return self.net(x_t, sigma, labels, return_features=True)
        return self.mixture(x_t, sigma, labels)


def parse_args(argv=None):
    parser = flags.Parser(prog="python -m tools.plane", description="Distil a teacher of points on a plane.")
    add = parser.add_argument
    add("--data", choices=list(MIXTURES), default="circle", help="the distribution of the points")
    add("--teacher", choices=["exact", "trained", "wrong"], default="exact",
        help="exact: the data's denoiser; trained: an MLP; wrong: exact, but of data whose every second mode is rare")
    add("--without", choices=["fake_unet"], help="leave this out; default: nothing")
    add("--seeds", type=flags.natural, nargs="+", default=[0], help="a run each; the pictures are of the first")
    add("--width", type=flags.number(int, 8), default=64, help="of the MLPs, a multiple of 8")
    add("--steps", type=flags.count, default=2500, help="of the student, in all phases")
    add("--out", type=flags.output(suffix=".gif"), default="runs/plane.gif",
        help="the animation; its last frame goes beside it as .png")
    add("--strip", type=flags.output(suffix=".png"),
        help="also the points at the start and at the end of each phase, side by side; default: none")
    add("--json", type=flags.output(), help="also a JSON of what was measured; default: none")
    add("--animate", action=argparse.BooleanOptionalAction, default=True, help="--no-animate: only the last frame")
    learning = flags.add_learning(parser, batch_size=256)
    settings.add_method(parser, learning.add_argument)
    parser.set_defaults(
        generator_lr=1e-3, guidance_lr=2e-3, ema_decay=0.98, dfake_gen_update_ratio=2, warmup_steps=20,
        lr_schedule="cosine", gan_lr=2e-4, discriminator_warmup_steps=100, max_step_percent=0.8,
    )
    args = parser.parse_args(argv)
    if args.width % 8:
        parser.error(f"--width {args.width} is not a multiple of 8")
    if args.autoguidance_scale != 1 or args.guide:
        parser.error("--autoguidance_scale and --guide: there is no weaker teacher on the plane")
    if args.optimizer == "muon":
        parser.error("--optimizer muon is for convolutions, and the MLPs of the plane have none")
    if args.accumulate > 1 and args.batch_size % args.accumulate:
        parser.error(f"--accumulate {args.accumulate} does not divide --batch_size {args.batch_size}")
    if args.without == "fake_unet" and args.gen_cls_loss_weight:
        parser.error("--without fake_unet leaves no place for the classifier head of --gen_cls_loss_weight")
    settings.check_student(args, None, parser.error)
    vars(args).update(flip=False, precision="fp32", compile=False, record=False)
    return args


def run(args, seed, draw):
    """One training. Returns its last measurement; draw(student, step, phase, x, history) is called FRAMES times."""
    student, history = Distillation(args, seed), []
    every, ends = max(1, args.steps // FRAMES), {phase.start + phase.steps for phase in student.phases}
    phase = student.phases[0]
    for step in range(args.steps + 1):
        if step % every == 0 or step in ends:
            x = student.points()
            history.append(dict(step=step, **student.measure(x)))
            draw(student, step, phase, x, history)
        if step < args.steps:
            phase, _ = student.step(step)
    x, data = student.points(), student.data
    error = max(abs(a - b) for a, b in zip(history[-1]["shares"], data.true_shares().tolist(), strict=True))
    floor = sliced_distance(data.sample(EVAL_POINTS, StepRandom(seed + EVAL_SEED, 2))[0], student.real)
    outside = 1 - sum(history[-1]["shares"])
    return dict(history[-1], width=data.width_ratio(x), error=error, outside=outside, floor=floor,
                num_modes=data.num_modes)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)                        # matrices are small: threads would only wait for one another
    frames, strip, found = [], [], []

    def draw(student, step, phase, x, history):
        if seed != args.seeds[0]:
            return
        if step == args.steps or args.animate:
            frames.append(picture(args, student, step, phase, x, history))
        if args.strip and step in (0, phase.start + phase.steps):
            canvas = plots.Canvas(300, 330)
            canvas.text((8, 8), f"after {NAMES.get(type(phase).__name__, type(phase).__name__)}" if step else "start")
            draw_points(canvas, (5, 30, 295, 320), student, x)
            strip.append(canvas.image())

    for seed in args.seeds:
        began = time.perf_counter()
        found.append(dict(run(args, seed, draw), seed=seed))
        last = found[-1]
        print(f"{args.data}, seed {seed}: distance {last['distance']:.4f} (data against data {last['floor']:.4f}), "
              f"{last['modes']} of {last['num_modes']} modes, error of a share {last['error']:.3f}, width "
              f"{last['width']:.2f} of the data's, outside {last['outside']:.3f}; {time.perf_counter() - began:.0f} s",
              flush=True)
    if len(found) > 1:
        for name in ("distance", "modes", "error", "width", "outside"):
            values = [float(row[name]) for row in found]
            print(f"{name} {statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}")
    if args.json:
        report = dict(what="tools.plane: distances of the student's points to the data", runs=found)
        records.write_json(args.json, report, torch.device("cpu"))
    still = str(Path(args.out).with_suffix(".png"))
    files.write(still, lambda file: frames[-1].save(file, format="png", optimize=True))
    if args.animate:
        files.write(args.out, lambda file: plots.save_gif(frames, file))
    if args.strip:
        files.write(args.strip, lambda file: plots.side_by_side(strip).save(file, format="png", optimize=True))
    print(", ".join([still, *([args.out] if args.animate else []), *([args.strip] if args.strip else [])]))


def draw_points(canvas, corners, student, x):
    """The data's density, the student's points, and where the DM gradient moves some of them."""
    plane = canvas.axes(corners, (-1.25, 1.25), (-1.25, 1.25))
    plane.density(student.data.density)
    plane.points(x[:1500].flatten(1).tolist())
    plane.arrows(x[:ARROWS].flatten(1).tolist(), (2 * student.arrows(x[:ARROWS])).tolist())


def picture(args, student, step, phase, x, history):
    """One frame: the points, and below them the curves so far."""
    canvas, last = plots.Canvas(400, 540), history[-1]
    draw_points(canvas, (8, 28, 392, 412), student, x)
    canvas.text((10, 8), f"step {step} of {args.steps}: {NAMES.get(type(phase).__name__, type(phase).__name__)}    "
                f"distance {last['distance']:.3f}    modes {last['modes']} of {student.data.num_modes}", size=12)
    canvas.curve((8, 434, 192, 532), "distance to the data (log)", [row["step"] for row in history],
                 [row["distance"] for row in history], args.steps, log=True)
    canvas.bars((208, 434, 392, 532), "share of each mode; line: the data's", last["shares"],
                student.data.true_shares().tolist())
    return canvas.image()


if __name__ == "__main__":
    errors.run(main)
