"""Run: what both training loops do around their step.

    run = Run(args, state, device, stateful, describe, sample, validation)
    for step in run.steps():                        # until the last one, or a signal to stop
        ...                                         # the algorithm
        run.count(loss=loss, grad_norm=grad_norm)   # counts the step and logs
        run.keep(draw)                              # draws grids, saves and measures, as often as the flags ask
"""

import contextlib
import math
import sys
import time

import torch
from tqdm import tqdm

from support import checkpoint, hardware, processes, records, resume
from support.errors import RunError
from support.meter import Meter, NonFiniteError
from support.pictures import MAX_ROWS
from support.run_folder import RunFolder
from support.signals import StopSignal

# The first grid and each checkpoint come after so many minutes at most, whatever --sample_every and --save_every say.
MINUTES_UNSEEN, MINUTES_UNSAVED = 1, 10


class OutOfStepError(RunError):
    """The processes of a run no longer hold the same weights."""


class Run:
    """A training at work: its step, folder, checkpoints, logs and measurements.

    Args:
        args: the flags of flags.add_training.
        state: the checkpoint to resume from, or None.
        stateful: name -> object with a state_dict: all that only a resume needs. Randomness follows from the step.
        describe: () -> dict of everything else in a checkpoint: what sampling and distillation need.
        sample: (z, labels, renoise) -> images of the EMA, as in sampling.sampler, for measurements.
        validation: validation.Validation, or None.

    Attributes:
        step: number of steps done.
    """

    def __init__(self, args, state, device, stateful, describe, sample, validation):
        self.args, self.device, self.stateful, self.describe = args, device, stateful, describe
        self.sample, self.validation = sample, validation
        self.step = state["step"] if state else 0
        self.meter = Meter(device, state and state["meter"])
        self.timed_steps, self.seconds = 0, 0.0     # since the last log line, without grids, saves and measurements
        self.best = (state or {}).get("best", dict(distance=math.inf, step=0))
        if validation and self.best.get("metric") != validation.metric:
            self.best = dict(distance=math.inf, step=0, metric=validation.metric)
        self.folder = RunFolder(args.run_dir, args.stamp)
        self.path = self.folder.path
        self.stop, self.stopping = StopSignal(args.max_minutes), False
        self.saved, self.drawn, self.warned = time.monotonic(), state is not None, False
        if state is None:                           # a disk that cannot take a checkpoint shows now, not in an hour
            self.save()
        self.folder.begin(self.step)

    def steps(self):
        """The numbers of the steps to take. Raises SystemExit after a signal has stopped the run, which is saved."""
        if self.step and self.measures() and self.best.get("measured") != self.step:
            self.measure()                          # the run was killed during this measurement
        self.bar = tqdm(
            total=self.args.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not processes.MAIN
        )
        self.first_step = time.monotonic()
        while self.step < self.args.steps and not self.stopping:
            self.began = time.perf_counter()
            yield self.step
        self.bar.close()
        self.folder.close()
        how = "stopped; continue with --resume" if self.stopping else "done"
        file, grids, classes = self.path / checkpoint.NAME, self.path / "grids", len(self.describe()["classes"])
        grids = f"{grids}, of {MAX_ROWS} of {classes} classes" if classes > MAX_ROWS else grids
        processes.main_only(print)(f"{how}: step {self.step} of {self.args.steps}, {file}, grids in {grids}")
        processes.wait()                            # a process that ends would take down one that still writes
        if self.stopping and self.stop.exit_code():
            sys.exit(self.stop.exit_code())

    def every(self, n):
        """Whether the number of steps done is a multiple of n, or the last."""
        return self.step % n == 0 or self.step == self.args.steps

    def count(self, **values):
        """Count a step. Every --log_every steps, log the means of the tensors since, and the floats as they are."""
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
            fits = "cifar10_gpu" if self.device.type == "cuda" else "cifar10"
            advice = f"; --preset {fits} fits this machine" if self.args.preset == "none" else ""
            print(f"note: at this speed {hours:.0f} hours to go{advice}", file=sys.stderr)
        self.warned = True
        self.bar.set_postfix(**losses, images_per_s=f"{images_per_second:.0f}")
        floats = {name: value for name, value in values.items() if isinstance(value, float)}
        speed = dict(images_per_second=images_per_second, **hardware.peak_memory(self.device))
        self.folder.scalars(self.step, dict(means, **floats, **speed))

    def grid(self, name, rows, *panels):
        """Write images [N, 3, H, W], one class per row, panels side by side, as grids/<step>_<name>.png."""
        with self.stopped_by(f"the grid {name}"):
            self.folder.grid(self.step, name, rows, *panels)

    @contextlib.contextmanager
    def stopped_by(self, what):
        """Context in which images that are not finite stop the run as such a loss does."""
        try:
            yield
        except NonFiniteError as error:
            reason = f"{error} in {what} at step {self.step}"
            raise NonFiniteError(f"{reason}: stopped; the last checkpoint stands") from error

    def keep(self, draw):
        """Draw every --sample_every steps, save every --save_every, measure every --eval_every; all at the last step.

        Also draws and saves when the run is stopped, and when such an interval takes many minutes.

        Args:
            draw: () -> None, which calls grid().
        """
        if self.stopping:
            self.save()                             # first: a second signal ends the process at once
        unseen = not self.drawn and over(MINUTES_UNSEEN, self.first_step)
        if self.every(self.args.sample_every) or unseen or self.stopping:
            draw()
            self.drawn = True
        if self.every(self.args.save_every) or self.measures() or over(MINUTES_UNSAVED, self.saved):
            self.save()                             # also before a measurement, whose failure must not cost steps
        if self.measures() and not self.stopping:   # a resumed run starts with it
            self.measure()

    def save(self, name=checkpoint.NAME):
        """Write a checkpoint. Raises OutOfStepError if the processes' weights differ."""
        modules = [found for found in self.stateful.values() if isinstance(found, torch.nn.Module)]
        if not processes.same(*modules):
            raise OutOfStepError("the processes hold different weights: stopped; the last checkpoint stands")
        resumed_from = {key: found.state_dict() for key, found in self.stateful.items()}
        commit = records.GIT and records.GIT["commit"]
        state = dict(self.describe(), step=self.step, settings=resume.settings(self.args), commit=commit,
                     meter=self.meter.state(), best=self.best, **resumed_from)
        if name == checkpoint.NAME and self.step:   # at step 0 what is there is of another run
            checkpoint.keep_previous(self.path)
        checkpoint.save(self.path / name, state)
        self.saved = time.monotonic()

    def measures(self):
        """Whether --eval_every asks for a measurement now."""
        return self.validation and self.every(self.args.eval_every)

    @torch.no_grad()
    def measure(self):
        """Log the metrics of the EMA's images; the checkpoint with the lowest distance becomes best.pt."""
        with self.stopped_by("the measurement"):
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
    """Whether so many minutes have passed since, by any process's clock."""
    return processes.any_process(time.monotonic() - since > 60 * minutes)
