"""What a user can cause ends in one line on stderr and an exit code.

Exit codes: 0 finished or stopped on request, 2 a wrong call or input (nothing was written), 1 something failed later.
"""

import re
import sys
from pathlib import Path

import torch

from support import processes


class UsageError(Exception):
    """A wrong call or input: one line for the user, exit code 2."""


class RunError(Exception):
    """What ends a run that had begun: one line for the user, exit code 1."""


def run(main):
    """Call a script's main() and turn what a user can cause into one line and an exit code."""
    script = Path(sys.argv[0]).name
    try:
        main()
        processes.finish()
        sys.exit()
    except UsageError as error:
        code, line = 2, error
    except (RunError, OSError) as error:
        code, line = 1, error
    except ModuleNotFoundError as error:            # torch-fidelity, which only a measurement imports
        code, line = 1, f"{error}: pip install -r requirements.txt"
    except KeyboardInterrupt:                       # before the loop, which has its own way to stop
        code, line = 1, "interrupted"
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        code, reason = 1, str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or re.search("out of memory|allocate|not enough memory", str(error)):
            line = f"out of memory, try a smaller --batch_size: {reason}"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            line = f"--compile failed, --no-compile does without: {reason}"
        elif processes.lost(error):
            line = f"another process of this run has ended; the last checkpoint stands ({reason})"
        else:
            raise
    if processes.WORLD > 1 and code == 1:           # a wrong call is the same line for all: once a host is enough
        line = f"process {processes.RANK} of {processes.WORLD}: {line}"
    if code == 1 or processes.LOCAL_RANK == 0:
        below_the_bar, line = "\n" if code == 1 else "", " ".join(str(line).split())
        print(f"{below_the_bar}{script}: error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)
