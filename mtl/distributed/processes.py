"""The process group of a training that torchrun started."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mtl.errors import FOREIGN, UserError, describe_error, text_of

WAIT = timedelta(seconds=5)  # for a message of another process


class Lost(UserError):
    """Raised if another process of the training has ended; the message is that of the other process."""


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started to the default process group within the block.

    GPUs communicate by NCCL, CPUs by gloo.

    Raises:
        Lost: If another process ends within the block, or if the process of rank 0 reports the error of this one.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_master = number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = TCPStore(address, port, count, is_master, multi_tenant=True)
    # After a restart, processes would otherwise read the addresses of those that were killed.
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        yield
        dist.barrier()
    except FOREIGN as error:
        with suppress(*FOREIGN):
            if number == 0:
                store.set("reported", "")
            dist.destroy_process_group()  # the other processes stop waiting for this one
        if not _is_of_another(error):
            _describe(store, error)
            if number == 0 or not isinstance(error, UserError) or not _is_reported(store):
                raise
        raise Lost(_described(store)) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def send(value: Any) -> None:
    """Sends an object from the process of rank 0 to all others, which receive it by `receive`."""
    dist.broadcast_object_list([value], 0)


def receive() -> Any:
    """Receives the object that the process of rank 0 sends."""
    received = [None]
    dist.broadcast_object_list(received, 0)
    return received[0]


def _is_of_another(error: BaseException) -> bool:
    """Returns whether an error was caused by the end of another process."""
    texts = [text_of(error), *([text_of(error.__cause__)] if error.__cause__ else [])]
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/transport")
    return isinstance(error, dist.DistBackendError) or any(word in text for word in words for text in texts)


def _describe(store: Store, error: BaseException) -> None:
    """Leaves the message of the first error for the other processes."""
    with suppress(*FOREIGN):
        if store.add("errors", 1) == 1:
            store.set("error", text_of(error) if isinstance(error, UserError) else describe_error(error))


def _is_reported(store: Store) -> bool:
    """Waits a moment, and returns whether the process of rank 0 reports the error of this one."""
    with suppress(*FOREIGN):
        store.wait(["reported"], WAIT)
        time.sleep(WAIT.total_seconds())  # for rank 0 to write its files; its end usually ends this process
        return True
    return False


def _described(store: Store) -> str:
    """Returns the message of the first error, which another process has left."""
    with suppress(*FOREIGN):
        store.wait(["error"], WAIT)
        return str(store.get("error").decode())
    return "a process of this training ended without a message; it may have been killed, or have run out of memory"
