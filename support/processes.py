"""Data parallelism, by `torchrun --nproc_per_node=N train.py ...`; without torchrun all of this does nothing.

--batch_size is that of all processes together. Each takes its share of the images and of the step's random numbers
(StepRandom, data.Batches); then an all-reduce averages the gradients. So N processes take the same steps as one.
"""

import datetime
import hashlib

import torch
import torch.distributed as dist

from support.launch import LOCAL_RANK, LOCAL_WORLD, MAIN, RANK, SHARE, WORLD, main_only  # noqa: F401, for others too

# Long, as the others wait while one measures or loads a dataset. torchrun detects a dead worker at once.
TIMEOUT = datetime.timedelta(days=7)


def start():
    """Connect the processes: gloo for CPU tensors, nccl for GPU tensors. Returns when all are here."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    wait()


def wait():
    """Return when all processes are here."""
    sum_on_host(torch.zeros(1))


def shares(n):
    """The shares (rank, world) of a batch that are the n microbatches of this process."""
    return [(RANK * n + i, WORLD * n) for i in range(n)]


def finish():
    if WORLD > 1 and dist.is_initialized():
        dist.destroy_process_group()


def mean(tensor):
    """The mean of a tensor over the processes (an all-reduce), without gradient."""
    if WORLD == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / WORLD


def average_gradients(parameters):
    """Replace each gradient by its mean over the processes.

    One all-reduce of all gradients after the backward pass. DistributedDataParallel would overlap the two, but needs
    each turn of DMD2 to be the forward of one module that uses all its parameters; and for networks this small the
    transfer takes little time.
    """
    if WORLD > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        # flatten() and view() both follow the order of the indices, for channels_last gradients too.
        torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])


def sum_on_host(tensor):
    """Add up the processes' CPU tensors, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def any_process(flag):
    """Whether the flag is set in any process, so that all take the same decision."""
    return bool(sum_on_host(torch.tensor(int(bool(flag))))) if WORLD > 1 else bool(flag)


def first_of_host(function, *args):
    """Call function(*args) in every process, in one per host before the others, as it may download."""
    result = function(*args) if LOCAL_RANK == 0 else None
    wait()
    return result if LOCAL_RANK == 0 else function(*args)


def from_main(function, *args):
    """Call function(*args) in the main process only and return its result in all."""
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
