"""One process or many: what torchrun started, values exchanged between the hosts, gradients summed over all processes.

Gradients are summed by us after the backward pass, not by DistributedDataParallel during it. That is exact in every case that the two
stages have: networks that are frozen in one phase and trained in the other, several batches a step, a process whose batch holds nothing
to paint, losses whose mean is over the samples of all processes. It costs that the exchange does not overlap the backward pass.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ftengine.errors import ConfigError, FtengineError

T = TypeVar("T")
_BUCKET_ELEMENTS = 1 << 24  # of gradients that are summed at a time: 64 MB of float32 beside them


@dataclass(frozen=True)
class World:
    """The processes of a run. One process is a world of size 1, where every method does nothing or gives back what it was given."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def gather(self, item: T) -> list[T]:
        """``item`` of every process, in the order of their ranks; anything that pickles, through the host."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with _naming_the_cause():
            dist.all_gather_object(items, item)
        return items

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all processes, in place, on its device."""
        if self.size > 1:
            with _naming_the_cause():
                dist.all_reduce(values)
        return values

    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the tensors of rank 0, in place."""
        if self.size > 1:
            with _naming_the_cause(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes; one that a process does not have counts as 0 there."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        with _naming_the_cause():
            for bucket in _buckets(gradients):
                flat = torch.cat([g.reshape(-1) for g in bucket])
                dist.all_reduce(flat)
                for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(summed.view_as(gradient))


ALONE = World()


def world_of_environment() -> World:
    """What torchrun's variables say; one process where they are not set. Raises ConfigError where they contradict one another."""
    try:
        rank, size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
    except ValueError as error:
        raise ConfigError(
            f"RANK, WORLD_SIZE, LOCAL_RANK: want whole numbers, as torchrun sets them ({error})."
        ) from error
    if not 0 <= rank < size:
        raise ConfigError(
            f"RANK={rank}, WORLD_SIZE={size}: want 0 <= RANK < WORLD_SIZE. Start the processes with torchrun."
        )
    return World(rank, size, local_rank)


def device_name_for(name: str, world: World) -> str:
    """The device of this process: with several, ``auto`` and ``cuda`` are the GPU of its number on this machine.

    Raises ConfigError where a machine has fewer GPUs than processes, or all are told to share one.
    """
    if world.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in {"auto", "cuda"}:
        raise ConfigError(
            f"device={name}: {world.size} processes cannot share one GPU. Use device=cuda, or start one process."
        )
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={world.local_rank}: this machine has {torch.cuda.device_count()} CUDA devices. Start as many processes "
            "(torchrun --nproc-per-node), or use device=cpu."
        )
    return f"cuda:{world.local_rank}"


@contextmanager
def joined(*, patience: timedelta | None = None) -> Iterator[World]:
    """Inside the block, the processes that torchrun started can talk to each other: nccl between GPUs, gloo between hosts.

    patience: how long one waits for another; None is torch's own (10 to 30 minutes). A group that the caller has made is used and left as it
    is.
    """
    world = world_of_environment()
    if world.size == 1 or dist.is_initialized():
        yield world
        return
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpus:
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo", rank=world.rank, world_size=world.size, timeout=patience
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= _BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


@contextmanager
def _naming_the_cause() -> Iterator[None]:
    """A collective fails where another process has ended; what that one said is the cause."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise FtengineError(
            f"another process of this run has ended or cannot be reached ({' '.join(str(error).split())[:200]}). Its own message, above or in "
            "torchrun's log, says why; go on with --resume."
        ) from error
