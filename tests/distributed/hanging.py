"""Starts groups of three processes that train together, one of which hangs or ends; prints their messages as JSON.

python hanging.py RANK:HOW …
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from mtl.distributed import processes
from mtl.distributed.collectives import any_process, sum_over_processes

COUNT = 3
STEP = 3


def hang(how: str) -> None:
    """Does what makes the other processes wait."""
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "sleep":
        time.sleep(60)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        sys.exit(3)
    elif how == "raise":
        raise TimeoutError("Timed out: the cat sat on it")
    elif how == "interrupt":  # within an operation, as when a process that loads samples dies
        signal.signal(signal.SIGALRM, fail)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        dist.recv(torch.zeros(1), 0)
    elif how == "receive":
        dist.recv(torch.zeros(1), 0)  # which nobody sends


def fail(*_: object) -> None:
    """Raises an error, as a handler of a signal."""
    raise ValueError("the cat sat on it")


def train(rank: int, hanging: int, how: str) -> tuple[str, str]:
    """Trains with the others until one of them hangs; returns the kind of the error and its message."""
    if how == "start" and rank == hanging:
        os.kill(os.getpid(), signal.SIGSTOP)
    step = 0
    try:
        with processes.process_group(30.0 if how == "interrupt" else 3.0):
            try:
                for step in range(1, 6):
                    sum_over_processes(torch.ones(3))
                    if step == STEP and rank == hanging:
                        hang(how)
                    any_process([False])
            except BaseException as error:
                error.add_note(f"at step {step}")
                raise
    except BaseException as error:
        return type(error).__name__, str(error)
    return "", ""


def start(hanging: int, how: str) -> list[int]:
    """Starts a group of processes, and returns the ids of those that end by themselves."""
    store = TCPStore("localhost", 0, None, True, multi_tenant=True, wait_for_workers=False)
    STORES.append(store)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(COUNT)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_RANK": "0"}
    children = []
    for rank in range(COUNT):
        if not (child := os.fork()):
            os.environ["RANK"] = str(rank)
            kind, message = train(rank, hanging, how)
            os.write(1, (json.dumps([f"{hanging}:{how}", rank, kind, message]) + "\n").encode())  # at once
            os._exit(0)
        children.append(child)
    if how in ("stop", "sleep", "start"):
        REMAINING.append(children.pop(hanging))
    return children


STORES: list[TCPStore] = []
REMAINING: list[int] = []

if __name__ == "__main__":
    processes.WAIT, processes.DEFAULT_TIMEOUT = timedelta(seconds=2), 12.0
    for child in [child for each in sys.argv[1:] for child in start(int(each[0]), each[2:])]:
        os.waitpid(child, 0)
    for child in REMAINING:
        os.kill(child, signal.SIGKILL)
