"""Teachers and their guides: which checkpoints the flags name, and what is checked about them."""

import sys
from pathlib import Path

import torch

from model import SimpleUNet
from support import checkpoint, networks, processes, resume, shapes
from support.errors import UsageError
from support.image_files import few, number


def path(args, say=True):
    """The checkpoint that --teacher names."""
    return checkpoint.or_shipped(args.teacher, "runs/teacher", "teacher.pt", say)


def choose_preset(args):
    """The student's preset for the teacher of --teacher and the machine; its image size; its least and most noise."""
    state = checkpoint.load(path(args, say=False), kind="teacher")
    config = state["model_config"]
    with resume.restoring(args.teacher):
        size = networks.image_size(config)
    preset = resume.choose_preset(args, state["classes"] == shapes.CLASSES, size)
    if preset == "cifar10_gpu" and config.get("network") == "EDMUNet":
        preset = "edm" if size == 32 else "edm_imagenet64" if config["label_dim"] else "edm_ffhq64"
    return preset, size, (state["sigma_min"], state["sigma_max"])


def take_shape(args):
    """Set --channels and --blocks of train0.py to those of the teacher that --init names, and a missing --image_size.

    Images may have another size than that teacher's, as no weight depends on it.
    """
    config = checkpoint.load(args.init, kind="teacher")["model_config"]
    network = config.get("network", "SimpleUNet")
    if network != "SimpleUNet":
        raise UsageError(f"--init {args.init} holds a {network}: train0.py trains a SimpleUNet")
    with resume.restoring(args.init):
        for name in ("channels", "blocks"):
            if name in args.given and getattr(args, name) != config[name]:
                raise UsageError(f"--{name} {getattr(args, name)}: the teacher of --init has {config[name]}")
            setattr(args, name, config[name])
        if "image_size" not in args.given:
            args.image_size = networks.image_size(config)


def begin_from(path, net, classes):
    """Give a fresh SimpleUNet the EMA weights of a teacher; class embeddings go by the classes' names.

    Raises:
        CheckpointError: there is no such teacher, or its network is another.
    """
    source = checkpoint.load(path, kind="teacher")
    with resume.restoring(path):
        if source["model_config"]["sigma_data"] != net.sigma_data:
            raise ValueError(f"its sigma_data is {source['model_config']['sigma_data']}, not {net.sigma_data}")
        how = take_weights(net, source, classes)
    size = networks.image_size(source["model_config"])
    if size != net.image_size:
        how += f", from {size}x{size} to {net.image_size}x{net.image_size} pixels"
    processes.main_only(print)(f"begins from {checkpoint.find(path)}, step {source['step']}{how}")


def begin_with_student(path, generator, classes, sigmas):
    """Give a fresh generator the EMA weights of a student with the same noise levels, or with the first of them.

    The embeddings of classes that the student does not know stay the teacher's.

    Raises:
        CheckpointError: there is no such student, or its network is another.
        UsageError: it has other noise levels, or other classes, of which only a SimpleUNet can have new ones.
    """
    source = checkpoint.load(path, kind="student")
    if source["classes"] != classes and not isinstance(generator, SimpleUNet):
        raise UsageError(f"the classes of --init {path} are not those of the teacher")
    if source["denoising_sigmas"] != sigmas[: len(source["denoising_sigmas"])]:
        raise UsageError(f"the student of --init starts at the noise levels {source['denoising_sigmas']}, not {sigmas}")
    with resume.restoring(path):
        theirs, ours = networks.described(networks.rebuild(source["model_config"])), networks.described(generator)
        if source["classes"] != classes:
            theirs["label_dim"] = ours["label_dim"]
        if theirs != ours:
            raise ValueError(f"its network is {theirs}, the teacher's {ours}")
        how = take_weights(generator, source, classes)
    processes.main_only(print)(f"begins with the student {checkpoint.find(path)}, step {source['step']}{how}")


@torch.no_grad()
def take_weights(net, source, classes):
    """Give a network the EMA weights of a checkpoint; of other classes than these the embeddings go by name.

    Returns:
        the end of a sentence: how many of the classes the checkpoint knows; empty where its classes are these.
    """
    if source["classes"] == classes:
        net.load_state_dict(source["model_ema"])
        return ""
    known = [name for name in classes if name in source["classes"]]
    rows = net.label_embedding.weight.clone()
    theirs = source["model_ema"]["label_embedding.weight"].float()
    rows[[classes.index(name) for name in known]] = theirs[[source["classes"].index(name) for name in known]]
    net.load_state_dict(dict(source["model_ema"], **{"label_embedding.weight": rows}))
    return f", {len(known)} of {len(classes)} classes known to it"


def load(args, state, needing_images=()):
    """The teacher that train.py distils, checked against the flags: --teacher, or the one that a resumed run holds.

    Args:
        args: the flags of train.py; what a preset asks for and this teacher cannot give is turned off in them.
        state: the checkpoint to resume from, or None.
        needing_images: names of flags that need the real images.

    Returns:
        source: the teacher's checkpoint, or the run's own.
        teacher: its EMA network; of a resumed run with weights that are still to be loaded.
        guide: the weaker teacher of --autoguidance_scale likewise, or None.

    Raises:
        UsageError, CheckpointError: the flags ask for what this teacher or this run cannot do.
    """
    source = state or checkpoint.load(args.teacher, kind="teacher")
    with resume.restoring(args.run_dir if state else args.teacher):
        teacher = networks.averaged(source)
    left_out = [] if state else leave_out(args, source, hasattr(teacher, "feature_channels"), needing_images)
    check_cfg(args, source)
    with resume.restoring(args.run_dir if state else args.teacher):
        guide = networks.rebuild(source["guide_config"]) if source.get("guide_config") else None
    if state:
        if args.autoguidance_scale != 1 and guide is None:
            raise UsageError("--autoguidance_scale cannot begin in a resumed run: it was begun without a guide")
        if teacher_changed(args, state) and processes.MAIN:
            print(f"note: {args.teacher} is another teacher now; the run keeps the one it began with", file=sys.stderr)
        return source, teacher, guide
    if checkpoint.find(args.teacher).resolve().parent == Path(args.run_dir).resolve():
        raise UsageError(f"--run_dir {args.run_dir} is the teacher's own folder")
    guide = load_guide(args, source, args.teacher, "cpu")
    source["teacher_digest"] = networks.digest(source["model_ema"])
    planned = source.get("settings", {}).get("steps", 0)
    step = f"step {source['step']}" + (f" of {planned}" if source["step"] < planned else "")
    classes = f"{number(len(source['classes']), 'class', 'classes')} ({few(source['classes'])})"
    processes.main_only(print)("; ".join([f"teacher: {checkpoint.find(args.teacher)}, {step}, {classes}", *left_out]))
    return source, teacher, guide


def leave_out(args, source, has_features, needing_images):
    """Turn off what a preset, not a flag, asks of this teacher and it cannot give; returns what to tell the user."""
    guide, said = guide_path(args, args.teacher), []
    named = args.dataset or source.get("settings", {}).get("dataset")
    for name, off, missing in (
        ("cfg_scale", 1.0, not source.get("label_dropout") and "it was trained without --label_dropout"),
        ("autoguidance_scale", 1.0, guide and not Path(guide).exists() and f"there is no {checkpoint.GUIDE} beside it"),
        *((name, 0, not named and "it does not name its images (--dataset)") for name in needing_images),
        ("gan_steps", 0, not has_features and not args.gan_features and "it has no features"),
        ("gen_cls_loss_weight", 0, not has_features and "it has no features"),
    ):
        if missing and getattr(args, name) != off and name not in args.given:
            setattr(args, name, off)
            said.append(f"no --{name}, as {missing}")
    return said


def teacher_changed(args, state):
    """Whether --teacher names a checkpoint that exists and is not the one that this run began with."""
    try:
        now = checkpoint.load(args.teacher, kind="teacher")
    except checkpoint.CheckpointError:
        return False
    return networks.digest(now["model_ema"]) != state.get("teacher_digest", networks.digest(now["model_ema"]))


def sampling_cfg(args, state, device):
    """Keyword arguments of diffusion.guided for the checkpoint to sample, from the flags of add_cfg.

    Raises UsageError if the flags would have no effect, or ask for what the checkpoint cannot do.
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
    """The path of the weaker teacher for --autoguidance_scale, or None where that is 1."""
    if args.autoguidance_scale == 1:
        return None
    return args.guide or checkpoint.find(teacher).with_name(checkpoint.GUIDE)


def load_guide(args, state, teacher, device):
    """The network at guide_path, for the teacher at this path with this state; None where there is no guidance.

    Raises:
        UsageError: there is no guide, or it has other classes.
        CheckpointError: it is not a teacher's checkpoint.
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
        network = networks.averaged(guide, device)
    size = networks.image_size(state["model_config"])
    if network.image_size != size:
        raise UsageError(f"--guide {path} makes images of {network.image_size} pixels a side, the teacher of {size}")
    return network


def check_cfg(args, state):
    """Raise UsageError if --cfg_scale or --cfg_interval ask for what the checkpoint's network cannot do."""
    if args.cfg_interval and args.cfg_interval[0] >= args.cfg_interval[1]:
        raise UsageError("--cfg_interval {} {}: the first is not below the second".format(*args.cfg_interval))
    if args.cfg_scale != 1 and not state.get("label_dropout"):
        raise UsageError(f"--cfg_scale {args.cfg_scale} needs a teacher trained with --label_dropout above 0")
