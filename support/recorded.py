"""A training step as one launch: CUDA graph capture of its kernels, once, and replay in the steps that follow.

    @recorded(device, args.compile)
    def train_step(rngs, x_0, labels, factor):      # batch, loss, backward, optimizer, EMA
        ...
        return dict(loss=loss)                      # 0-d tensors, to be logged

    log = train_step([StepRandom(seed, step, device)], x_0, labels, lr_factor(step, args))

Launched one by one, the kernels of a step kept an H200 busy for only half of its time (results/README.md, "Speed"). A
replay runs the same kernels on the same memory, so all that changes from step to step must lie in fixed memory: the
random numbers, still drawn by (seed, step), tensors, and floats as 0-d tensors. Any other argument may change which
kernels run, so each of its values gets a CUDA graph of its own. Within the step no number may be copied from or to the
GPU: no item(), no `if tensor`, no Python number in torch.where.

Follows torch's notes on CUDA graphs, "Whole-network capture" (docs.pytorch.org/docs/stable/notes/cuda.html).
"""

import torch

from support import processes

WARM_UP = 3                                         # calls before the capture: they compile, and allocate what persists


def recorded(device, wanted):
    """Decorator of a training step: Recorded if wanted and on a single GPU; otherwise the step itself."""
    records = wanted and device.type == "cuda" and processes.WORLD == 1
    return Recorded if records else lambda step: step


class Recorded:
    """A training step (rngs, *arguments) -> dict of 0-d tensors: called WARM_UP times, then captured and replayed.

    Raises RuntimeError if the step cannot be captured.
    """

    def __init__(self, step):
        self.step, self.recordings = step, {}

    def __call__(self, rngs, *arguments):
        key = tuple(key_of(argument) for argument in arguments)
        if key not in self.recordings:
            self.recordings[key] = Recording(self, arguments, rngs[0].device)
        return self.recordings[key](rngs, arguments)

    def warm_up(self, call):
        """Run call() on the stream of the capture: autograd remembers on which stream a weight was first used."""
        stream, current = self.stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = call()
        current.wait_stream(stream)
        return result

    def record(self, call):
        """Capture call(). Returns a function that replays it and returns its tensor, in the same memory each time."""
        graph, stream = torch.cuda.CUDAGraph(), self.stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=stream):
                result = call()
        except RuntimeError as error:
            raise RuntimeError(f"this step cannot be recorded, try --no-record: {error}") from error

        def replay():
            graph.replay()
            return result

        return replay

    def stream(self):
        """The stream of warm-ups and captures.

        All graphs share one memory pool: no two run at once, and none needs what another left in it.
        """
        if not hasattr(self, "side"):
            self.side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        return self.side


class Recording:
    """The CUDA graph of a step, for arguments of one key (see key_of)."""

    def __init__(self, recorded, arguments, device):
        self.recorded, self.calls, self.replay = recorded, 0, None
        self.memory = [fixed(argument, device) for argument in arguments]

    def __call__(self, rngs, arguments):
        refill(self.memory, arguments)
        self.calls += 1
        if self.calls <= WARM_UP:
            listeners = [Listener(rng) for rng in rngs]
            log = self.recorded.warm_up(lambda: self.recorded.step(listeners, *self.memory))
            self.names, self.requests = list(log), [listener.requests for listener in listeners]
            return {name: value.detach() for name, value in log.items()}
        numbers = [
            getattr(rng, name)(*args) for rng, requests in zip(rngs, self.requests, strict=True)
            for name, args in requests
        ]
        if self.replay is None:
            self.numbers = numbers
            self.replay = self.recorded.record(self.logged)
        elif numbers:
            refill(self.numbers, numbers)
        # A copy, as the next replay overwrites the tensor.
        return dict(zip(self.names, self.replay().clone().unbind(), strict=True))

    def logged(self):
        numbers = iter(self.numbers)
        prompters = [Prompter(requests, [next(numbers) for _ in requests]) for requests in self.requests]
        log = self.recorded.step(prompters, *self.memory)
        return torch.stack([log[name].detach().float() for name in self.names])


class Listener:
    """Passes requests on to a StepRandom, and remembers them."""

    def __init__(self, rng):
        self.rng, self.requests = rng, []

    def __getattr__(self, name):
        def draw(*args):
            self.requests.append((name, args))
            return getattr(self.rng, name)(*args)

        return draw


class Prompter:
    """Stands in for a StepRandom in a capture: answers the requests of a Listener, in order, from fixed memory."""

    def __init__(self, requests, numbers):
        self.answers = zip(requests, numbers, strict=True)

    def __getattr__(self, name):
        def draw(*args):
            request, numbers = next(self.answers, (None, None))
            if request != (name, args):
                raise RuntimeError(f"it asked for {request} before, now for {(name, args)}")
            return numbers

        return draw


def key_of(argument):
    if torch.is_tensor(argument):
        return argument.shape
    return float if isinstance(argument, float) else argument


def fixed(argument, device):
    """Fixed memory for arguments like this one: for a tensor or a float; any other argument is returned."""
    if torch.is_tensor(argument):
        return torch.empty_like(argument)
    return torch.empty((), device=device) if isinstance(argument, float) else argument


def refill(memory, arguments):
    for place, argument in zip(memory, arguments, strict=True):
        if isinstance(argument, float):
            place.fill_(argument)
        elif torch.is_tensor(argument):
            place.copy_(argument)
