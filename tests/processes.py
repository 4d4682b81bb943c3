"""Calls scripts one after another in the processes of one torchrun, whose start takes seconds.

    torchrun --nproc_per_node=2 tests/processes.py '[["train0", "--steps", "3"], ["sample"]]'
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import data
import distributed

data.SHAPES_TRAIN_IMAGES = 2500                     # the whole dataset takes seconds to draw


def main():
    for script, *argv in json.loads(sys.argv[1]):
        importlib.import_module(script).main(argv)
        distributed.start()                         # the next one must find what the main process has written


if __name__ == "__main__":
    cli.run(main)
