"""Teachers and their guides: which checkpoints the flags mean, and what is checked about them."""

import sys
from pathlib import Path

import torch

from support import checkpoint, networks, processes, resume, shapes
from support.errors import UsageError
from support.image_files import few


def path(args, say=True):
    """What --teacher means."""
    return checkpoint.or_shipped(args.teacher, "runs/teacher", "teacher.pt", say)


def fitting(args):
    """The name of the preset for the teacher of --teacher and the machine."""
    state = checkpoint.load(path(args, say=False), kind="teacher")
    preset = resume.fitting(args, figures=state["classes"] == shapes.CLASSES)
    return "edm" if preset == "cifar10_gpu" and state["model_config"].get("network") == "EDMUNet" else preset


def take_shape(args):
    """Set --channels and --blocks of train0.py to those of the teacher of --init."""
    config = checkpoint.load(args.init, kind="teacher")["model_config"]
    network = config.get("network", "SimpleUNet")
    if network != "SimpleUNet":
        raise UsageError(f"--init {args.init} holds a {network}: train0.py trains a SimpleUNet")
    with resume.restoring(args.init):
        for name in ("channels", "blocks"):
            if name in args.given and getattr(args, name) != config[name]:
                raise UsageError(f"--{name} {getattr(args, name)}: the teacher of --init has {config[name]}")
            setattr(args, name, config[name])


def begin_from(path, net, classes):
    """Give a fresh SimpleUNet the averaged weights of a teacher; of the classes, those that are called the same.

    Raises:
        CheckpointError: there is no such teacher, or it has another network.
    """
    source = checkpoint.load(path, kind="teacher")
    known = [name for name in classes if name in source["classes"]]
    with resume.restoring(path), torch.no_grad():
        rows = net.label_embedding.weight.clone()
        theirs = source["model_ema"]["label_embedding.weight"].float()
        rows[[classes.index(name) for name in known]] = theirs[[source["classes"].index(name) for name in known]]
        if source["model_config"]["sigma_data"] != net.sigma_data:
            raise ValueError(f"its sigma_data is {source['model_config']['sigma_data']}, not {net.sigma_data}")
        net.load_state_dict(dict(source["model_ema"], **{"label_embedding.weight": rows}))
    how = f", {len(known)} of {len(classes)} classes known to it"
    processes.main_only(print)(f"begins from {checkpoint.find(path)}, step {source['step']}{how}")


def begin_with_student(path, generator, classes, sigmas):
    """Give a fresh generator the averaged weights of a student that began at the same noise levels.

    Raises:
        CheckpointError: there is no such student, or it has another network.
        UsageError: it has other classes, or other noise levels.
    """
    source = checkpoint.load(path, kind="student")
    if source["classes"] != classes:
        raise UsageError(f"the classes of --init {path} are not those of the teacher")
    if source["denoising_sigmas"] != sigmas:
        raise UsageError(f"the student of --init starts at the noise levels {source['denoising_sigmas']}, not {sigmas}")
    with resume.restoring(path):
        theirs, ours = networks.described(networks.rebuild(source["model_config"])), networks.described(generator)
        if theirs != ours:
            raise ValueError(f"its network is {theirs}, the teacher's {ours}")
        generator.load_state_dict(source["model_ema"])
    processes.main_only(print)(f"begins with the student {checkpoint.find(path)}, step {source['step']}")


def load(args, state):
    """The teacher that train.py distils, checked against the flags: --teacher, or what a resumed run holds of it.

    Args:
        args: the flags of train.py.
        state: the checkpoint that the run goes on from, or None.

    Returns:
        source: the teacher's loaded checkpoint, or the run's own.
        teacher: its averaged network; of a resumed run one whose weights are still to be loaded.
        guide: the weaker teacher of --autoguidance_scale likewise, or None.

    Raises:
        UsageError, CheckpointError: the flags ask for what this teacher or this run cannot do.
    """
    source = state or checkpoint.load(args.teacher, kind="teacher")
    left_out = [] if state else leave_out(args, source)
    for name in ("sigma_min", "sigma_max"):
        if source[name] != getattr(args, name):
            raise UsageError(f"the teacher was trained with --{name} {source[name]}: give the same")
    check_cfg(args, source)
    with resume.restoring(args.run_dir if state else args.teacher):
        teacher = networks.averaged(source)
        guide = networks.rebuild(source["guide_config"]) if source.get("guide_config") else None
    if state:
        if args.autoguidance_scale != 1 and guide is None:
            raise UsageError("--autoguidance_scale cannot begin in a resumed run: it was begun without a guide")
        if (args.gen_cls_loss_weight > 0) != (source["settings"].get("gen_cls_loss_weight", 0) > 0):
            raise UsageError("--gen_cls_loss_weight cannot turn the GAN on or off in a resumed run")
        if teacher_changed(args, state) and processes.MAIN:
            print(f"note: {args.teacher} is another teacher now; the run keeps the one it began with", file=sys.stderr)
        return source, teacher, guide
    if checkpoint.find(args.teacher).resolve().parent == Path(args.run_dir).resolve():
        raise UsageError(f"--run_dir {args.run_dir} is the teacher's own folder")
    guide = load_guide(args, source, args.teacher, "cpu")
    source["teacher_digest"] = networks.digest(source["model_ema"])
    planned = source.get("settings", {}).get("steps", 0)
    step = f"step {source['step']}" + (f" of {planned}" if source["step"] < planned else "")
    classes = f"{len(source['classes'])} classes ({few(source['classes'])})"
    processes.main_only(print)("; ".join([f"teacher: {checkpoint.find(args.teacher)}, {step}, {classes}", *left_out]))
    return source, teacher, guide


def leave_out(args, source):
    """Turn off what a preset, not a flag, asks of this teacher and it cannot give; returns what to say of it."""
    guide, said = guide_path(args, args.teacher), []
    images = args.dataset or source.get("settings", {}).get("dataset")
    for name, off, missing in (
        ("cfg_scale", 1.0, not source.get("label_dropout") and "it was trained without --label_dropout"),
        ("autoguidance_scale", 1.0, guide and not Path(guide).exists() and f"there is no {checkpoint.GUIDE} beside it"),
        ("gan_steps", 0, not images and "it does not name its images (--dataset)"),
    ):
        if missing and getattr(args, name) != off and name not in args.given:
            setattr(args, name, off)
            said.append(f"no --{name}, as {missing}")
    return said


def teacher_changed(args, state):
    """Whether the checkpoint of --teacher is there and not the one that this run began with."""
    try:
        now = checkpoint.load(args.teacher, kind="teacher")
    except checkpoint.CheckpointError:
        return False
    return networks.digest(now["model_ema"]) != state.get("teacher_digest", networks.digest(now["model_ema"]))


def sampling_cfg(args, state, device):
    """Keyword arguments of diffusion.guided for a checkpoint that is sampled, from the flags of add_cfg.

    Raises UsageError if these ask for nothing, or for what the checkpoint cannot do.
    """
    scales = dict(cfg_scale=args.cfg_scale, autoguidance_scale=args.autoguidance_scale)
    for name, scale in scales.items():
        if scale != 1 and state["kind"] == "student":
            raise UsageError(f"--{name} is for teachers: a student keeps the guidance that it was distilled with")
    if args.cfg_interval and set(scales.values()) == {1}:
        raise UsageError("--cfg_interval needs a --cfg_scale or --autoguidance_scale other than 1")
    if args.guide and args.autoguidance_scale == 1:
        raise UsageError("--guide needs an --autoguidance_scale other than 1")
    check_cfg(args, state)
    return dict(scales, cfg_interval=args.cfg_interval, guide=load_guide(args, state, args.checkpoint, device))


def guide_path(args, teacher):
    """Where the weaker teacher is that --autoguidance_scale asks for, or None where it asks for none."""
    if args.autoguidance_scale == 1:
        return None
    return args.guide or checkpoint.find(teacher).with_name(checkpoint.GUIDE)


def load_guide(args, state, teacher, device):
    """The network at guide_path, for the teacher at a path with this state; None where there is none.

    Raises:
        UsageError: it has other classes.
        CheckpointError: there is no teacher.
    """
    path = guide_path(args, teacher)
    if path is None:
        return None
    if not args.guide and not path.exists():
        raise UsageError(f"--autoguidance_scale needs a weaker teacher, and there is no {path}: give --guide, or 1")
    guide = checkpoint.load(path, kind="teacher")
    if guide["classes"] != state["classes"]:
        raise UsageError(f"the classes of --guide {path} are not those of the teacher")
    with resume.restoring(path):
        return networks.averaged(guide, device)


def check_cfg(args, state):
    """Raises UsageError if --cfg_scale or --cfg_interval ask for what the checkpoint's network cannot do."""
    if args.cfg_interval and args.cfg_interval[0] >= args.cfg_interval[1]:
        raise UsageError("--cfg_interval {} {}: the first is not below the second".format(*args.cfg_interval))
    if args.cfg_scale != 1 and not state.get("label_dropout"):
        raise UsageError(f"--cfg_scale {args.cfg_scale} needs a teacher trained with --label_dropout above 0")
