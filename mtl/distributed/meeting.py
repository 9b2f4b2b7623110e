"""The store through which the processes of a training find each other."""

import os
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

INTERVAL = 0.05  # seconds between two looks at who has come


def meet(rank: int, count: int, within: timedelta) -> Store:
    """Connects to the store of torchrun, or of rank 0, and waits for the other processes.

    torchrun's store survives a restart, and has the addresses of the processes that were killed. The number of restarts
    doesn't tell one start from another: a node that was replaced has counted fewer than the others. So the process of
    rank 0 draws a name for each start, and tells it to those that ask. A process answers under this name, by which
    rank 0 knows that it isn't one that has gone.

    Args:
        rank: The number of this process.
        count: The number of processes.
        within: How long to wait for the others.

    Returns:
        A part of the store that only the processes of this start use.

    Raises:
        TimeoutError: In the process of rank 0, if another one does not come.
    """
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, count, is_master, within, multi_tenant=True)
    if rank > 0:
        ask = uuid.uuid4().hex
        store.set(f"asks {rank}", ask)
        ours = PrefixStore(store.get(f"name for {ask}").decode(), store)
        ours.set(f"here {rank}", "")
        return ours
    name = uuid.uuid4().hex
    ours = PrefixStore(name, store)
    absent, end = set(range(1, count)), time.monotonic() + within.total_seconds()
    while absent:
        for other in sorted(absent):
            if store.check([f"asks {other}"]):
                store.set(f"name for {store.get(f'asks {other}').decode()}", name)
        absent = {other for other in absent if not ours.check([f"here {other}"])}
        if absent and time.monotonic() > end:
            raise TimeoutError(f"the process of rank {', '.join(map(str, sorted(absent)))} has not started")
        time.sleep(INTERVAL if absent else 0)
    return ours
