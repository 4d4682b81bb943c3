"""Call scripts one after another under a single torchrun, as its start takes seconds.

    torchrun --nproc_per_node=2 tests/processes.py '[["train0", "--steps", "3"], ["sample"]]' runs/

Only rank 0 may write to paths that contain the second argument.
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
    """An audit hook that ends the process if it opens a file to write, renames or removes one, or makes a folder."""
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and sys.argv[2] in str(args[0]):
        print(f"process {processes.RANK} does {event} {args[0]}", file=sys.stderr, flush=True)
        os._exit(3)


def main():
    if processes.RANK > 0:                        # only the main process may write
        sys.addaudithook(only_reading)
    for script, *argv in json.loads(sys.argv[1]):
        importlib.import_module(script).main(argv)
        processes.start()                         # the next script must find what the main process has written


if __name__ == "__main__":
    errors.run(main)
