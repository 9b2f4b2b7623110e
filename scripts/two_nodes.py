"""Trains on two nodes, kills one of them, and compares the end with that of an undisturbed training, bit for bit.

    sudo python scripts/two_nodes.py [--cases shared,own,store,moved,cut]

The nodes are network namespaces, joined by a pair of virtual Ethernet devices, on one machine: needs root and `ip` of
iproute2. Each node has one process. A node is killed by killing all of its processes, the agent of torchrun included,
and is started again by the same command. The cases:

- shared: both nodes work in one folder. The second node is killed.
- own: each node works in a folder of its own. The second node is killed; the run is on the first one only.
- store: one folder; the first node is killed, which has rank 0 and torchrun's store. The other one ends as well, and
  both are started again.
- moved: as own and store, but rank 0 is on the second node afterwards. This is refused, and the run continues when
  rank 0 is on the first node again.
- cut: one folder; the second node loses its connection before it is killed, so that nobody tells the first one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PORT = 29400
PATIENCE = 300  # seconds
SLOW = """
import time


def rest(trainer, result):
    time.sleep(0.1)
"""
TRAINING = (
    *("task=mnist_two_head", "balancer=mgda", "optimizer=sgd", "optimizer.lr=0.05", "model.trunk.dropout=0.2"),
    *("data.batch_size=250", "trainer.max_epochs=2", "checkpoint.every_steps=3", "resume=auto", "trainer.timeout=20"),
    "callbacks={a: {_target_: slow.rest, _partial_: true}}",
)


class Node:
    """A network namespace with an address, in which an agent of torchrun runs.

    Args:
        number: The number of the node: 1 or 2. The sorted addresses of the nodes give the ranks.
        folder: The folder in which it works.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.device, self.folder = f"mtl-node-{number}", f"mtl-veth-{number}", folder
        self.address = f"10.77.0.{number}"
        self.log = folder / f"node-{number}.txt"
        folder.mkdir(exist_ok=True)
        (folder / "slow.py").write_text(SLOW)

    def start(self, address: str | None = None) -> None:
        """Starts torchrun, with another address than the usual one if it is given."""
        # Otherwise, an agent that survives doesn't tell a new one the address of its store: both end after a minute.
        settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": self.device, **settings}
        agent = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
        meeting = [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=10.77.0.1:{PORT}",
            f"--local-addr={address or self.address}",
        ]
        if self.address == "10.77.0.1":
            meeting.append("--rdzv-conf=is_host=1")
        command = [sys.executable, *agent, *meeting, "-m", "mtl.train", *TRAINING]
        with self.log.open("a") as log:
            inside = ["ip", "netns", "exec", self.name, *command]
            self.agent = subprocess.Popen(inside, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def wait(self) -> int:
        """Returns the exit code of the agent."""
        return self.agent.wait(PATIENCE)

    def kill(self) -> None:
        """Kills all processes of the node."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        subprocess.run(["kill", "-9", *listed.stdout.split()], check=False)
        self.agent.wait()

    def connect(self, state: str) -> None:
        """Turns the connection to the other node `up` or `down`."""
        ip("-n", self.name, "link", "set", self.device, state)


def ip(*arguments: str) -> None:
    """Runs `ip`."""
    subprocess.run(["ip", *arguments], check=True)


def join(nodes: list[Node]) -> None:
    """Makes the namespaces, and joins them."""
    part(nodes)
    for node in nodes:
        ip("netns", "add", node.name)
    ip("link", "add", nodes[0].device, "type", "veth", "peer", "name", nodes[1].device)
    for node in nodes:
        ip("link", "set", node.device, "netns", node.name)
        ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.device)
        ip("-n", node.name, "address", "add", f"10.77.0.{3 + nodes.index(node)}/24", "dev", node.device)
        ip("-n", node.name, "link", "set", "lo", "up")
        node.connect("up")


def part(nodes: list[Node]) -> None:
    """Removes the namespaces, and the devices with them."""
    existing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for node in nodes:
        if node.name in existing:
            ip("netns", "delete", node.name)


def runs(folder: Path) -> list[Path]:
    """Returns the folders of the runs of a node."""
    return [path.parent for path in folder.glob("outputs/*/*/config.yaml")]


def wait_for_steps(folder: Path, steps: int) -> None:
    """Waits until a run has saved its state after so many steps."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for path in folder.glob("outputs/*/*/checkpoints/last.pt"):
            if torch.load(path, weights_only=True)["global_step"] >= steps:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no state in {folder} after {PATIENCE} s")


def disturb(case: str, first: Node, second: Node) -> None:
    """Trains, kills a node, and starts it again."""
    for node in (first, second):
        node.start()
    wait_for_steps(first.folder, 6)
    if case in ("store", "moved"):
        first.kill()
        assert second.wait() != 0, "the second node goes on without torchrun's store"
        if case == "moved":
            first.start("10.77.0.3")
            second.start()
            for node in (first, second):
                assert node.wait() != 0, "rank 0 has begun anew on the second node"
            assert "resume=auto: the node of rank 1" in second.log.read_text(), second.log.read_text()
        first.start()
    elif case == "cut":
        second.connect("down")
        second.kill()
        time.sleep(25)  # longer than trainer.timeout
        second.connect("up")
    else:
        second.kill()
    second.start()
    check_ends(first, second)


def check_ends(*nodes: Node) -> None:
    """Checks that the training has ended well on all nodes."""
    codes = [node.wait() for node in nodes]
    assert codes == [0, 0], "\n".join(f"{node.log}:\n{node.log.read_text()}" for node in nodes)


def end_of(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the parameters at the end of the only run of a node."""
    (run,) = runs(folder)
    model: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]
    return model


def main() -> None:
    """Runs the cases, and prints how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="shared,own,store,moved,cut")
    cases = parser.parse_args().cases.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        undisturbed = [Node(number, root / "calm") for number in (1, 2)]
        try:
            join(undisturbed)
            for node in undisturbed:
                node.start()
            check_ends(*undisturbed)
            expected = end_of(root / "calm")
            print("undisturbed: done")
            for case in cases:
                is_own = case in ("own", "moved")
                nodes = [Node(number, root / (f"{case}-{number}" if is_own else case)) for number in (1, 2)]
                join(nodes)
                disturb(case, *nodes)
                ours = end_of(nodes[0].folder)
                assert ours.keys() == expected.keys()
                assert all(torch.equal(ours[name], value) for name, value in expected.items()), f"{case}: other bits"
                assert not is_own or not runs(nodes[1].folder), "the second node has a run as well"
                print(f"{case}: the end is that of the undisturbed training, bit for bit")
        finally:
            part(undisturbed)


if __name__ == "__main__":
    main()
