"""JSON files that back a number: they record all that the number may depend on."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from support import files, hardware, processes

ROOT = Path(__file__).resolve().parent.parent      # of this code


@processes.main_only
def write_json(path, report, device):
    """Write a dict of results as JSON, with the command (the dict's own, or this one), the commit and the machine."""
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    called = ["-m", ".".join(script.with_suffix("").parts)] if script.parent != Path() else [str(script)]
    command = shlex.join(["python", *called, *sys.argv[1:]])
    report = dict(report, command=report.get("command", command), git=GIT, **hardware.environment(device))
    files.write(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))


def git_commit():
    """The commit of this code and whether files differ from it; None outside a repository, or why git does not say."""
    try:
        def git(*words):
            # The code of this folder is running already, whoever owns the folder.
            trusted = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
            return subprocess.run([*trusted, *words], capture_output=True, encoding="utf-8", check=True).stdout.strip()

        return dict(commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(getattr(error, "stderr", None) or error).split())
        return None if "not a git repository" in reason else dict(commit=None, dirty=None, why=reason)


GIT = git_commit()                                  # at import: the files may change while the code runs
