"""Files that back a number: written whole or not at all, and saying what the number may depend on."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from support import hardware, processes

ROOT = Path(__file__).resolve().parent.parent      # of this code


@processes.main_only
def write(path, writer):
    """Call writer(file) on a temporary file and rename it, so that path is never half-written."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            writer(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@processes.main_only
def write_json(path, report, device):
    """Write a dict of results as JSON, with the command (its own or this one), the code's commit and the machine."""
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    called = ["-m", ".".join(script.with_suffix("").parts)] if script.parent != Path() else [str(script)]
    command = shlex.join(["python", *called, *sys.argv[1:]])
    report = dict(report, command=report.get("command", command), git=GIT, **hardware.environment(device))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))


def git_commit():
    """The commit of this code and whether it was changed since; None where there is no repository."""
    try:
        def git(*words):
            done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
            return done.stdout.strip()

        return dict(commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.CalledProcessError):
        return None


GIT = git_commit()                                  # that of the code that runs: the files may change meanwhile
