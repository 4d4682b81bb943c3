"""The flags of the four scripts, and what is checked about those of a training.

    args, state = settings.parse_teacher(argv)      # state: the checkpoint to resume from, or None
    args, state = settings.parse_student(argv)

Named sets of defaults: presets.py. The flags that several scripts have: support/flags.py. Loading this file loads no
torch, which takes seconds, so that --help and wrong flags need not wait for it.
"""

import constants
import presets
from support import flags

LEAST_IMAGES = 256                                  # that evaluate.py measures
# Flags that must not change when a run is resumed.
TEACHER_FIXED = ("dataset", "image_size", "channels", "blocks", "seed", "optimizer")
STUDENT_FIXED = ("teacher", "guide", "dataset", "seed", "optimizer", "conditioning_sigma", "num_denoising_steps",
                 "fit_steps", "gan_steps", "gan_features")


def teacher_parser(argv=None):
    """The parser of train0.py, with the values of the preset that argv names."""
    parser = flags.Parser(description="Train the diffusion teacher.")
    flags.add_dataset(parser)
    add = flags.add_training(
        parser, presets.TEACHER, run_dir="runs/teacher", steps=50_000, batch_size=256, sample_every=2500,
        save_every=1000,
    ).add_argument
    parser.set_defaults(lr_schedule="cosine")
    add("--lr", type=flags.rate, default=1e-3, help="peak learning rate")
    add("--ema_decay", type=flags.number(float, 0, 1), default=0.9995, help="per step; smaller early in a run")
    add("--p_mean", type=flags.number(float, -7, 7), default=-1.2, help="mean of ln(sigma)")
    add("--p_std", type=flags.number(float, 0, 4), default=1.2, help="standard deviation of ln(sigma)")
    schedule = "of the Karras schedule; images span [-1, 1]"
    add("--sigma_min", type=flags.noise, default=constants.SIGMA_MIN, help=f"lowest noise {schedule}")
    add("--sigma_max", type=flags.noise, default=constants.SIGMA_MAX, help=f"highest noise {schedule}")
    network = parser.add_argument_group("the network")
    add = network.add_argument
    flags.add_image_size(network)
    flags.add_channels(network)
    add("--blocks", type=flags.count, default=1, help="residual blocks per level")
    add("--init", type=flags.path, help="a teacher to start from; classes that it does not know start at random; "
        "images have its size unless --image_size is given; default: none")
    add = parser.add_argument_group("for guided sampling and distillation later").add_argument
    add("--label_dropout", type=flags.fraction, default=0.0, help="fraction of the images trained without their class")
    add("--guide_at", type=flags.fraction, default=0.3333,
        help="fraction of the steps after which the EMA is kept as guide.pt, for autoguidance, once in a run; 0: never")
    flags.add_measuring(parser)
    return parser.take_preset(presets.TEACHER, argv)


def parse_teacher(argv=None):
    """The flags of train0.py, and the checkpoint to resume from or None."""
    from support import data, resume, teachers

    parser = teacher_parser(argv)

    def choose(args):
        preset = parser.preset or resume.choose_preset(args, args.dataset == "shapes", args.image_size)
        return preset, presets.TEACHER.get(preset, {})

    args, state = resume.parse(parser, "teacher", choose, argv, TEACHER_FIXED)
    args.flip = data.named(args, state)[2]
    if args.init and not state:
        teachers.take_shape(args)
    if args.sigma_min >= args.sigma_max:
        parser.error(f"--sigma_min {args.sigma_min} is not below --sigma_max {args.sigma_max}")
    return args, state


def add_method(parser, add):
    """Flags of DMD2 and of the phases around it. add: add_argument of the group about learning.

    Returns the group of the real images, for a script to add its own.
    """
    add("--generator_lr", type=flags.rate, default=1e-4, help="learning rate of feedforward_model")
    add("--guidance_lr", type=flags.rate, default=2e-4, help="learning rate of fake_unet")
    add("--ema_decay", type=flags.fraction, default=0.999, help="per generator update; smaller early in a run")
    add = parser.add_argument_group("the generator").add_argument
    add("--conditioning_sigma", type=flags.noise, default=80.0, help="noise level (sigma) of the generator's input")
    add("--num_denoising_steps", type=flags.number(int, 1, 100), default=1, help="evaluations per image of the student")
    add("--dfake_gen_update_ratio", type=flags.count, default=10, help="guidance turns per generator turn")
    add = parser.add_argument_group("the fit, the first phase: regression on the teacher's ODE pairs").add_argument
    add("--fit_steps", type=flags.natural, default=0, help="steps of this phase; 0: none")
    add("--ode_pairs", type=flags.count, default=2048, help="pairs of noise and the image that the teacher makes of it")
    add = parser.add_argument_group("the distribution matching (DM) loss").add_argument
    noise = "noise of the DM loss, as a fraction of the 1000 Karras steps"
    add("--min_step_percent", type=flags.fraction, default=0.02, help=f"lowest {noise}")
    add("--max_step_percent", type=flags.fraction, default=0.98, help=f"highest {noise}")
    add("--fake_noise", choices=["all", "dm"], default="all",
        help="noise that fake_unet learns: all 1000 steps, as in the paper, or only the range of the DM loss")
    flags.add_cfg(parser.add_argument_group("guidance of the teacher"), "real_unet")
    add = parser.add_argument_group("the classifier head on fake_unet, which trains beside the DM loss").add_argument
    add("--gen_cls_loss_weight", type=flags.weight, default=0.0,
        help="weight of its loss in the generator turn, 3e-3 in the paper; 0: no head, and no real images needed")
    add("--cls_loss_weight", type=flags.weight, default=1e-2, help="weight of its loss in the guidance turn")
    add("--cls_head_lr", type=flags.rate, help="learning rate of the classifier head; default: guidance_lr")
    add = parser.add_argument_group("the GAN, the last phase: a discriminator on frozen features").add_argument
    add("--gan_steps", type=flags.natural, default=0,
        help="steps of this phase, over which the student's weights are averaged, late ones more; 0: none")
    add("--discriminator_warmup_steps", type=flags.natural, default=100,
        help="first steps of this phase, in which only the discriminator trains")
    add("--gan_features", type=flags.path,
        help="a classifier of tools.features whose activations the discriminator reads; default: the teacher's")
    add("--gan_lr", type=flags.rate, default=3e-5, help="learning rate of feedforward_model in this phase")
    add("--discriminator_lr", type=flags.rate, default=1e-3, help="learning rate of the discriminator")
    real = parser.add_argument_group("real images for both, by default the teacher's training images")
    real.add_argument(
        "--diffusion_gan_max_timestep", type=flags.number(int, 0, constants.NUM_TRAIN_TIMESTEPS), default=1000,
        help="the head, and the discriminator on the teacher's features, see images noised to a random timestep "
        "below this one of 1000; 0: without noise",
    )
    return real


def student_parser(argv=None):
    """The parser of train.py, with the values of the preset that argv names."""
    parser = flags.Parser(description="Distil the teacher into a one-step generator.")
    parser.add_argument(
        "--teacher", type=flags.path, default="runs/teacher", help="run folder or checkpoint, or a .pkl of EDM's"
    )
    add = flags.add_training(
        parser, presets.STUDENT, run_dir="runs/dmd2", steps=50_000, batch_size=256, sample_every=1000, save_every=1000
    ).add_argument
    add("--init", type=flags.path, help="a student to start from; default: the teacher's weights")
    real = add_method(parser, add)
    flags.add_dataset(real, dataset=None, data_dir=None)
    flags.add_measuring(parser)
    return parser.take_preset(presets.STUDENT, argv)


def parse_student(argv=None):
    """The flags of train.py, and the checkpoint to resume from or None."""
    from support import processes, resume, teachers

    parser, changed = student_parser(argv), []

    def choose(args):
        chosen, size, schedule = teachers.choose_preset(args)
        preset = parser.preset or chosen
        plain, values = presets.STUDENT.get(preset, {}), presets.for_size(preset, size, schedule)
        changed.extend(name for name, value in values.items() if value != plain[name])
        return preset, values

    args, state = resume.parse(parser, "student", choose, argv, STUDENT_FIXED)
    if changed := [f"{name} {getattr(args, name)}" for name in changed if name not in args.given]:
        processes.main_only(print)(f"its noise levels for images of this size: {', '.join(changed)}")
    check_student(args, state, parser.error)
    if state is None:
        args.teacher = teachers.path(args)
    return args, state


def check_student(args, state, refuse):
    """Refuse flags that exclude one another, or that this resumed run cannot change."""
    if args.guide and args.autoguidance_scale == 1 and state is None:
        refuse("--guide needs an --autoguidance_scale other than 1")
    if args.gen_cls_loss_weight and not args.cls_loss_weight:
        refuse("--cls_loss_weight 0 would leave the classifier head untrained")
    if args.min_step_percent > args.max_step_percent:
        refuse(f"--min_step_percent {args.min_step_percent} is above --max_step_percent {args.max_step_percent}")
    if args.gan_features and not args.gan_steps:
        refuse("--gan_features needs --gan_steps above 0")
    if args.fit_steps + args.gan_steps > args.steps:
        phases = f"--fit_steps {args.fit_steps} and --gan_steps {args.gan_steps}"
        refuse(f"{phases} are more than --steps {args.steps}, which counts all phases")
    if 0 < args.gan_steps <= args.discriminator_warmup_steps:
        warmup = f"--discriminator_warmup_steps {args.discriminator_warmup_steps}"
        refuse(f"--gan_steps {args.gan_steps} must exceed {warmup}: the generator would not train")
    if state and args.num_denoising_steps > 1 and not any("later_fakes" in name for name in state["model"]):
        refuse("the evaluations of this run shared one fake_unet, and now each has its own: start a new run from this "
               "student instead, with --init")
    before = state["settings"] if state else vars(args)
    if (args.gen_cls_loss_weight > 0) != (before["gen_cls_loss_weight"] > 0):
        refuse("--gen_cls_loss_weight cannot add or remove the classifier head in a resumed run")
    if args.gan_steps and args.steps != before["steps"]:
        gan_start = min(args.steps, before["steps"]) - args.gan_steps
        if state["step"] > gan_start:               # the phase's warm-up and average begin with its first step
            refuse(f"--steps {args.steps}: with --gan_steps {args.gan_steps} the GAN phase would begin at another step "
                   "than it did, or has passed; start a new run from this student instead, with --init")


def sample_parser():
    """The parser of sample.py."""
    parser = flags.Parser(description="Sample a checkpoint into a grid of images.")
    flags.add_common(parser)
    # For exactness: in bf16 an image would depend a little on the batch it is made in.
    parser.set_defaults(precision="fp32")
    parser.add_argument(
        "--checkpoint", type=flags.path, default="runs/dmd2",
        help="run folder or checkpoint of a student or a teacher, or a .pkl of EDM's",
    )
    parser.add_argument(
        "--out", type=flags.output(suffix=".png"), default="grid.png", help="the grid, a PNG: one class per row"
    )
    parser.add_argument(
        "--npz", type=flags.output(),
        help="also all images: arr_0 uint8 [N, H, W, 3], arr_1 labels [N]; default: none",
    )
    parser.add_argument(
        "--images", type=flags.output("folder", new=True),
        help="also a new or empty folder for single images, DIR/<class>_<index>.png; default: none",
    )
    parser.add_argument(
        "--walk", type=flags.output(suffix=".gif"),
        help="also a GIF: the noise moves to that of --seed + 1 and back; default: none",
    )
    parser.add_argument("--num_images", type=flags.count, default=100, help="images in all")
    parser.add_argument(
        "--batch_size", type=flags.count, default=100, help="images at a time; affects rounding only"
    )
    parser.add_argument("--labels", nargs="+", help="classes by number or name, one row each; default: all")
    flags.add_sampling(parser)
    return parser


def evaluate_parser():
    """The parser of evaluate.py."""
    parser = flags.Parser(description="Measure a checkpoint, or images made elsewhere, against a dataset.")
    flags.add_common(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", type=flags.path, default="runs/dmd2",
        help="run folder or checkpoint of a student or a teacher, or a .pkl of EDM's",
    )
    source.add_argument(
        "--npz", type=flags.path,
        help="images of arr_0, uint8 [N, H, W, 3], labels of arr_1 if there; default: the checkpoint's images",
    )
    source.add_argument(
        "--images", type=flags.path, help="a folder of images, however deep; default: the checkpoint's images"
    )
    flags.add_image_size(
        parser, None, "height and width of the images of --npz, or to which those of --images are resized; default: 32"
    )
    real = parser.add_argument_group("real images, by default those of the checkpoint's training")
    flags.add_dataset(real, None, None, flip=False)
    parser.add_argument("--split", choices=["train", "test"], default="train", help="of the dataset")
    parser.add_argument(
        "--num_images", type=flags.number(int, LEAST_IMAGES), default=50_000, help="images to make, of a checkpoint"
    )
    parser.add_argument(
        "--batch_size", type=flags.count, default=250, help="images at a time; moves nothing but roundings",
    )
    parser.add_argument("--repeats", type=flags.count, default=1, help="times, with seeds --seed, --seed + 1, ...")
    flags.add_sampling(parser)
    parser.add_argument(
        "--neighbours", type=flags.number(int, LEAST_IMAGES), help="images of each set that precision and recall look "
        "at, in a time that grows with its square: minutes for 50,000 on a CPU; default: all, as torch-fidelity"
    )
    flags.add_features(parser)
    parser.add_argument("--out", type=flags.output(), default="runs/evaluation.json", help="the JSON")
    return parser
