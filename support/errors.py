"""Errors that a user can cause end in one line on stderr and an exit code.

Exit codes: 0 finished, or --max_minutes have passed; 2 a wrong call or input (nothing was written); 1 something failed
later; 130, 143, ... a signal (Ctrl-C, kill, ...) ended it, a training run after it was saved.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

from support import launch


class UsageError(Exception):
    """A wrong call or input: one line for the user, exit code 2."""


class RunError(Exception):
    """An error that ends a run after it began: one line for the user, exit code 1."""


def early(parser):
    """Call parser().parse_args() before a script loads torch, which takes seconds: --help and wrong flags end here."""
    try:
        parser().parse_args()
    except UsageError as error:
        found = error

        def refuse():
            raise found

        run(refuse)


def run(main):
    """Call a script's main() and turn the errors that a user can cause into one line and an exit code."""
    script = Path(sys.argv[0]).name
    for stream in sys.stdout, sys.stderr:           # print every name, also one that the terminal has no letters for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if launch.MISLED:
            raise UsageError(launch.MISLED)
        main()
        sys.exit()
    except SystemExit:
        if launch.WORLD > 1:
            from support import processes

            processes.finish()
        raise
    except UsageError as error:
        code, line = 2, error
    except (RunError, OSError) as error:
        code, line = 1, error
    except ModuleNotFoundError as error:            # torch-fidelity, which only a measurement imports
        code, line = 1, f"{error}: pip install -r requirements.txt"
    except KeyboardInterrupt:                       # before the training loop, which handles Ctrl-C itself
        code, line = 130, "interrupted"
    except (MemoryError, RuntimeError) as error:          # torch.OutOfMemoryError is one of these
        code, reason = 1, str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or re.search("out of memory|allocate|not enough memory", str(error)):
            line = f"out of memory, try a smaller --batch_size: {reason}"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            line = f"--compile failed, --no-compile does without: {reason}"
        elif launch.lost(error):
            line = f"another process of this run has ended; the last checkpoint stands ({reason})"
        else:
            raise
    if launch.WORLD > 1 and code == 1:              # code 2: the same in all processes, printed once per host
        line = f"process {launch.RANK} of {launch.WORLD}: {line}"
    line = " ".join(str(line).split())
    if code == 1 or launch.LOCAL_RANK == 0:
        below_the_bar = "\n" if code == 1 else ""
        print(f"{below_the_bar}{script}: error: {line}", file=sys.stderr, flush=True)
    if launch.LAUNCHED and os.environ.get("TORCHELASTIC_ERROR_FILE"):        # for torchrun's last report
        report = dict(message=dict(message=line, extraInfo=dict(timestamp=str(int(time.time())))))
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report), encoding="utf-8")
    sys.exit(code)
