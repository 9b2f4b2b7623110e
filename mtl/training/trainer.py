"""The loop: steps, logging, validation, checkpoints, stopping."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtl import tags
from mtl.data import Loader, Mix
from mtl.errors import FOREIGN, NotFinite, UserError, told
from mtl.loggers import Loggers
from mtl.process.memory import peak_within
from mtl.process.seeding import kept_random_state, random_state, set_random_state
from mtl.process.signals import Stop
from mtl.step import Step, StepResult
from mtl.training.faults import Faults, Place
from mtl.training.readings import Readings
from mtl.training.saved import load_into
from mtl.training.writer import Writer

if TYPE_CHECKING:
    from mtl.training.monitor import Monitor
    from mtl.training.validation import Figures, Validation


class Stopped(Exception):
    """Ctrl-C or SIGTERM came; the step was finished and the state saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class Trainer:
    """Trains for some epochs, validates and saves after each.

    Args:
        step: what is done with each batch.
        train, val: loaders. Without `val` the last parameters count as the best.
        test: a loader of which one batch is measured before the first step, as one of `val` is, so that what would fail
            at the end fails then.
        max_epochs: how often the training data are gone over.
        checkpoints: the folder for last.pt and best.pt. Both are saved after each epoch; a thread writes them.
        save_every_steps, save_every_minutes: last.pt is saved then too.
        keep: how many of the newest last.pt there are to be; None for all.
        keep_best: how many of the best by the monitored value: best.pt, best-1.pt, and so on.
        tell: is given a line for what went wrong without ending the training.
        faults: the file that says, a line of JSON each, in which steps a loss or gradient wasn't finite: which tasks,
            and the numbers of the batch's samples.
        log_every: steps from one line of the log to the next; gradients are measured in those steps, and in the first.
        monitor: what decides which parameters are best, see `mtl.training.monitor.Monitor`.
        patience: stop after so many validations without a better one.
        loggers: are given all figures; None for none.
        callbacks: called with the trainer and the `StepResult` after each step. What they draw from the random
            generators changes no draw of the training, and a model that one leaves in eval mode goes back to training
            mode.
        watchers: called in the same way, without that protection, which takes about 0.1 ms a step. They must not draw
            random numbers or change the model.
        after_epoch: called with the trainer after each epoch's validation; protected as the callbacks are.
        saved: further plain data for the checkpoints.

    Attributes:
        global_step: optimizer steps taken.
        epoch: the one under way, from 1.
        tried: steps, those included that fp16 overflow kept from being taken.
        readings: losses, weights, and what was measured of gradients.
        best, best_epoch, figures: the monitored value, the epoch and all of validation's figures when it was best.
        memory_per_step: the peak, in bytes, of a step's tensors beyond parameters, buffers and optimizer state, in the
            first steps whose gradients aren't measured for the logs; None where there was none.
        weighed: the number of these steps.
        seconds: spent in training steps and logging after the first step; validation and saving are left out.
    """

    def __init__(
        self,
        step: Step,
        train: Loader | Mix,
        val: Loader | Mix | None = None,
        *,
        test: Loader | Mix | None = None,
        max_epochs: int,
        checkpoints: Path,
        log_every: int = 100,
        monitor: Mapping[str, Any] | None = None,
        patience: int | None = None,
        loggers: Loggers | None = None,
        callbacks: Sequence[Callable[["Trainer", StepResult], None]] = (),
        watchers: Sequence[Callable[["Trainer", StepResult], None]] = (),
        after_epoch: Sequence[Callable[["Trainer"], None]] = (),
        saved: Mapping[str, Any] | None = None,
        save_every_steps: int | None = None,
        save_every_minutes: float | None = None,
        keep: int | None = 2,
        keep_best: int = 1,
        tell: Callable[[str], None] = print,
        faults: Path | None = None,
    ) -> None:
        if val is None and (monitor is not None or patience is not None):
            raise UserError("trainer.monitor and trainer.patience need validation data, and data.val is null")
        if val is None and step.descent.waits_for_validation:
            raise UserError("scheduler: ReduceLROnPlateau needs validation data, and data.val is null")
        self.step = step
        self.train = train
        self.val = val
        self.test = test
        self.max_epochs = max_epochs
        self.tell = tell
        self.writer = Writer(checkpoints, keep=keep, best=keep_best, tell=tell)
        self.save_every_steps = save_every_steps
        self.save_every_minutes = save_every_minutes
        self.log_every = log_every
        self.patience = patience
        self.loggers = loggers or Loggers()
        self.callbacks = callbacks
        self.watchers = watchers
        self.after_epoch = after_epoch
        self.global_step = 0
        self.epoch = 0
        self.position: int | None = None  # batches done in the epoch under way
        self.tried = 0
        self._rates: list[float] = []  # the learning rates of the last step
        self._value: float | None = None  # of the last validation
        self.best: float | None = None
        self.best_epoch = 0
        self.figures: Figures = {}
        self.seconds = 0.0
        self.memory_per_step: int | None = None
        self.weighed = 0
        # Steps aren't alike where weights serve on, or tasks come by turns.
        self._to_weigh = max(step.balancing.settings.every, len(step.tasks))
        self.monitor: Monitor | None = None
        self._monitor_terms = monitor
        self._saved = dict(saved or {})
        self._validation: Validation | None = None
        self._intact = True  # whether parameters and counters are of one step
        self._samples = 0
        self._clock = 0.0
        self._stop = Stop()
        self._saved_at = time.monotonic()
        self._due = False  # whether gradients are to be measured in the next step
        self._unmeasured = {task.name for task in step.tasks}  # since they were to be the last time
        self._chased = 0  # steps measured since then
        self._queued = 0  # the step of the last state that was given to the writer
        self._loaded = 0  # the step that the run was taken up at
        self._ended = 0  # the last epoch of which the balancer was told that it is over
        self.faults = Faults(faults, train, tell)
        self.readings = Readings(step.parameters, self.faults)

    def fit(self) -> None:
        """Trains until the epochs are over or patience is.

        Raises:
            Stopped: after Ctrl-C, when the state is saved.
            UserError: for a loss that isn't finite, and for mistakes that show only now. The state as it was after the
                last whole step is saved.
        """
        self.step.model.train()
        try:
            with self._stop.listens():
                with self._protected():
                    self._prepare_validation()
                    self._rehearse()
                self._train()
        except Stopped:
            raise
        except FOREIGN:
            if self._intact and self.global_step > self._queued:
                with suppress(UserError):  # what isn't finite isn't saved
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
                with self._protected():
                    self._validate()
                    for callback in self.after_epoch:
                        callback(self)
                self.position = None
                if self.best_epoch == self.epoch or self.writer.ranks(self._value, self._better):
                    self._save("best")  # first: whoever goes on from last.pt finds what it calls best
            if self._stop.signal:
                self.writer.wait()  # what was asked for before is there too, should the last one be damaged
            self._save("last")
            if self._stop.signal:
                raise Stopped(self._stop.signal)

    @property
    def goes_on(self) -> bool:
        """Whether an epoch follows the one that was validated last; neither epochs nor patience are over."""
        patient = self.patience is None or not self.epoch or self.epoch - self.best_epoch < self.patience
        return self.epoch < self.max_epochs and patient

    @property
    def _thaws(self) -> bool:
        """Whether parameters take part in the training from the next step on, which may change who shares what."""
        return any(until <= self.step.num_taken for until in self.step.model.frozen_until.values())

    @property
    def saved_step(self) -> int:
        """The step after which the newest last.pt was saved; 0 for none."""
        return self.writer.written.get("last", self._loaded)

    @property
    def seconds_per_step(self) -> float | None:
        """The mean over all steps but the first, in which much is done once, and those whose memory was measured.

        None where there was no other.
        """
        count = self.tried - 1 - self.weighed
        return self.seconds / count if count > 0 else None

    def _train_epoch(self) -> None:
        start = self._clock = time.perf_counter()
        assert self.position is not None
        assert self.step.optimizer is not None
        sizes = self.train.sizes(self.epoch, start=self.position)
        for batch, size in zip(self.train.batches(self.epoch, start=self.position), sizes, strict=True):
            number = self.global_step + 1
            self._due |= number == 1 or number % self.log_every == 0 or self._thaws
            measure = self._due
            self.step.descent.train()
            self._rates = [float(group["lr"]) for group in self.step.optimizer.param_groups]
            self._intact = False  # until all that counts has counted it
            result = self._step(batch, number, measure)
            self.global_step += result.taken
            self.tried += 1
            self.position += 1
            self._intact = True
            self._samples += size
            place = Place(number, self.epoch, self.position - 1)
            self.readings.add(place, result)
            self.readings.note_gradients(self.step.parameters)
            if measure and result.taken:
                self._log(result)
                self._look_for_others(result)
                if number == 1:  # in which much is done once
                    start = self._clock = time.perf_counter()
            self.faults.look(place, result)
            self._call_back(result, number)
            if self._stop.signal:
                break
            if result.taken and self._time_to_save():
                self._save("last")
        if not self._stop.signal:
            if self._ended < self.epoch:  # not again in a run that was taken up between here and the validation's end
                self.step.epoch_end()
                self._ended = self.epoch
            self._log()
        self.seconds += time.perf_counter() - start

    def _call_back(self, result: StepResult, number: int) -> None:
        """Calls the callbacks and the watchers after a step."""
        with self._protected() if self.callbacks else nullcontext():
            for callback in (*self.callbacks, *self.watchers):
                try:
                    callback(self, result)
                except FOREIGN as error:
                    name = getattr(callback, "__name__", type(callback).__name__)
                    raise UserError(f"callback {name} failed at step {number}: {told(error)}") from error

    @contextmanager
    def _protected(self) -> Iterator[None]:
        """Keeps other people's code from changing the training by accident: by what it draws, or by eval mode."""
        with kept_random_state():
            yield
        if not self.step.model.training:
            self.step.model.train()

    def _look_for_others(self, result: StepResult) -> None:
        """Has the next step measured too where tasks come by turns: one might have its turn in every such step.

        Not for ever: a task may be rare, or have no labels at all.
        """
        self._unmeasured -= set(result.losses)
        self._chased += 1
        self._due = bool(self._unmeasured) and self._chased < 2 * len(self.step.tasks)
        if not self._due:
            self._unmeasured, self._chased = {task.name for task in self.step.tasks}, 0

    def _step(self, batch: Any, number: int, measure: bool) -> StepResult:
        """The step; one that fails before it moves the parameters leaves everything as it was before it."""
        try:
            if self.weighed < self._to_weigh and self.tried and (not measure or self.log_every == 1):
                return self._weigh(batch, measure)
            return self.step(batch, measure=measure)
        except FOREIGN as error:
            self._intact = self.step.undo()
            if isinstance(error, NotFinite):
                assert self.position is not None
                place = Place(number, self.epoch, self.position)
                raise self.faults.note(place, error.found, "ended the run") from error
            raise

    def _weigh(self, batch: Any, measure: bool) -> StepResult:
        """The step, with its memory measured."""
        start = time.perf_counter()
        for parameter in self.step.parameters.values():
            parameter.grad = None  # the last step's are none of this one's
        result, peak = peak_within(lambda: self.step(batch, measure=measure), self.step.passes.device)
        self.memory_per_step = max([p for p in (self.memory_per_step, peak) if p is not None], default=None)
        self.weighed += 1
        self.seconds -= time.perf_counter() - start  # it took longer than others do
        return result

    def _log(self, result: StepResult | None = None) -> None:
        """Gives the loggers what has gathered since the last time.

        Args:
            result: of the last step, if gradients were measured in it.
        """
        with self._looking():
            scalars = self.readings.take(result, self.epoch)
        if not scalars:
            return
        now = time.perf_counter()
        assert self.step.optimizer is not None
        for index, (group, rate) in enumerate(zip(self.step.optimizer.param_groups, self._rates, strict=False)):
            scalars[tags.learning_rate(group.get("name", index if len(self._rates) > 1 else "default"))] = rate
        scalars[tags.SPEED] = self._samples / (now - self._clock)
        self.loggers.log(self.global_step, self.epoch, scalars)
        self._samples = 0
        self._clock = time.perf_counter()

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """A loss that turns out not to be finite may have spoilt the parameters."""
        try:
            yield
        except NotFinite:
            self._intact = False
            raise

    def _prepare_validation(self) -> None:
        from mtl.training.monitor import Monitor
        from mtl.training.validation import Validation

        if self._validation is None:  # without validation data, too: metrics that can't be used on the test split
            named = [names for _, names in self.val.parts()] if self.val is not None else [None]
            tasks = [t for t in self.step.tasks if any(names is None or t.name in names for names in named)]
            self._validation = Validation(self.step.model, tasks, self.step.passes.autocast)
            if self.val is not None:
                self.monitor = Monitor(self._monitor_terms, self._validation.kinds())
                self._check_plateau(self.monitor)

    def _rehearse(self) -> None:
        """Has what would fail after an epoch, or at the end, fail now."""
        from mtl.training.rehearsal import try_one_sample, try_split
        from mtl.training.validation import Validation

        assert self._validation is not None
        if self.position is None and not self.goes_on:
            return
        try_one_sample(self.step, self.train)
        if self.val is not None:
            try_split(self._validation, self.val, "validation")
        if self.test is not None:
            same = len(self._validation.tasks) == len(self.step.tasks)
            autocast = self.step.passes.autocast
            of_all = self._validation if same else Validation(self.step.model, self.step.tasks, autocast)
            try_split(of_all, self.test, "the test split")

    def _check_plateau(self, monitor: "Monitor") -> None:
        mode = getattr(self.step.descent.scheduler, "mode", None)
        if self.step.descent.waits_for_validation and mode != monitor.mode:
            raise UserError(
                f"scheduler.mode is '{mode}', and what ReduceLROnPlateau follows, the monitored {monitor}, is better "
                f"the other way; set scheduler.mode={monitor.mode}"
            )

    def _validate(self) -> None:
        self._prepare_validation()
        if self.val is None or self._validation is None or self.monitor is None:
            self.best_epoch = self.epoch
            return
        figures = self._validation(self.val)
        if self.epoch == 1 and (line := self._validation.caveat()):
            self.tell(line)
        value = self._value = self.monitor(figures)
        self.step.validated(value)
        if self.monitor.better(value, self.best) or not self.best_epoch:
            self.best, self.best_epoch, self.figures = value, self.epoch, figures
        broken = [f"{t}/{n}" for t, named in figures.items() for n, v in named.items() if math.isnan(v)]
        if broken:
            self.tell(f"warning  on validation {', '.join(broken)} is nan: a prediction is, or there are no labels")
        self.loggers.log(self.global_step, self.epoch, by_tag(figures, "val") | {tags.MONITOR: value})

    def _better(self, value: float, other: float) -> bool:
        """Without validation a later epoch is better."""
        return self.monitor is None or self.monitor.better(value, other)

    def _time_to_save(self) -> bool:
        by_steps = self.save_every_steps is not None and self.global_step % self.save_every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        return by_steps or (self.save_every_minutes is not None and minutes >= self.save_every_minutes)

    def _save(self, name: str) -> None:
        self.writer.check()
        with self._looking():
            self.readings.read()
        parameters = self.step.parameters
        finite = torch.stack([p.detach().isfinite().all() for p in parameters.values()])
        if not finite.all():
            broken = ", ".join(n for n, right in zip(parameters, finite.tolist(), strict=True) if not right)
            raise UserError(f"parameters aren't finite after step {self.global_step}, and are not saved: {broken}")
        state = {**self._saved, **self.state_dict()}
        if name == "best" and self.writer.best > 1:
            self.writer.save(name, {**state, "value": self._value}, self._better)
        else:
            self.writer.save(name, state)
        self._saved_at = time.monotonic()
        self._queued = self.global_step

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in plain types and tensors; and what is to be evaluated, where
        an optimizer trains other parameters."""
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
            "unmeasured": sorted(self._unmeasured),
            "data": self.train.progress(self.epoch, self.position or 0),
            "readings": self.readings.state_dict(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`; the random states are set as well."""
        epoch, position = state["epoch"], state["position"] or 0
        there, here = state["data"], self.train.progress(epoch, position)
        if there != here:
            raise UserError(f"the training data aren't those of the run: it was at {there}, which would be {here} here")
        load_into(self.step.model, state["model"], "the state that was saved")
        self.step.load_state_dict(state["step"])
        self.step.model.thaw(self.step.num_taken - 1)  # so that what the last step trained doesn't thaw once more
        self.readings.load_state_dict(state["readings"])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self._unmeasured = set(state["unmeasured"])
        set_random_state(state["random"])
        self._loaded = self._queued = self.global_step
        self.writer.resume(epoch if state["position"] is None else epoch - 1)
        self.loggers.load_state_dict(state["loggers"])  # last, since it can't be undone
        self.faults.load_state_dict(state["faults"])


_COUNTERS = (
    *("global_step", "epoch", "position", "tried", "best", "best_epoch", "figures", "seconds"),
    *("_samples", "_rates", "_ended", "_due", "_chased", "memory_per_step", "weighed"),
)


def by_tag(figures: "Figures", split: str) -> dict[str, float]:
    """A split's figures by their tags: `loss/{task}/{split}`, `metric/{task}/{name}/{split}`."""
    return {tags.figure(task, name, split): value for task, named in figures.items() for name, value in named.items()}
