"""The DM gradient in pictures: what real_unet and fake_unet make of a student's images at five noise levels.

    python -m tools.gradient --out gradient.png                 # of the shipped teacher and student
    python -m tools.gradient --teacher runs/teacher --student runs/dmd2 --start start.png

fake_unet is trained here, by --steps guidance turns on the student's images, as the shipped checkpoint has none.
"""

import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")       # which torch reads when it is loaded

import torch
from tqdm import tqdm

from support import checkpoint, errors, files, flags, hardware, networks, pictures, processes, resume, teachers
from support.optimizers import Optimizer
from support.randomness import StepRandom, image_noise
from unified_model import UnifiedModel

SIGMAS = (0.1, 0.3, 0.7, 1.5, 4.0)
COLUMNS = "x_gen, x_t, real_unet(x_t), fake_unet(x_t), and the difference real - fake"


def parse_args(argv=None):
    parser = flags.Parser(prog="python -m tools.gradient", description="Draw the DM gradient at five noise levels.")
    flags.add_common(parser)
    parser.add_argument("--teacher", type=flags.path, default="runs/teacher", help="run folder or checkpoint")
    parser.add_argument("--student", type=flags.path, default="runs/dmd2", help="run folder or checkpoint")
    parser.add_argument("--steps", type=flags.natural, default=100, help="guidance turns that train fake_unet")
    parser.add_argument("--batch_size", type=flags.count, default=64, help="images per guidance turn")
    parser.add_argument("--guidance_lr", type=flags.rate, default=1e-3, help="learning rate of fake_unet")
    parser.add_argument("--label", type=flags.natural, default=1, help="the class to draw")
    flags.add_cfg(parser, "real_unet")
    parser.add_argument(
        "--out", type=flags.output(suffix=".png"), default="gradient.png", help=f"a row per noise level: {COLUMNS}"
    )
    parser.add_argument(
        "--start", type=flags.output(suffix=".png"),
        help="also one evaluation of the teacher beside the student's image of the same noise, a row per class; "
        "default: none",
    )
    args = parser.parse_args(argv)
    if args.autoguidance_scale != 1 or args.guide:
        parser.error("--autoguidance_scale and --guide are not for this picture")
    args.teacher = checkpoint.or_shipped(args.teacher, "runs/teacher", "teacher.pt")
    args.student = checkpoint.or_shipped(args.student, "runs/dmd2", "student.pt")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = hardware.start(args)
    teacher, student = checkpoint.load(args.teacher, kind="teacher"), checkpoint.load(args.student, kind="student")
    if student["classes"] != teacher["classes"]:
        raise errors.UsageError("--student and --teacher have different classes")
    if args.label >= len(teacher["classes"]):
        raise errors.UsageError(f"--label {args.label}: the classes are 0..{len(teacher['classes']) - 1}")
    teachers.check_cfg(args, teacher)
    if networks.image_size(student["model_config"]) != networks.image_size(teacher["model_config"]):
        raise errors.UsageError("--student and --teacher make images of different sizes")
    levels = student["denoising_sigmas"]
    with resume.restoring(args.student):
        model = UnifiedModel(
            networks.averaged(teacher), levels[0], sigma_min=teacher["sigma_min"], sigma_max=teacher["sigma_max"],
            cfg_scale=args.cfg_scale, cfg_interval=args.cfg_interval,
        ).to(device, memory_format=torch.channels_last)
        model.denoising_sigmas = levels             # one fake_unet, as only the last evaluation's images are drawn
        model.feedforward_model.load_state_dict(student["model_ema"])
    guidance, num_classes = model.guidance_model, len(teacher["classes"])

    # --- fake_unet learns to denoise the student's images ------------------------------------------------------------
    for network in (model.feedforward_model, guidance.fake_unet, guidance.real_unet) if args.compile else ():
        network.compile(dynamic=False)
    bf16, fp16 = hardware.uses_bf16(device, args.precision), args.precision == "fp16"
    optimizer = Optimizer("muon", {guidance.fake_unet: args.guidance_lr}, bf16, fp16)
    for step in tqdm(range(args.steps), unit="step", disable=not processes.MAIN):
        rng = StepRandom(args.seed, step, device)
        z, labels = model.random_inputs(args.batch_size, num_classes, rng)
        with torch.no_grad(), hardware.autocast(device, args.precision):
            x_gen = model.generate(z, labels, rng, len(levels))
        optimizer.zero_grad()
        with hardware.autocast(device, args.precision):
            losses, _ = model.guidance_turn(x_gen, labels, rng)
        optimizer.backward(losses["loss_fake"])
        optimizer.clip(10.0)
        optimizer.step(1 - step / args.steps)

    # --- the pictures ------------------------------------------------------------------------------------------------
    def noise(draw, n):
        return image_noise(args.seed, range(n), model.shape[-1], draw).to(device)

    with torch.no_grad(), hardware.autocast(device, args.precision):
        labels = torch.full((2,), args.label, device=device)
        x_gen, panels = model.generate(noise(0, 2), labels, StepRandom(args.seed, 0, device), len(levels)), []
        for i, sigma in enumerate(SIGMAS):
            x_t = x_gen + sigma * noise(10 + i, 2)
            real, fake = guidance.guided_teacher()(x_t, sigma, labels), guidance.fake_unet(x_t, sigma, labels)
            difference = real - fake
            panels += [x_gen, x_t / (1 + sigma**2) ** 0.5, real, fake, difference / 3 / difference.std()]
        # class_grid takes its images column by column.
        panels = torch.stack(panels, 1).unflatten(1, (len(SIGMAS), -1)).transpose(1, 2)         # [2, 5, 5, 3, H, W]
        grids = [pictures.class_grid(panel.flatten(0, 1), len(SIGMAS)) for panel in panels]
        large = pictures.side_by_side(*grids).repeat_interleave(2, 1).repeat_interleave(2, 2)
        files.write(args.out, lambda file: pictures.save_png(large, file))
        if args.start:
            rows, labels, draw = pictures.grid_inputs(args.seed, num_classes, model.shape[-1], device)
            z = draw(0)
            first = guidance.real_unet(levels[0] * z, levels[0], labels)            # the teacher's own single step
            made = model.generate(z, labels, StepRandom(args.seed, 0, device), len(levels))
            start = pictures.side_by_side(*(pictures.class_grid(x, rows) for x in (first, made)))
            files.write(args.start, lambda file: pictures.save_png(start, file))
    print(", ".join(filter(None, (args.out, args.start))))


if __name__ == "__main__":
    errors.run(main)
