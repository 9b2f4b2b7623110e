"""Jobs of several processes, which submitit starts for `hydra.launcher.tasks_per_node`, without torchrun."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hydra.core.hydra_config import HydraConfig

from mtl.cli import processes
from mtl.errors import FOREIGN

PORTS = 20000, 32767  # below those that the system gives to outgoing connections


def join() -> None:
    """Sets the variables that torchrun would set, if submitit started this process for a job of several processes.

    submitit's signal before the time limit becomes a SIGTERM, after which a run is saved. submitit's own handler would
    raise an error in the middle of a step, in the process of rank 0 only.
    """
    if not str(HydraConfig.get().runtime.choices["hydra/launcher"]).startswith("submitit"):
        return
    from submitit import JobEnvironment

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))
    job = JobEnvironment()
    if job.num_tasks == 1:
        return
    os.environ |= {
        "RANK": str(job.global_rank),
        "LOCAL_RANK": str(job.local_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "MASTER_ADDR": "localhost" if job.num_nodes == 1 else job.hostnames[0],
        "MASTER_PORT": str(random.Random(job.job_id).randint(*PORTS)),  # the same in all processes of the job
    }


@contextmanager
def dismissing() -> Iterator[None]:
    """Lets the other processes of this job leave if the block ended before the training, which they wait for.

    torchrun ends them by itself.
    """
    try:
        yield
    finally:
        if processes.count() > 1 and "TORCHELASTIC_RUN_ID" not in os.environ and not processes.have_met():
            from mtl.distributed.processes import dismiss

            with suppress(*FOREIGN):
                dismiss(processes.count())
