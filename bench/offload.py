"""Offloaded training on a GPU: the model there in bfloat16, float32 masters and moments on the host.

    python bench/offload.py [--turns N]   # needs a GPU and a CUDA build of torch; writes bench/results/offload.json

A step is a forward and a backward pass of a GPT of 184 M parameters, the gradients' way to the host, the optimizer's
step there, and the way of the weights back. "backward" runs only the two passes, "transfers" everything but the
optimizer's step. Contenders take turns, each in a process of its own, and are compared with PyTorch first.
"""

from __future__ import annotations

import argparse
import queue
import threading
from collections.abc import Callable

from common import Contender, Worker, take_turns, write_json

RATE, CLIP = 1e-4, 1.0
SIZE = {"width": 1024, "blocks": 12, "words": 32000, "context": 512}
SMALL = {"width": 64, "blocks": 2, "words": 100, "context": 8}
BATCH, BUCKET = 16, 32 << 20  # bytes of gradients
WAYS = ("torch", "fastadam", "overlap")
UNTIL_SETTLED = 40  # steps before the first that is timed


class Offloaded:
    """A model on the GPU, and what is on the host: masters, and pinned weights and gradients."""

    def __init__(self, size: dict[str, int]) -> None:
        import torch
        from models import small_gpt

        self.model = small_gpt(**size).cuda().bfloat16()
        self.params = list(self.model.parameters())
        self.masters = [torch.nn.Parameter(p.detach().float().cpu()) for p in self.params]
        self.weights = [p.detach().cpu().pin_memory() for p in self.params]
        self.gradients = [torch.empty_like(weight).pin_memory() for weight in self.weights]
        generator = torch.Generator().manual_seed(1)
        shape = (BATCH, size["context"])
        self._batches = [torch.randint(size["words"], shape, generator=generator).cuda() for _ in range(4)]
        self._count = 0

    def backward(self) -> None:
        self._count += 1
        self.model(self._batches[self._count % len(self._batches)]).backward()

    def to_host(self) -> None:
        import torch

        for param, gradient in zip(self.params, self.gradients, strict=True):
            gradient.copy_(param.grad, non_blocking=True)
            param.grad = None
        torch.cuda.synchronize()

    def to_device(self) -> None:
        import torch

        with torch.no_grad():
            for param, weight in zip(self.params, self.weights, strict=True):
                param.copy_(weight, non_blocking=True)
        torch.cuda.synchronize()


def by_torch(training: Offloaded, *, clip: bool) -> Callable[[], None]:
    import torch

    masters = training.masters
    optimizer = torch.optim.AdamW(masters, lr=RATE, fused=True)
    for master in masters:
        master.grad = torch.empty_like(master)

    def step() -> None:
        training.backward()
        training.to_host()
        for master, gradient in zip(masters, training.gradients, strict=True):
            master.grad.copy_(gradient)
        if clip:
            torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, training.weights, strict=True):
                weight.copy_(master)
        training.to_device()

    return step


def adamw(training: Offloaded, *, clip: bool):
    """fastadam's, which reads the bfloat16 gradients and writes the bfloat16 weights."""
    import fastadam.torch

    group = {"params": training.masters, "compute_params": training.weights}
    for master, gradient in zip(training.masters, training.gradients, strict=True):
        master.grad_dtype = gradient.dtype
        master.grad = gradient
    return fastadam.torch.AdamW([group], lr=RATE, global_clipnorm=CLIP if clip else None)


def by_fastadam(training: Offloaded, *, clip: bool) -> Callable[[], None]:
    optimizer = adamw(training, clip=clip)

    def step() -> None:
        training.backward()
        training.to_host()
        optimizer.step()
        training.to_device()

    return step


def overlapped(training: Offloaded, *, clip: bool) -> Callable[[], None]:
    """Buckets of gradients are stepped as they arrive, by a thread that waits for their copies."""
    import torch

    optimizer, side = adamw(training, clip=clip), torch.cuda.Stream()
    arriving: queue.SimpleQueue = queue.SimpleQueue()
    place = {id(param): k for k, param in enumerate(training.params)}
    bucket: list[int] = []

    def send() -> None:
        if bucket:
            arriving.put((side.record_event(), [training.masters[k] for k in bucket]))
            bucket.clear()

    def copy(param) -> None:
        k = place[id(param)]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            training.gradients[k].copy_(param.grad, non_blocking=True)
        param.grad.record_stream(side)
        param.grad = None
        bucket.append(k)
        if sum(training.gradients[k].nbytes for k in bucket) > BUCKET:
            send()

    def work() -> None:
        while (item := arriving.get()) is not None:
            event, masters = item
            event.synchronize()
            optimizer.step_bucket(masters)

    for param in training.params:
        param.register_post_accumulate_grad_hook(copy)

    def step() -> None:
        optimizer.begin_step(early=True)
        worker = threading.Thread(target=work)
        worker.start()
        training.backward()
        send()
        arriving.put(None)
        worker.join()
        optimizer.end_step()
        training.to_device()

    return step


STEPS = {"torch": by_torch, "fastadam": by_fastadam, "overlap": overlapped}


def compare(way: str, *, clip: bool) -> None:
    """With PyTorch, on a small model: passes on a GPU do not repeat to the bit, so the mean update is compared."""
    trained = []
    for other in ("torch", way):
        training = Offloaded(SMALL)
        before = [master.detach().clone() for master in training.masters]
        step = STEPS[other](training, clip=clip)
        for _ in range(3):
            step()
        trained.append([a.detach() - b for a, b in zip(training.masters, before, strict=True)])
    differences = [float((a - b).abs().mean() / a.abs().mean()) for a, b in zip(*trained, strict=True)]
    assert max(differences) < 0.05, f"{way}: updates differ from PyTorch's by {max(differences):.1%}"


def training_step(sizes: list[int], way: str, clip: bool = False) -> Contender:
    import torch

    if way in STEPS:
        compare(way, clip=clip)
        step = STEPS[way](Offloaded(SIZE), clip=clip)
        for _ in range(UNTIL_SETTLED if way == "overlap" else 3):
            step()
        return Contender(step)
    training = Offloaded(SIZE)

    def step_of_nobody() -> None:
        training.backward()
        if way == "transfers":
            training.to_host()
            training.to_device()
        else:
            training.model.zero_grad()
            torch.cuda.synchronize()

    return Contender(step_of_nobody)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    import torch

    named = {"backward": {"way": "backward"}, "transfers": {"way": "transfers"}}
    named |= {way: {"way": way} for way in WAYS} | {f"{way}, clipped": {"way": way, "clip": True} for way in WAYS}
    workers: list[Worker] = []
    try:
        for name, options in named.items():
            workers.append(Worker("offload.training_step", [], **options))
            workers[-1].name = name
        seconds = take_turns(workers, arguments.turns, seconds_per_turn=0.5)
    finally:
        for worker in workers:
            worker.close()
    for name, time in seconds.items():
        left = time - seconds["transfers"]
        print(f"{name:<20}{time * 1e3:>9.2f} ms, {left * 1e3:>8.2f} ms more than the transfers", flush=True)
    device = torch.cuda.get_device_name()
    write_json("offload", [{"device": device, "model": SIZE, "batch": BATCH, "seconds": seconds}])


if __name__ == "__main__":
    main()
