"""Calls scripts one after another in the processes of one torchrun, whose start takes seconds.

    torchrun --nproc_per_node=2 tests/processes.py '[["train0", "--steps", "3"], ["sample"]]' runs/

The second argument is part of the paths that the first of the processes alone may write to.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import data, errors, processes

data.SHAPES_TRAIN_IMAGES = 2500                     # the whole dataset takes seconds to draw


def only_reading(event, args):
    """An audit hook that ends the process where it opens a file to write, renames or removes one, or makes a folder."""
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and sys.argv[2] in str(args[0]):
        print(f"process {processes.RANK} does {event} {args[0]}", file=sys.stderr, flush=True)
        os._exit(3)


def main():
    if processes.RANK > 0:                        # the main process alone writes
        sys.addaudithook(only_reading)
    for script, *argv in json.loads(sys.argv[1]):
        importlib.import_module(script).main(argv)
        processes.start()                         # the next one must find what the main process has written


if __name__ == "__main__":
    errors.run(main)
