"""Several processes as one run, started by `torchrun --nproc_per_node=N train.py ...`; without it nothing of this acts.

--batch_size stays the images of a step in all: each process takes its share of them and of the step's random numbers
(StepRandom, data.Batches), then the gradients are averaged. So N processes take the steps that one would.
"""

import datetime
import hashlib
import os

import torch
import torch.distributed as dist

LAUNCHED = dist.is_available() and dist.is_torchelastic_launched()
RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (
    int(os.environ[name]) if LAUNCHED else default
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
)
SHARE = RANK, WORLD                                 # which of how many shares of a batch is this process's
MAIN = RANK == 0                                    # the process that writes
# The others wait while one measures, or loads a dataset. That one has died is torchrun's to see, at once.
TIMEOUT = datetime.timedelta(hours=2)


def start():
    """Connect the processes: gloo between their hosts, nccl between their GPUs. Returns when all are there."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    sum_on_host(torch.zeros(1))


def lost(error):
    """Whether an error says that another process is gone."""
    words = ("connection", "by peer", "timed out", "timeout", "aborted")
    return WORLD > 1 and isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def finish():
    if WORLD > 1 and dist.is_initialized():
        dist.destroy_process_group()


def main_only(function):
    """Decorates what only the main process does; in the others it does nothing."""
    return function if MAIN else lambda *args, **kwargs: None


def mean(tensor):
    """The mean of the processes' tensors, without gradient."""
    if WORLD == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / WORLD


def batch_mean(tensor):
    """The mean over the whole batch, of which each process has a share [B, ...]; without gradient."""
    return mean(tensor.mean())


def average_gradients(parameters):
    """Replace each gradient by its mean over the processes.

    One sum of all of them after the backward pass, where DistributedDataParallel would start on the first during it:
    that wants each turn of DMD2 to be the forward of one module, and every parameter of it to take part, to hide a
    transfer that is small for these networks.
    """
    if WORLD > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        # A channels_last gradient is flattened in the order of its indices, and filled in the same order.
        torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])


def sum_on_host(tensor):
    """Add up the processes' CPU tensors, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def any_process(flag):
    """Whether the flag is set in any process: what one decides, all must."""
    return bool(sum_on_host(torch.tensor(int(bool(flag))))) if WORLD > 1 else bool(flag)


def first_of_host(function, *args):
    """function(*args) in every process, in one of each host before the others: it may download."""
    result = function(*args) if LOCAL_RANK == 0 else None
    sum_on_host(torch.zeros(1))
    return result if LOCAL_RANK == 0 else function(*args)


def from_main(function, *args):
    """function(*args), called in the main process alone, its result known to all."""
    if WORLD == 1:
        return function(*args)
    result = [function(*args) if MAIN else None]
    dist.broadcast_object_list(result)
    return result[0]


def same(*modules):
    """Whether the modules' weights are bit-identical in all processes."""
    if WORLD == 1:
        return True
    digest = hashlib.sha256()
    for module in modules:
        for value in module.state_dict().values():
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digests = [None] * WORLD
    dist.all_gather_object(digests, digest.hexdigest())
    return len(set(digests)) == 1
