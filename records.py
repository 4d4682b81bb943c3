"""Files that back a number: written whole or not at all, and saying what the number may depend on."""

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import distributed


@distributed.main_only
def write(path, writer):
    """Call writer(file) on a temporary file and rename it, so that path is never half-written."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            writer(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@distributed.main_only
def write_json(path, report, device):
    """Write a dict of results as JSON, with the command (its own or this one), the code's commit and the machine."""
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent
    script = script.relative_to(root) if script.is_relative_to(root) else script.name
    command = shlex.join(["python", str(script), *sys.argv[1:]])
    report = dict(report, command=report.get("command", command), git=GIT, **environment(device))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))


def git_commit():
    """The commit of this code and whether it was changed since; None where there is no repository."""
    here = Path(__file__).resolve().parent
    try:
        def git(*words):
            done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True)
            return done.stdout.strip()

        return dict(commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.CalledProcessError):
        return None


GIT = git_commit()                                  # that of the code that runs: the files may change meanwhile


def environment(device):
    """What a number may depend on beside the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    return dict(hardware=name, threads=torch.get_num_threads(), processes=distributed.WORLD, versions=versions)
