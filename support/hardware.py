"""Device and precision: where the networks run, and in what arithmetic."""

import contextlib
import os
import platform
import sys
from pathlib import Path

try:
    import resource
except ModuleNotFoundError:                         # on Windows
    resource = None

import numpy as np
import torch

from support import processes
from support.errors import UsageError


def start(args):
    """The device of --device, once all processes are here: until then none writes, so that all check the same files."""
    try:
        picked = pick_device(args.device, args.precision)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from error
    if picked.type == "cpu" and torch.get_num_threads() > 1 and others_run() and processes.MAIN:
        print("note: other programs are running; with GOMP_SPINCOUNT=2000 in the environment waiting threads sleep "
              "instead of spinning, which can be many times as fast", file=sys.stderr)
    if picked.type == "mps":
        number = "bf16" if uses_bf16(picked, args.precision) else "fp16" if args.precision == "fp16" else "float32"
        print(f"--device mps, in {number}; operators that MPS lacks run on the CPU (--device cpu: all do)")
    processes.start()
    return picked


def others_run():
    """Whether other programs compute now and the threads of this one would wait busily; False where that is unknown."""
    said, load = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ), proc("loadavg")
    return bool(load) and not said and int(load.split()[3].split("/")[0]) > 1


def proc(name):
    """The text of Linux's file /proc/<name>, "" where there is none."""
    path = Path("/proc", name)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def pick_device(name, precision="auto"):
    """The torch.device for --device; "auto" takes CUDA, else MPS, else the CPU. Under torchrun: this process's GPU.

    Raises ValueError if it is not there.

    Also sets for the whole process: TF32 where the device has it, unless precision is "fp32"; and deterministic cuDNN
    algorithms, which an exact resume needs. On a GPU they may not be enough for it: the backward of an embedding under
    --compile adds with atomics, in no fixed order. Fused attention is off for the same reason, as its backward may not
    be deterministic: EDMUNet's attention runs as plain matrix products.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps() else "cpu"
    if processes.WORLD > 1 and name == "mps":
        raise ValueError("'mps' is for one process, without torchrun")
    if processes.WORLD > 1 and name.startswith("cuda"):
        if name != "cuda" or torch.cuda.device_count() < processes.LOCAL_WORLD:
            found = f"{torch.cuda.device_count()} GPUs for {processes.LOCAL_WORLD} processes"
            raise ValueError(f"{name!r} with torchrun: {found}, of which each takes its own of --device cuda")
        name = f"cuda:{processes.LOCAL_RANK}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("choose auto, cpu, cuda, cuda:N or mps")
        torch.zeros(1, device=device).add(1).item()             # a GPU that this torch has no kernels for fails here
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)           # events and collectives use the current device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error
    allow_tf32(precision != "fp32")
    torch.backends.cudnn.deterministic = True
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)
    return device


def has_mps():
    """Whether --device auto takes MPS, a Mac's GPU, whose tensors torch.distributed cannot add up."""
    return processes.WORLD == 1 and torch.backends.mps.is_available()


def allow_tf32(allowed):
    """Set whether the float32 matrix products and convolutions of this process may round their inputs to TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def full_float32(device):
    """Context for what must not depend on --precision: no bf16, no TF32."""
    before = torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        allow_tf32(before)


def has_fast_bf16(device):
    """Whether the hardware computes in bf16; emulated bf16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        flags = proc("cpuinfo")
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def uses_bf16(device, precision):
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def autocast(device, precision):
    """Context in which networks run: precision is "bf16", "fp16", "tf32", "fp32" or "auto" (bf16 where it is fast)."""
    if precision == "fp16":
        return torch.autocast(device.type, torch.float16)
    return torch.autocast(device.type, torch.bfloat16) if uses_bf16(device, precision) else contextlib.nullcontext()


def peak_memory(device):
    """dict(memory_mib=...), the peak memory of this process so far: on CUDA the GPU's, else resident memory.

    Empty on Windows, where Python's library cannot tell.
    """
    if device.type == "cuda":
        return dict(memory_mib=torch.cuda.max_memory_allocated(device) / 2**20)
    if resource is None:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(memory_mib=peak / (2**20 if sys.platform == "darwin" else 2**10))


def environment(device):
    """What a result may depend on besides the code: a dict for the JSON of results."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu":
        lines = proc("cpuinfo").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    return dict(hardware=name, threads=torch.get_num_threads(), processes=processes.WORLD, versions=versions)
