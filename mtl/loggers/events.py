"""Writes TensorBoard's event files without a thread."""

import io
import itertools
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl.files import Appended

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_COUNT = itertools.count()


class EventFile:
    """An event file that replaces torch's own, whose thread ends with a traceback on a full disk.

    Events that can't be written stay in memory until they can be.

    Args:
        folder: The folder in which the file is created.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata

        self._folder = folder
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{next(_COUNT)}"
        self._file = Appended(folder / name)
        self.add_event(Event(file_version="brain.Event:2", source_metadata=SourceMetadata(writer="mtl.loggers")))

    def get_logdir(self) -> str:
        """Returns the folder of the file."""
        return str(self._folder)

    def add_event(self, event: Any, step: int | None = None, walltime: float | None = None) -> None:
        """Adds an event, which the next `flush` writes."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.hold(record.getvalue())

    def add_summary(self, summary: Any, global_step: int | None = None, walltime: float | None = None) -> None:
        """Adds a summary to the TensorBoard event file; the next `flush` writes it."""
        from tensorboard.compat.proto.event_pb2 import Event

        self.add_event(Event(summary=summary), global_step, walltime)

    def flush(self) -> None:
        """Writes the events that were added.

        Raises:
            OSError: If the events can't be written; they stay in memory.
        """
        self._file.flush()

    def close(self) -> None:
        """Writes the events that were added, and closes the file.

        Raises:
            OSError: If some events can't be written.
        """
        self._file.close()


def summary_writer(folder: Path) -> "SummaryWriter":
    """Returns torch's SummaryWriter with an `EventFile` in the folder."""
    from torch.utils.tensorboard import SummaryWriter

    class Writer(SummaryWriter):
        file_writer: Any
        all_writers: Any

        def _get_file_writer(self) -> Any:
            if self.file_writer is None:
                self.file_writer = EventFile(folder)
                self.all_writers = {str(folder): self.file_writer}
            return self.file_writer

    return Writer(str(folder))
