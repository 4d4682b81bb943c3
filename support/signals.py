"""Ctrl-C, SIGTERM and --max_minutes: a run ends between two steps, saved."""

import os
import signal
import time

from support import processes


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between two steps; a second one ends at once.

    To read it is to ask all processes: one that gets the signal stops them all, at the same step.
    """

    def __init__(self, max_minutes=None):
        self.signum, self.since = None, 0.0
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle)

    def handle(self, signum, frame):
        # Ctrl-C under torchrun reaches a process twice, from the terminal and from torchrun: that is one.
        if self.signum is not None and time.monotonic() - self.since > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif self.signum is None:
            self.signum, self.since = signum, time.monotonic()

    def __bool__(self):
        late = self.deadline is not None and time.monotonic() > self.deadline
        return processes.any_process(self.signum is not None or late)
