"""What results depend on besides the config: random generators, deterministic algorithms, and number of threads."""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mtl.distributed.collectives import gather_objects, rank, world_size
from mtl.errors import UserError


def seed_all(seed: int) -> None:
    """Seeds the random generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_process(step: int) -> None:
    """Seeds the generators of a process of rank 1 or higher, whose draws, as for dropout, differ from those of rank 0.

    Args:
        step: The number of steps taken, so that the draws of a resumed run differ from the first ones.
    """
    if rank() > 0:
        seed_all(int(np.random.SeedSequence([torch.initial_seed(), step, rank()]).generate_state(1)[0]))


def seed_cpu(seed: int) -> None:
    """Seeds the CPU generators only, because a training in this process may be drawing from those of GPUs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def common_seed() -> int:
    """Returns the seed of PyTorch's generator in the process of rank 0, which a resumed run restores.

    All processes have to call it together.
    """
    seed: int = gather_objects(torch.initial_seed())[0]
    return seed


def use_deterministic_algorithms(wanted: bool) -> None:
    """Makes PyTorch use deterministic algorithms, or raise errors. Call it before the first operation on a GPU."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Sets the number of CPU threads of PyTorch within the block; it affects the order and rounding of sums.

    Raises:
        UserError: If an environment variable could make OpenMP use fewer threads.
    """
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and int(limit) < count:
        raise UserError(f"threads is {count}, and OMP_THREAD_LIMIT in the environment allows {limit}; unset it")
    if count > 1 and os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true":
        raise UserError(f"threads is {count}, and with OMP_DYNAMIC=true in the environment it may be fewer; unset it")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_state() -> dict[str, Any]:
    """Returns the states of all random generators as plain types and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(words), gauss_next],
    }


def random_states() -> dict[str, Any]:
    """Returns the states of the random generators of all processes that train together; nothing for one process."""
    if world_size() == 1:
        return {}
    return {"random_of_processes": gather_objects(random_state())}


def set_random_states(state: Mapping[str, Any], step: int) -> None:
    """Restores the random generators of this process.

    Args:
        state: Contains the state `random` of rank 0, and what `random_states` returned.
        step: The number of steps taken. If there was another number of processes, all but rank 0 are seeded with it.
    """
    states = state.get("random_of_processes", [state["random"]])
    if rank() == 0 or len(states) == world_size():
        set_random_state(states[rank()])
    else:
        seed_process(step)


def set_random_state(state: dict[str, Any]) -> None:
    """Restores the states that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))


def cpu_states() -> tuple[Any, Any, torch.Tensor]:
    """Returns the states of the CPU generators of Python, NumPy and PyTorch."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_cpu_states(states: tuple[Any, Any, torch.Tensor]) -> None:
    """Restores the states that `cpu_states` returned."""
    python, numpy, cpu = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)


@contextmanager
def common_generators(*numbers: int) -> Iterator[None]:
    """Gives all processes the same random draws within the block, which depend on the numbers alone.

    Args:
        numbers: Numbers of at least 0 that are the same in all processes.
    """
    with preserved_generators():
        seed_all(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
        yield


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Restores the random generators after the block, so that the block doesn't affect later draws.

    Saving and restoring takes about 0.1 ms. GPU generators are skipped if no GPU has been used so far.
    """
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else []
    states = cpu_states()
    try:
        yield
    finally:
        set_cpu_states(states)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
