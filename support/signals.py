"""Stop a run between two steps, saved: on Ctrl-C, kill, a closed terminal, a batch system's warning, a time limit."""

import os
import signal
import time

from support import processes

# Windows has no SIGHUP and no SIGUSR1; only Windows has SIGBREAK: Ctrl-Break, or a closed window.
NAMES = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK"
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class StopSignal:
    """Turns SIGNALS into a flag that the loop reads between two steps; a second signal ends the process at once.

    bool() of it is an all-reduce: a signal to one process stops all of them, at the same step.
    """

    def __init__(self, max_minutes=None):
        self.signum, self.since = None, 0.0
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:      # as nohup sets it
                signal.signal(signum, self.handle)

    def handle(self, signum, frame):
        if signal.Signals(signum).name == "SIGHUP":   # the terminal is gone: writing the bar to it would end the run
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self.terminals:
                os.dup2(nowhere, descriptor)
        # Ctrl-C under torchrun reaches a process twice, from the terminal and from torchrun: count that as one.
        if self.signum is not None and time.monotonic() - self.since > 1:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)             # os.kill sends no signals on Windows
        elif self.signum is None:
            self.signum, self.since = signum, time.monotonic()

    def __bool__(self):
        late = self.deadline is not None and time.monotonic() > self.deadline
        return processes.any_process(self.signum is not None or late)

    def exit_code(self):
        """128 plus the signal's number, as in shells; 0 if the time was up."""
        return 128 + self.signum if self.signum else 0
