"""Agreement of the processes that train together about when to stop and when to save."""

import signal

from mtl.distributed.collectives import any_process, world_size
from mtl.process.signals import Stop


class Agreement:
    """Makes all processes stop, or save, after the same step.

    Attributes:
        stop: Records a request to stop in this process.
        signal: The number of the signal after which all processes stop; 0 if there was none.
    """

    def __init__(self) -> None:
        self.stop = Stop()
        self.signal = 0

    def __call__(self, requested: bool) -> bool:
        """Returns whether any process requests a save, and updates `signal`. All processes have to call it together."""
        if world_size() == 1:
            self.signal = self.stop.signal
            return requested
        number = self.stop.signal
        interrupted, terminated, requested = any_process([number == signal.SIGINT, number == signal.SIGTERM, requested])
        self.signal = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        return requested
