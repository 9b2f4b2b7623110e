"""The loop: steps, logging, validation, checkpoints, stopping."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from mtl.data import Loader, Mix
from mtl.errors import FOREIGN, NotFinite, UserError
from mtl.process.seeding import random_state, set_random_state
from mtl.process.signals import Stop, Stopped
from mtl.step import Step, StepResult
from mtl.training.costs import Costs
from mtl.training.faults import Faults, Place
from mtl.training.hooks import Hooks, protected
from mtl.training.measuring import Measuring
from mtl.training.options import Checkpoints, Logs
from mtl.training.pace import Pace
from mtl.training.readings import Readings
from mtl.training.saved import check_finite, load_into
from mtl.training.selection import Criterion, Selection
from mtl.training.writer import Writer


class Trainer:
    """Trains for some epochs, validates and saves after each.

    Args:
        step: what is done with each batch.
        train: the training data.
        val: the validation data. Without any, the last parameters count as the best.
        test: the test data. One batch of these, as of the validation data, is measured before the first step, so that
            what would fail at the end fails at the beginning.
        max_epochs: the number of passes over the training data.
        checkpoints: where and when the state is saved.
        criterion: what makes parameters the best, and when the training stops early.
        hooks: functions called after each step or epoch.
        logs: where the training reports.

    Attributes:
        global_step: optimizer steps taken.
        epoch: the number of the epoch under way, from 1.
        position: the number of batches of this epoch that are done; None between two epochs.
        tried: the number of steps, those included that an overflow in fp16 kept from being taken.
        selection: the best value so far, its epoch and figures, and the monitor.
        readings: losses, weights, and what was measured of gradients.
        costs: time and memory of the steps.
        writer: writes the checkpoints.
    """

    def __init__(
        self,
        step: Step,
        train: Loader | Mix,
        val: Loader | Mix | None = None,
        *,
        test: Loader | Mix | None = None,
        max_epochs: int,
        checkpoints: Checkpoints,
        criterion: Criterion | None = None,
        hooks: Hooks | None = None,
        logs: Logs | None = None,
    ) -> None:
        self.selection = Selection(val, test, criterion or Criterion())
        if val is None and step.descent.waits_for_validation:
            raise UserError("scheduler: ReduceLROnPlateau needs validation data, and data.val is null")
        logs = logs or Logs()
        self.step = step
        self.train = train
        self.max_epochs = max_epochs
        self.checkpoints = checkpoints
        self.hooks = hooks or Hooks()
        self.loggers = logs.loggers
        self.report = logs.report
        self.writer = Writer(checkpoints.folder, keep=checkpoints.keep, best=checkpoints.best, report=logs.report)
        self.faults = Faults(logs.nonfinite, train, logs.report)
        self.readings = Readings(step.parameters, self.faults)
        self.measuring = Measuring(logs.every, [task.name for task in step.tasks])
        self.costs = Costs(step)
        self._pace = Pace()
        self.global_step = 0
        self.epoch = 0
        self.position: int | None = None
        self.tried = 0
        self._intact = True  # whether parameters and counters are of one step
        self._stop = Stop()
        self._saved_at = time.monotonic()
        self._queued = 0  # the step of the newest state that the writer has
        self._loaded = 0  # the step from which the run was resumed
        self._ended = 0  # the last epoch whose end the balancer was informed of

    def fit(self) -> None:
        """Trains until the epochs are over or patience is.

        Raises:
            Stopped: after Ctrl-C or SIGTERM, when the state is saved.
            UserError: for a loss that isn't finite, and for mistakes that show only during the training. The state as
                it was after the last whole step is saved.
        """
        self.step.model.train()
        try:
            with self._stop.listens():
                with protected(self.step.model):
                    self.selection.prepare(self.step)
                    if self.position is not None or self.goes_on:
                        self.selection.rehearse(self.step, self.train)
                self._train()
        except Stopped:
            raise
        except FOREIGN:
            if self._intact and self.global_step > self._queued:
                with suppress(UserError):  # parameters that aren't finite aren't saved
                    self._save("last")
            raise
        finally:
            self.writer.wait()

    def _train(self) -> None:
        while self.position is not None or self.goes_on:
            if self.position is None:
                self.epoch += 1
                self.position = 0
                self.readings.begin_epoch()
            self._train_epoch()
            if not self._stop.signal:
                self.step.descent.train(False)
                with protected(self.step.model):
                    figures = self.selection.validate(self.step, self.epoch, self.report)
                    if figures:
                        self.loggers.log(self.global_step, self.epoch, figures)
                    for function in self.hooks.after_epoch:
                        function(self)
                self.position = None
                selection = self.selection
                if selection.best_epoch == self.epoch or self.writer.ranks(selection.value, selection.is_better):
                    self._save("best")  # first: whoever resumes from last.pt finds the best.pt that it names
            if self._stop.signal:
                self.writer.wait()  # the states before are written too, should the last one be damaged
            self._save("last")
            if self._stop.signal:
                raise Stopped(self._stop.signal)

    @property
    def goes_on(self) -> bool:
        """Whether another epoch follows the one that was validated last."""
        return self.epoch < self.max_epochs and self.selection.waits_after(self.epoch)

    @property
    def saved_step(self) -> int:
        """The step after which the newest last.pt was saved; 0 for none."""
        return self.writer.written.get("last", self._loaded)

    @property
    def seconds_per_step(self) -> float | None:
        """The mean over all steps but the first, in which much is done once, and those whose memory was measured.

        None where there was no other.
        """
        count = self.tried - 1 - self.costs.weighed
        return self.costs.seconds / count if count > 0 else None

    def _train_epoch(self) -> None:
        start = self._pace.restart()
        assert self.position is not None
        assert self.step.optimizer is not None
        sizes = self.train.sizes(self.epoch, start=self.position)
        for batch, size in zip(self.train.batches(self.epoch, start=self.position), sizes, strict=True):
            number = self.global_step + 1
            # Parameters that thaw may change which tasks share what.
            measure = self.measuring.includes(number, anyway=self.step.model.thaws(self.step.num_taken))
            self.step.descent.train()
            self._pace.note_rates(self.step.optimizer)
            self._intact = False  # until every counter includes the step
            result = self._step(batch, number, measure)
            self.global_step += result.taken
            self.tried += 1
            self.position += 1
            self._intact = True
            self._pace.add(size)
            place = Place(number, self.epoch, self.position - 1)
            self.readings.add(place, result)
            self.readings.note_gradients(self.step.parameters)
            if measure and result.taken:
                self._log(result)
                self.measuring.measured(result.losses)
                if number == 1:  # in which much is done once
                    start = self._pace.restart()
            self.faults.look(place, result)
            self.hooks.after_step(self, result, number)
            if self._stop.signal:
                break
            if result.taken and self.checkpoints.are_due(self.global_step, time.monotonic() - self._saved_at):
                self._save("last")
        if not self._stop.signal:
            if self._ended < self.epoch:  # not again in a run that was resumed between here and the validation's end
                self.step.epoch_end()
                self._ended = self.epoch
            self._log()
        self.costs.seconds += time.perf_counter() - start

    def _step(self, batch: Any, number: int, measure: bool) -> StepResult:
        """Takes the step. One that fails before it moves the parameters leaves everything as it was before."""
        try:
            if self.costs.wants_memory and self.tried and (not measure or self.measuring.every == 1):
                return self.costs.weigh(self.step, batch, measure=measure)
            return self.step(batch, measure=measure)
        except FOREIGN as error:
            self._intact = self.step.undo()
            if isinstance(error, NotFinite):
                assert self.position is not None
                place = Place(number, self.epoch, self.position)
                raise self.faults.note(place, error.found, "ended the run") from error
            raise

    def _log(self, result: StepResult | None = None) -> None:
        """Gives the loggers the figures since the last line of the log.

        Args:
            result: of the last step, if gradients were measured in it.
        """
        with self._reading():
            scalars = self.readings.take(result, self.epoch)
        if not scalars:
            return
        assert self.step.optimizer is not None
        self.loggers.log(self.global_step, self.epoch, scalars | self._pace.take(self.step.optimizer))
        self._pace.restart()  # the time of the loggers doesn't count

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Reads losses: one that turns out not to be finite may have spoilt the parameters."""
        try:
            yield
        except NotFinite:
            self._intact = False
            raise

    def _save(self, name: str) -> None:
        """Has the state written as `last` or `best`."""
        self.writer.check()
        with self._reading():
            self.readings.read()
        check_finite(self.step.parameters, self.global_step)
        state = {**self.checkpoints.more, **self.state_dict()}
        if name == "best" and self.writer.best > 1:
            self.writer.save(name, {**state, "value": self.selection.value}, self.selection.is_better)
        else:
            self.writer.save(name, state)
        self._saved_at = time.monotonic()
        self._queued = self.global_step

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in plain types and tensors.

        Where the optimizer trains other parameters than those that are evaluated, the state has these too.
        """
        descent = self.step.descent
        evaluated = {}
        if descent.training:
            with descent.evaluated():
                evaluated = {"evaluated": {k: v.detach().clone() for k, v in self.step.model.state_dict().items()}}
        return {
            **evaluated,
            "model": self.step.model.state_dict(),
            "step": self.step.state_dict(),
            "random": random_state(),
            "loggers": self.loggers.state_dict(),
            "faults": self.faults.state_dict(),
            "data": self.train.progress(self.epoch, self.position or 0),
            "readings": self.readings.state_dict(),
            **self.measuring.state_dict(),
            **self.selection.state_dict(),
            **self.costs.state_dict(),
            **self._pace.state_dict(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`; the random states are set as well."""
        epoch, position = state["epoch"], state["position"] or 0
        saved, own = state["data"], self.train.progress(epoch, position)
        if saved != own:
            raise UserError(f"the training data aren't those of the run: it was at {saved}, which would be {own} here")
        load_into(self.step.model, state["model"], "the state that was saved")
        self.step.load_state_dict(state["step"])
        self.step.model.thaw(self.step.num_taken - 1)  # so that what the last step trained doesn't thaw once more
        self.readings.load_state_dict(state["readings"])
        for part in (self.measuring, self.selection, self.costs, self._pace):
            part.load_state_dict(state)
        for name in _COUNTERS:
            setattr(self, name, state[name])
        set_random_state(state["random"])
        self._loaded = self._queued = self.global_step
        self.writer.resume(epoch if state["position"] is None else epoch - 1)
        self.loggers.load_state_dict(state["loggers"])  # last, since it can't be undone
        self.faults.load_state_dict(state["faults"])


_COUNTERS = ("global_step", "epoch", "position", "tried", "_ended")
