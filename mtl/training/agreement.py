"""Agreement of the processes that train together about when to stop, when to save, and when they can't save."""

import signal

from mtl.distributed.collectives import any_process, world_size
from mtl.process.signals import Stop
from mtl.training.writer import Writer


class Agreement:
    """Makes all processes stop, save, or end because a checkpoint could not be written, after the same step.

    Args:
        writer: Writes the checkpoints.

    Attributes:
        stop: Records a request to stop in this process.
        signal: The number of the signal after which all processes stop; 0 if there was none.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.stop = Stop()
        self.signal = 0

    def __call__(self, requested: bool) -> bool:
        """Returns whether any process requests a save, and updates `signal`. All processes have to call it together.

        Raises:
            UserError: If there are several processes, and one of them can't write its part of a checkpoint.
        """
        if world_size() == 1:
            self.signal = self.stop.signal
            return requested
        number = self.stop.signal
        signals = [number == signal.SIGINT, number == signal.SIGTERM]
        interrupted, terminated, requested, failed = any_process([*signals, requested, self._writer.has_failed])
        self.signal = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        if failed and not self.signal:
            self._writer.try_again()
        return requested
