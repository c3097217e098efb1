"""Several processes that work together: what torchrun started, on torch.distributed (gloo on CPUs, nccl on GPUs).

A process that torchrun did not start is a team of one, for which nothing here communicates.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.storage.runfolder import resumable

T = TypeVar("T")
Pieces = TypeVar("Pieces", Sequence, Tensor)
# a process may wait for another one as long as an experiment lasts; torchrun notices processes that died
TIMEOUT = timedelta(days=30)


class PeerLost(ValueError):
    """Another process of the job ended, so this one cannot go on."""

    told_elsewhere = True  # that process, or torchrun, says why


class StoppedElsewhere(ValueError):
    """Another process found a reason to stop, and says which."""

    told_elsewhere = True


@dataclass(frozen=True)
class Team:
    """The processes that share a piece of work, numbered by `rank` from 0; rank 0 leads and writes the files.

    Every method that communicates must be called by all of them, in the same order. It raises PeerLost when one of them
    has ended.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True in the process that writes the files."""
        return self.rank == 0

    def share(self, pieces: Pieces) -> Pieces:
        """The part of some pieces that this process works on: every size-th."""
        return pieces[self.rank :: self.size]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, which is the same to the last bit in all of them."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _lost_peers():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def told(self, make: Callable[[], T]) -> T:
        """The result of make() in the leading process, for all of them.

        If make() raises an error, the leading process raises it after the others have raised StoppedElsewhere.
        """
        if self.size == 1:
            return make()
        answer: list = ["stopped", None]
        error: Exception | None = None
        try:
            if self.leads:
                answer = ["result", make()]
        except Exception as raised:  # every error: the others wait for word of it
            error = raised
        with _lost_peers():
            dist.broadcast_object_list(answer, device=torch.device("cpu"))
        if error is not None or answer[0] == "stopped":
            raise error or StoppedElsewhere("the leading process stopped")
        return answer[1]

    def agreed(self, make: Callable[[], T]) -> T:
        """The result of make() in this process, if no process raises an error in it.

        If some do, the first of them raises its error and all others raise StoppedElsewhere, so that it is told once.
        """
        if self.size == 1:
            return make()
        result: T | None = None
        error: Exception | None = None
        try:
            result = make()
        except Exception as raised:  # every error: the others wait for word of it
            error = raised
        failed = self.collect([error is not None])
        if error is not None and not any(failed[: self.rank]):
            raise error
        if any(failed):
            raise StoppedElsewhere("another process stopped") from error
        return cast(T, result)

    def collect(self, own: Sequence[T]) -> list[T]:
        """The results for all pieces, in their order, from those of each process for its `share`."""
        if self.size == 1:
            return list(own)
        parts: list = [None] * self.size
        with _lost_peers():
            dist.all_gather_object(parts, list(own))
        return [parts[index % self.size][index // self.size] for index in range(sum(map(len, parts)))]

    def any(self, flag: bool) -> bool:
        """True if the flag is True in any of the processes."""
        return any(self.collect([bool(flag)]))

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.collect([None])

    def worked(self, state: Path | None, pieces: Sequence, make: Callable, to_plain: Callable, read: Callable) -> list:
        """`resumable`, with the pieces shared out in the team; each process keeps its results in a file of its own."""
        if state is not None and self.size > 1:
            state = state.with_name(f"{state.stem}.{self.rank}of{self.size}.json")
        return self.collect(resumable(state, self.share(pieces), make, to_plain, read))


ALONE = Team()


@contextmanager
def joined(device: str) -> Iterator[tuple[Team, str]]:
    """(the team of all processes that torchrun started, the device of this one) for --device.

    Of several GPUs, `cuda` means the one with the number of the process on its machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # An optimizer imports this module, whose default arguments are the group. If that came later, the group would
    # outlive its end here, with threads that abort the process while Python ends.
    import_module("torch.distributed.nn")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    try:
        yield Team(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


@contextmanager
def _lost_peers() -> Iterator[None]:
    """Turn the errors of torch.distributed, which come when a process has ended, into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(
            "another process of this job ended; see its message, then run the same command again to continue"
        ) from error
