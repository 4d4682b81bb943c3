"""Run: what both training loops do around their step.

    run = Run(args, state, device, parts, describe, sample, validation)
    for step in run.steps():                        # until the last one, or a signal to stop
        ...                                         # the algorithm
        run.count(loss=loss, grad_norm=grad_norm)   # this step is done; logs
        run.keep(draw)                              # draws, saves and measures, as often as asked
"""

import math
import sys
import time

import torch
from tqdm import tqdm

from support import checkpoint, hardware, processes, resume
from support.errors import RunError
from support.meter import Meter
from support.run_folder import RunFolder
from support.signals import StopSignal

MINUTES_UNSEEN, MINUTES_UNSAVED = 1, 10             # at most, however long --sample_every and --save_every take


class OutOfStepError(RunError):
    """The processes of a run do not hold the same weights any more."""


class Run:
    """A training at work: its step, folder, checkpoints, logs and measurements.

    Args:
        args: the flags of flags.add_training.
        state: the checkpoint that the run goes on from, or None.
        parts: name -> what has a state_dict: what only a resume needs. The randomness and the place in the data follow
            from the step.
        describe: () -> dict of all else that a checkpoint holds: what sampling and distillation need.
        sample: (z, labels, renoise) -> images of the averaged weights, as in sampling.sampler, for measurements.
        validation: validation.Validation, or None.

    Attributes:
        step: how many steps are done.
    """

    def __init__(self, args, state, device, parts, describe, sample, validation):
        self.args, self.device, self.parts, self.describe = args, device, parts, describe
        self.sample, self.validation = sample, validation
        self.step = state["step"] if state else 0
        self.meter = Meter(device, state and state["meter"])
        self.timed_steps, self.seconds = 0, 0.0     # since the last log line; grids, saves and measurements left out
        self.best = (state or {}).get("best", dict(distance=math.inf, step=0))
        if validation and self.best.get("metric") != validation.metric:
            self.best = dict(distance=math.inf, step=0, metric=validation.metric)
        self.folder = RunFolder(args.run_dir, args.stamp)
        self.path = self.folder.path
        self.stop, self.stopping = StopSignal(args.max_minutes), False
        self.saved, self.drawn, self.warned = time.monotonic(), state is not None, False
        if state is None:                           # whether the disk takes it shows now, not after an hour
            self.save()
        self.folder.begin(self.step)

    def steps(self):
        """The steps to take, by number. Raises SystemExit where a signal has stopped the run, which is saved."""
        if self.step and self.measures() and self.best.get("measured") != self.step:
            self.measure()                          # the run was killed while it did
        self.bar = tqdm(
            total=self.args.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not processes.MAIN
        )
        self.first_step = time.monotonic()
        while self.step < self.args.steps and not self.stopping:
            self.began = time.perf_counter()
            yield self.step
        self.bar.close()
        self.folder.close()
        how = "stopped; --resume goes on" if self.stopping else "done"
        file, grids = self.path / checkpoint.NAME, self.path / "grids"
        processes.main_only(print)(f"{how}: step {self.step} of {self.args.steps}, {file}, grids in {grids}")
        processes.wait()                            # as the end of one would end another that still writes
        if self.stopping and self.stop.exit_code():
            sys.exit(self.stop.exit_code())

    def every(self, n):
        """Whether the steps done are a multiple of n, or all."""
        return self.step % n == 0 or self.step == self.args.steps

    def count(self, **values):
        """One more step is done. Every --log_every steps logs the means of its tensors, and its floats as they are."""
        self.meter.add(self.step, **{name: value for name, value in values.items() if torch.is_tensor(value)})
        self.step += 1
        self.bar.update()
        self.stopping = self.step < self.args.steps and bool(self.stop)
        means = self.meter.read() if self.every(self.args.log_every) else None      # which waits for the device
        self.timed_steps, self.seconds = self.timed_steps + 1, self.seconds + time.perf_counter() - self.began
        if means is None:
            return
        losses = {name: f"{value:.4f}" for name, value in means.items() if name in ("loss", "loss_fake")}
        images_per_second = self.timed_steps * self.args.batch_size / self.seconds
        self.timed_steps, self.seconds = 0, 0.0
        hours = (self.args.steps - self.step) * self.args.batch_size / images_per_second / 3600
        if hours > 24 and not self.warned and processes.MAIN:
            better = "cifar10_gpu" if self.device.type == "cuda" else "cifar10"
            print(f"note: at this speed {hours:.0f} hours to go; --preset {better} fits this machine", file=sys.stderr)
        self.warned = True
        self.bar.set_postfix(**losses, images_per_s=f"{images_per_second:.0f}")
        floats = {name: value for name, value in values.items() if isinstance(value, float)}
        speed = dict(images_per_second=images_per_second, memory_mib=hardware.peak_memory_mib(self.device))
        self.folder.scalars(self.step, dict(means, **floats, **speed))

    def grid(self, name, rows, *panels):
        """Write images [N, 3, 32, 32], a class per row, panels side by side, as grids/<step>_<name>.png."""
        self.folder.grid(self.step, name, rows, *panels)

    def keep(self, draw):
        """Draw every --sample_every steps, save every --save_every, measure every --eval_every; all at the last step.

        Draws and saves when the run is stopped, too, and where those steps take many minutes.

        Args:
            draw: () -> None, which calls grid().
        """
        if self.stopping:
            self.save()                             # before anything that takes time: the next signal will not wait
        unseen = not self.drawn and over(MINUTES_UNSEEN, self.first_step)
        if self.every(self.args.sample_every) or unseen or self.stopping:
            draw()
            self.drawn = True
        if self.every(self.args.save_every) or self.measures() or over(MINUTES_UNSAVED, self.saved):
            self.save()                             # before a measurement, too: what ends that must not cost steps
        if self.measures() and not self.stopping:   # a resume begins with it
            self.measure()

    def save(self, name=checkpoint.NAME):
        """Write a checkpoint. Raises OutOfStepError if the processes' weights differ."""
        modules = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        if not processes.same(*modules):
            raise OutOfStepError("the processes hold different weights: stopped; the last checkpoint stands")
        resumed_from = {part: value.state_dict() for part, value in self.parts.items()}
        settings = resume.settings(self.args)
        checkpoint.save(
            self.path / name,
            dict(self.describe(), step=self.step, settings=settings, meter=self.meter.state(), best=self.best,
                 **resumed_from),
        )
        self.saved = time.monotonic()

    def measures(self):
        """Whether --eval_every asks for a measurement now."""
        return self.validation and self.every(self.args.eval_every)

    @torch.no_grad()
    def measure(self):
        """Log the metrics of the averaged weights' images; the checkpoint of the least distance becomes best.pt."""
        values = self.validation(self.sample)
        self.folder.scalars(self.step, values)
        distance = values[self.validation.key]
        better = distance < self.best["distance"]
        if better:
            self.best.update(distance=distance, step=self.step)
        self.best["measured"] = self.step
        if better:
            self.save(checkpoint.BEST)
        self.save()


def over(minutes, since):
    """Whether so many minutes have passed, by the clock of any process."""
    return processes.any_process(time.monotonic() - since > 60 * minutes)
