"""A check of `resume=auto` on several nodes: none may have a later state of the run than the node of rank 0."""

import os
import socket
from pathlib import Path
from typing import Any

from mtl.cli import processes
from mtl.errors import FOREIGN, UserError, first_line
from mtl.runs.resume import config_of, finished, forbidden
from mtl.safety import archive
from mtl.text import log


def check_no_later_state(config: dict[str, Any], folder: Path, *, is_resumed: bool) -> None:
    """Checks that `resume=auto` has found the newest run. All processes have to call it together.

    Each node may have a folder of its own for the runs, and after a restart, rank 0 may be on another node.

    Args:
        config: The checked config.
        folder: The folder of the run that rank 0 has chosen.
        is_resumed: Whether there is a state in that folder.

    Raises:
        UserError: In all processes, if another node has a state that rank 0's node doesn't have.
    """
    if config["resume"] != "auto" or processes.count() == 1:
        return
    from mtl.distributed.collectives import gather_objects, rank

    looks = rank() > 0 and os.environ["LOCAL_RANK"] == "0"  # once on a node
    root = Path(config["output_root"], folder.parent.name).absolute()  # may be another folder on each node
    gathered = gather_objects((socket.gethostname(), str(root), _states(root, config) if looks else {}))
    refused = None
    if rank() == 0:  # it looks last, so that it doesn't miss what has just been written to a folder of all nodes
        chosen = folder.name if is_resumed else ""
        for number, (host, theirs, states) in enumerate(gathered):
            for name, state in states.items():
                known = archive.manifest(folder.parent / name / "checkpoints")
                if name >= chosen and not any(state in checksums for checksums in known.values()):
                    refused = number, host, os.path.join(theirs, name)
    if found := gather_objects(refused)[0]:
        number, host, where = found
        raise UserError(
            f"resume=auto: the node of rank {number} ({host}) has a state of this run in {where} that the node of rank "
            f"0 ({gathered[0][0]}) does not have. Set output_root to a folder that all nodes share, or copy this "
            "folder to the node of rank 0. A state that is no longer needed can be removed"
        )


def _states(root: Path, config: dict[str, Any]) -> dict[str, str]:
    """Returns the checksum of the newest state of each unfinished run with this config, by the name of the run."""
    states: dict[str, str] = {}
    for path in sorted(root.glob("*/config.yaml")):
        try:
            if finished(path.parent) is None and not forbidden(config_of(path.parent), config):
                saved = archive.manifest(path.parent / "checkpoints").get("last.pt", [])
                states |= {path.parent.name: saved[-1]} if saved else {}
        except FOREIGN as error:  # as in `newest_unfinished`
            log.warning("%s is skipped: %s", path.parent, first_line(error))
    return states
