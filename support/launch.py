"""How this process was started: alone, or by torchrun as one of several. Loads no torch, as that takes seconds."""

import os


def number(name):
    """The environment variable of this name as an int, 0 where it is not one."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def misled():
    """Why this process cannot work together with those that were started with it, in one line; None where it can."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        unset = [name for name in NAMES if not os.environ.get(name, "").isdecimal()]
        return f"TORCHELASTIC_RUN_ID is set but not {unset[0]}: start with torchrun, or unset it" if unset else None
    srun = "SLURM_STEP_NUM_TASKS"
    # Not that of sbatch or salloc: their script or shell is one process, however many tasks the job may start.
    if srun not in os.environ and "SLURM_PROCID" in os.environ and os.environ.get("ENVIRONMENT") != "BATCH":
        srun = "SLURM_NTASKS"
    for name in (srun, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"):
        if (n := number(name)) > 1:
            return (f"{name} says that this is one of {n} processes, which work together only under torchrun: start a "
                    f"single `torchrun --nproc_per_node={n} ...` instead, or unset {name}")
    return None


NAMES = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
MISLED = misled()
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ and not MISLED
RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (number(name) for name in NAMES) if LAUNCHED else (0, 1, 0, 1)
SHARE = RANK, WORLD                                 # this process takes share RANK of WORLD of a batch
MAIN = RANK == 0                                    # the process that writes


def main_only(function):
    """Decorator of a function that only the main process runs; in the others it does nothing."""
    return function if MAIN else lambda *args, **kwargs: None


def lost(error):
    """Whether an error says that another process has ended."""
    words = ("connection", "by peer", "timed out", "timeout", "aborted")
    return WORLD > 1 and isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
