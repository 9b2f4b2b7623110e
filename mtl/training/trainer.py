"""The training loop: steps, logging, validation, checkpoints and stopping."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from mtl.data import Loader, Mix
from mtl.distributed.collectives import world_size
from mtl.errors import FOREIGN, NotFinite, UserError
from mtl.process.seeding import random_state, random_states, set_random_states
from mtl.process.signals import Stopped
from mtl.step import Step, StepResult
from mtl.training.agreement import Agreement
from mtl.training.costs import Costs
from mtl.training.faults import Faults, Place
from mtl.training.hooks import Hooks, protected
from mtl.training.measuring import Measuring
from mtl.training.options import Checkpoints, Logs
from mtl.training.pace import Pace
from mtl.training.readings import Readings
from mtl.training.saved import check_parameters, load_into
from mtl.training.selection import Criterion, Selection


class Trainer:
    """Trains a model for some epochs, with a validation and a checkpoint after each.

    Args:
        step: The step, which is called with each batch.
        train: The training data.
        val: The validation data. Without them, the last parameters count as the best.
        test: The test data. One batch of these and of the validation data is tried before the first step, so that
            errors appear at the beginning, not at the end.
        max_epochs: The number of epochs.
        checkpoints: Options of the checkpoints.
        criterion: The criterion for the best parameters and for early stopping.
        hooks: Functions that are called after each step or epoch.
        logs: Options of the logs.

    Attributes:
        global_step: The number of optimizer steps taken.
        epoch: The number of the current epoch, from 1.
        position: The number of batches of the current epoch that are done; None between two epochs.
        tried: The number of steps, including those that were skipped because of an fp16 overflow.
        selection: The best value so far, with its epoch and figures, and the monitor.
        readings: The losses, weights and gradient measurements of the steps.
        costs: The time and memory of the steps.
        writer: Writes the checkpoints.
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
        self.writer = checkpoints.writer(logs.report)
        self.faults = Faults(logs.nonfinite, train, logs.report)
        self.readings = Readings(step.parameters, self.faults)
        self.measuring = Measuring(logs.every, [task.name for task in step.tasks])
        self.costs = Costs(step)
        self._pace = Pace()
        self.global_step = 0
        self.epoch = 0
        self.position: int | None = None
        self.tried = 0
        self._intact = True  # whether parameters and counters belong to the same step
        self._agree = Agreement(self.writer)
        self._saved_at = time.monotonic()
        self._queued = 0  # the step of the newest state that was passed to the writer
        self._loaded = 0  # the step from which the run was resumed
        self._ended = 0  # the last epoch for which `epoch_end` was called

    def fit(self) -> None:
        """Trains until all epochs are done, or until early stopping.

        Raises:
            Stopped: After Ctrl-C or SIGTERM, once the state has been saved.
            UserError: If a loss isn't finite, or if the training fails for another reason that the user can correct.
                The state after the last complete step is saved.
        """
        self.step.model.train()
        try:
            with self._agree.stop.listens():
                with protected(self.step.model):
                    self.selection.prepare(self.step)
                    if self.position is not None or self.goes_on:
                        self.selection.rehearse(self.step, self.train)
                self._train()
        except Stopped:
            raise
        except FOREIGN as error:
            error.add_note(f"at step {self.global_step + 1}, in epoch {self.epoch}")  # of a wait for another process
            if self._intact and self.global_step > self._queued and world_size() == 1:  # several only save together
                with suppress(UserError):  # parameters that aren't finite aren't saved
                    self._save("last")
            raise
        finally:
            for loader, _ in self.train.by_source():
                loader.close()
            self.writer.wait()

    def _train(self) -> None:
        while self.position is not None or self.goes_on:
            if self.position is None:
                self.epoch += 1
                self.position = 0
                self.readings.begin_epoch()
            self._train_epoch()
            if not self._agree.signal:
                self.step.descent.train(False)
                with protected(self.step.model):
                    figures = self.selection.validate(self.step, self.epoch, self.report)
                    if figures:
                        self.loggers.log(self.global_step, self.epoch, figures)
                    for function in self.hooks.after_epoch:
                        function(self)
                self.position = None
                selection = self.selection
                ranks = self.writer.ranks(selection.value, selection.is_better)
                if self._agree(selection.best_epoch == self.epoch or ranks):
                    self._save("best")  # before last.pt, which refers to it
            if self._agree.signal:
                self.writer.wait()  # earlier states are written as well, in case the last one gets damaged
            self._save("last")
            if self._agree.signal:
                self.writer.complete()
                raise Stopped(self._agree.signal)
        self.writer.complete()

    @property
    def goes_on(self) -> bool:
        """Whether another epoch follows the last validation."""
        return self.epoch < self.max_epochs and self.selection.waits_after(self.epoch)

    @property
    def saved_step(self) -> int:
        """The step after which the newest last.pt was saved; 0 if there is none."""
        return self.writer.written.get("last", self._loaded)

    @property
    def seconds_per_step(self) -> float | None:
        """The mean seconds of a step, without the first step and those whose memory was measured; None if no other."""
        count = self.tried - 1 - self.costs.weighed
        return self.costs.seconds / count if count > 0 else None

    def _train_epoch(self) -> None:
        start = self._pace.restart()
        assert self.position is not None
        assert self.step.optimizer is not None
        for batch, size in self.train.sized_batches(self.epoch, start=self.position):
            number = self.global_step + 1
            # When parameters are unfrozen, the set of shared parameters may change.
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
                if number == 1:  # the first step includes one-time initialisation
                    start = self._pace.restart()
            self.faults.check(place, result)
            self.hooks.after_step(self, result, number)
            seconds = time.monotonic() - self._saved_at
            is_due = self._agree(result.taken and self.checkpoints.are_due(self.global_step, seconds))
            if self._agree.signal:
                break
            if is_due:
                self._save("last")
        if not self._agree.signal:
            if self._ended < self.epoch:  # not a second time if the run was resumed before the validation ended
                self.step.epoch_end()
                self._ended = self.epoch
            self._log()
        self.costs.seconds += time.perf_counter() - start

    def _step(self, batch: Any, number: int, measure: bool) -> StepResult:
        """Runs the step; if it fails before it updates the parameters, the state from before the step is restored."""
        try:
            if self.costs.wants_memory and self.tried and (not measure or self.measuring.every == 1):
                return self.costs.weigh(self.step, batch, measure=measure)
            return self.step(batch, measure=measure)
        except FOREIGN as error:
            self._intact = self.step.undo()
            if isinstance(error, NotFinite):
                assert self.position is not None
                place = Place(number, self.epoch, self.position)
                raise self.faults.note(place, error.reasons, "ended the run") from error
            raise

    def _log(self, result: StepResult | None = None) -> None:
        """Passes the figures since the last line of the log, and the last step's measurements, to the loggers."""
        with self._reading():
            scalars = self.readings.take(result, self.epoch)
        if not scalars:
            return
        assert self.step.optimizer is not None
        self.loggers.log(self.global_step, self.epoch, scalars | self._pace.take(self.step.optimizer))
        self._pace.restart()  # the time of the loggers doesn't count

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Marks the parameters as not intact if a loss that is read in the context isn't finite."""
        try:
            yield
        except NotFinite:
            self._intact = False
            raise

    def _save(self, name: str) -> None:
        """Passes the state to the writer, as `last` or `best`."""
        self.writer.check()
        with self._reading():
            self.readings.read()
        check_parameters(self.step.model, self.global_step)
        state = {**self.checkpoints.more, **self.state_dict(), **random_states()}
        if name == "best" and self.writer.best > 1:
            self.writer.save(name, {**state, "value": self.selection.value}, self.selection.is_better)
        else:
            self.writer.save(name, state)
        self._saved_at = time.monotonic()
        self._queued = self.global_step

    def state_dict(self) -> dict[str, Any]:
        """Returns the state on which the rest of the training depends, as plain types and tensors.

        If the optimizer has different parameters for training and evaluation, the state contains both.
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
            "data": self.train.progress(self.epoch, self.position),
            "readings": self.readings.state_dict(),
            **self.measuring.state_dict(),
            **self.selection.state_dict(),
            **self.costs.state_dict(),
            **self._pace.state_dict(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, the random states included."""
        epoch = state["epoch"]
        self.train.restore(state["data"], epoch, state["position"])
        load_into(self.step.model, state["model"], "the state that was saved")
        self.step.load_state_dict(state["step"])
        self.step.model.thaw(self.step.num_taken - 1)  # parameters that the last step trained are unfrozen already
        self.readings.load_state_dict(state["readings"])
        for component in (self.measuring, self.selection, self.costs, self._pace):
            component.load_state_dict(state)
        for name in _COUNTERS:
            setattr(self, name, state[name])
        set_random_states(state, self.global_step)
        self._loaded = self._queued = self.global_step
        self.writer.continue_after(epoch if state["position"] is None else epoch - 1)
        self.loggers.load_state_dict(state["loggers"])  # last, since it can't be undone
        self.faults.load_state_dict(state["faults"])


_COUNTERS = ("global_step", "epoch", "position", "tried", "_ended")
