"""The process group of a training that torchrun started."""

import os
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: it would be a default argument there, and not close
from torch._C._distributed_c10d import Store

from mtl.distributed import answers
from mtl.distributed.collectives import Begun
from mtl.distributed.meeting import meet
from mtl.errors import FOREIGN, UserError, describe_error, text_of

WAIT = timedelta(seconds=5)  # for a message of another process
PATIENCE = timedelta(minutes=5)  # for processes that are still starting
DEFAULT_TIMEOUT = 1800.0  # seconds
# NCCL's watchdog aborts a process without a message; before that, gloo notices on the CPU who doesn't answer.
EXTRA_OF_NCCL = timedelta(minutes=2)
CLOSED = re.compile(r"Connection (closed|reset) by peer|gloo/transport")  # in gloo's messages
TIMED_OUT = re.compile(r"gloo/transport.*Timed out waiting")
DISMISSED = "dismissed"  # what the others read in place of the timeout if rank 0 does not train


class Lost(UserError):
    """Raised if another process of the training has ended; the message is that of the other process."""


@contextmanager
def process_group(timeout: float | None = None) -> Iterator[None]:
    """Joins the processes that torchrun started to the default process group within the block.

    GPUs communicate by NCCL, CPUs by gloo. The process of rank 0 reports errors; if it doesn't, another one does.

    Args:
        timeout: The number of seconds after which a process that doesn't answer ends the training, in the process of
            rank 0. The others learn it from there.

    Raises:
        Lost: If another process ends or doesn't answer, or if another process reports the error of this one.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = meet(rank, count, timedelta(seconds=DEFAULT_TIMEOUT))
        if rank == 0:
            store.set("timeout", str(timeout or DEFAULT_TIMEOUT))
        seconds = store.get("timeout").decode()
    except (TimeoutError, dist.DistStoreError) as error:
        text = text_of(error) if rank == 0 else "the process of rank 0 has not started to train"
        raise (UserError if rank < 2 else Lost)(text) from error
    if seconds == DISMISSED:
        store.set(f"left {rank}", "")
        raise Lost("the process of rank 0 ended before the training")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        with answers.answering(store, rank):
            within = timedelta(seconds=float(seconds))
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=within)
            if on_gpu:
                extend(dist.group.WORLD, within)
            yield
            dist.barrier()
    except FOREIGN as error:
        message = _message(store, error, rank, count)
        with suppress(*FOREIGN):
            if rank == 0:
                store.set("reported", "")
            _hang_up(error)
        if rank > 0 and (_is_reported(store) or not _is_first(store)):
            raise Lost(message or text_of(error)) from error
        if message is None:
            raise
        raise (Lost if rank == 0 else UserError)(message) from error
    else:
        dist.destroy_process_group()


def extend(group: Any, within: timedelta) -> None:
    """Gives the communication between the GPUs of a process group more time than that between the CPUs."""
    group._get_backend(torch.device("cuda"))._set_default_timeout(within + EXTRA_OF_NCCL)


def dismiss(count: int) -> None:
    """Lets the processes leave that wait for this one, of rank 0, because it ended before the training."""
    store = meet(0, count, PATIENCE)
    store.set("timeout", DISMISSED)
    store.wait([f"left {rank}" for rank in range(1, count)], PATIENCE)  # the store ends with this process


def send(value: Any) -> None:
    """Sends an object from the process of rank 0 to all others, which receive it by `receive`."""
    dist.broadcast_object_list([value], 0)


def receive() -> Any:
    """Receives the object that the process of rank 0 sends."""
    received = [None]
    dist.broadcast_object_list(received, 0)
    return received[0]


def _hang_up(error: BaseException) -> None:
    """Closes the connections, so that the other processes stop waiting for this one."""
    Begun.forget()
    each: BaseException | None = error
    while each is not None:  # a group that a frame refers to, as after a signal within an operation, stays connected
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    if not torch.cuda.is_available():
        dist.destroy_process_group()
    elif abort := getattr(dist.group.WORLD, "abort", None):  # torch 2.7 or later; doesn't wait for the GPU
        abort()


def _message(store: Store, error: BaseException, rank: int, count: int) -> str | None:
    """Returns the reason why another process ended the training; None if the error arose in this process."""
    texts = [text_of(error), *([text_of(error.__cause__)] if error.__cause__ else [])]
    late = isinstance(error, dist.DistStoreError) or any(TIMED_OUT.search(text) for text in texts)
    if late or isinstance(error, dist.DistBackendError) or any(CLOSED.search(text) for text in texts):
        when = "".join(f" {note}" for note in getattr(error, "__notes__", []))
        with suppress(*FOREIGN):
            return answers.reason(store, rank, count, WAIT, late=late, when=when)
        return f"a process of this training ended{when} without a message; it may have been killed"
    with suppress(*FOREIGN):
        text = text_of(error) if isinstance(error, UserError) else describe_error(error)
        answers.report(store, f"rank {rank}: {text}" if rank else text)
    return None


def _is_reported(store: Store) -> bool:
    """Waits a moment, and returns whether the process of rank 0 reports the error."""
    with suppress(*FOREIGN):
        store.wait(["reported"], 4 * WAIT)
        time.sleep(WAIT.total_seconds())  # for rank 0 to write its files; its end usually ends this process
        return True
    return False


def _is_first(store: Store) -> bool:
    """Returns whether this process is the first to report; on each node one is, if the store ended with rank 0."""
    with suppress(*FOREIGN):
        return store.add("printed", 1) == 1
    return os.environ.get("LOCAL_RANK") == "0"
