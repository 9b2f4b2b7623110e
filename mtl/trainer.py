"""The loop: steps, logging, validation, checkpoints, stopping."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mtl import checkpoint
from mtl.data import Loader, Mix
from mtl.errors import NotFinite, UserError, first_line, told
from mtl.faults import Faults, Place
from mtl.memory import peak_within
from mtl.parts import samples_in
from mtl.seeding import random_state, set_random_state
from mtl.signals import Stop
from mtl.step import Step, StepResult

if TYPE_CHECKING:
    from mtl.monitor import Monitor
    from mtl.validation import Figures, Validation


class Logger(Protocol):
    """What the trainer's figures are given to.

    Some have more: `picture(tag, step, picture)` and `histogram(tag, step, values)`, see `Trainer.show`; `state()` and
    `resume(state)`, so that a run that goes on logs nothing twice; `begin(config, options, swept, finals)`, what the
    run is, and `end()`, that it is finished.
    """

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Takes scalars by tag, as of this optimizer step, in this epoch (both from 1)."""

    def close(self) -> None:
        """Writes out what was held back."""


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
        max_epochs: how often the training data are gone over.
        checkpoints: the folder for last.pt and best.pt. Both are saved after each epoch; a thread writes them.
        save_every_steps, save_every_minutes: last.pt is saved then too.
        keep: how many of the newest last.pt there are to be.
        tell: is given a line for what went wrong without ending the training.
        faults: the file that says, a line of JSON each, in which steps a loss or gradient wasn't finite: which tasks,
            and the numbers of the batch's samples.
        log_every: steps from one line of the log to the next; gradients are measured in those steps, and in the first.
        monitor: what decides which parameters are best, see `mtl.monitor.Monitor`.
        patience: stop after so many validations without a better one.
        loggers: are given all figures.
        callbacks: called with the trainer and the `StepResult` after each step.
        after_epoch: called with the trainer after each epoch's validation.
        saved: further plain data for the checkpoints.

    Attributes:
        global_step: optimizer steps taken.
        epoch: the one under way, from 1.
        tried: steps, those included that fp16 overflow kept from being taken.
        measured: the gradients' figures by tag, for each step in which they were measured.
        measured_in: the epochs of these steps.
        best, best_epoch, figures: the monitored value, the epoch and all of validation's figures when it was best.
        reach: from each parameter's name to the tasks that ever reached it.
        weights: the last steps' weights by tag, as far as they have been read.
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
        max_epochs: int,
        checkpoints: Path,
        log_every: int = 100,
        monitor: Mapping[str, Any] | None = None,
        patience: int | None = None,
        loggers: Sequence[Logger] = (),
        callbacks: Sequence[Callable[["Trainer", StepResult], None]] = (),
        after_epoch: Sequence[Callable[["Trainer"], None]] = (),
        saved: Mapping[str, Any] | None = None,
        save_every_steps: int | None = None,
        save_every_minutes: float | None = None,
        keep: int = 2,
        tell: Callable[[str], None] = print,
        faults: Path | None = None,
    ) -> None:
        if val is None and (monitor is not None or patience is not None):
            raise UserError("trainer.monitor and trainer.patience need validation data, and data.val is null")
        self.step = step
        self.train = train
        self.val = val
        self.max_epochs = max_epochs
        self.tell = tell
        self.writer = checkpoint.Writer(checkpoints, keep=keep, tell=tell)
        self.save_every_steps = save_every_steps
        self.save_every_minutes = save_every_minutes
        self.log_every = log_every
        self.patience = patience
        self.loggers = loggers
        self.callbacks = callbacks
        self.after_epoch = after_epoch
        self.global_step = 0
        self.epoch = 0
        self.position: int | None = None  # batches done in the epoch under way
        self.tried = 0
        self._rates: list[float] = []  # the learning rates of the last step
        self.measured: list[dict[str, float]] = []
        self.measured_in: list[int] = []
        self._read: list[dict[str, float]] = []  # losses of the epoch's steps, by task
        self.best: float | None = None
        self.best_epoch = 0
        self.figures: Figures = {}
        self.reach: dict[str, set[str]] = {name: set() for name in step.parameters}
        self.seconds = 0.0
        self.memory_per_step: int | None = None
        self.weighed = 0
        # Steps aren't alike where weights serve on, or tasks come by turns.
        self._to_weigh = max(step.balancing.every, len(step.tasks))
        self.monitor: Monitor | None = None
        self._monitor_terms = monitor
        self._saved = dict(saved or {})
        self._validation: Validation | None = None
        self._pending: list[dict[str, float]] = []  # losses that have been read, and not yet logged
        self.weights: dict[str, float] = {}  # the last that have been read, by tag
        self._window: list[tuple[Place, StepResult]] = []  # steps that haven't been read yet
        self._intact = True  # whether parameters and counters are of one step
        self._silent: set[int] = set()  # loggers that have failed
        self._samples = 0
        self._clock = 0.0
        self._stop = Stop()
        self._saved_at = time.monotonic()
        self._due = False  # whether gradients are to be measured in the next step
        self._unmeasured = {task.name for task in step.tasks}  # since they were to be the last time
        self._queued = 0  # the step of the last state that was given to the writer
        self._loaded = 0  # the step that the run was taken up at
        self._ended = 0  # the last epoch of which the balancer was told that it is over
        self.faults = Faults(faults, train, tell)

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
                self._train()
        except Stopped:
            raise
        except Exception:
            if self._intact and self.global_step > self._queued:
                with suppress(UserError):  # what isn't finite isn't saved
                    self._save("last")
            raise
        finally:
            self.writer.wait()

    def _train(self) -> None:
        while self.position is not None or self._goes_on():
            if self.position is None:
                self.epoch += 1
                self.position = 0
                self._read.clear()
            self._train_epoch()
            if not self._stop.signal:
                self._validate()
                for callback in self.after_epoch:
                    callback(self)
                self.position = None
                if self.best_epoch == self.epoch:
                    self._save("best")  # first: whoever goes on from last.pt finds what it calls best
            if self._stop.signal:
                self.writer.wait()  # what was asked for before is there too, should the last one be damaged
            self._save("last")
            if self._stop.signal:
                raise Stopped(self._stop.signal)

    def _goes_on(self) -> bool:
        patient = self.patience is None or not self.epoch or self.epoch - self.best_epoch < self.patience
        return self.epoch < self.max_epochs and patient

    @property
    def saved_step(self) -> int:
        """The step after which the newest last.pt was saved; 0 for none."""
        return self.writer.written.get("last", self._loaded)

    @property
    def train_losses(self) -> dict[str, float]:
        """By task, the mean loss over the epoch's steps so far."""
        return _means(self._read)

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
        for batch in self.train.batches(self.epoch, start=self.position):
            number = self.global_step + 1
            self._due |= number == 1 or number % self.log_every == 0
            measure = self._due
            self._rates = [float(group["lr"]) for group in self.step.optimizer.param_groups]
            self._intact = False  # until all that counts has counted it
            result = self._step(batch, number, measure)
            self.global_step += result.taken
            self.tried += 1
            self.position += 1
            self._intact = True
            self._samples += samples_in(self.step.tasks, batch)
            if result.losses:
                self._window.append((Place(number, self.epoch, self.position - 1), result))
            if measure and result.taken:
                self._log(result)
                self._unmeasured -= set(result.losses)
                # Where tasks come by turns, the same one might have its turn in every such step.
                self._due = bool(self._unmeasured) and len(result.losses) < len(self.step.tasks)
                if not self._due:
                    self._unmeasured = {task.name for task in self.step.tasks}
                if number == 1:  # mistakes in metrics show now, and not after an epoch; importing them is slow
                    self._prepare_validation()
                    start = self._clock = time.perf_counter()
            self.faults.look(Place(number, self.epoch, self.position - 1), result)
            for callback in self.callbacks:
                try:
                    callback(self, result)
                except Exception as error:
                    name = getattr(callback, "__name__", type(callback).__name__)
                    raise UserError(f"callback {name} failed at step {number}: {told(error)}") from error
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

    def _step(self, batch: Any, number: int, measure: bool) -> StepResult:
        """The step; one that fails before it moves the parameters leaves everything as it was before it."""
        try:
            if self.weighed < self._to_weigh and self.tried and (not measure or self.log_every == 1):
                return self._weigh(batch, measure)
            return self.step(batch, measure=measure)
        except Exception as error:
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
        result, peak = peak_within(lambda: self.step(batch, measure=measure), self.step.device)
        self.memory_per_step = max([p for p in (self.memory_per_step, peak) if p is not None], default=None)
        self.weighed += 1
        self.seconds -= time.perf_counter() - start  # it took longer than others do
        return result

    def _log(self, result: StepResult | None = None) -> None:
        """Reads what has gathered on the device since the last time, in one go, and hands it to the loggers."""
        if not self._window and not self._pending:
            return
        scalars = self._gather({} if result is None else self._measured(result))
        scalars = {tag: v for tag, v in scalars.items() if not (tag.startswith("weight/") and math.isnan(v))}
        if result is not None:
            self.measured.append(scalars.copy())
            self.measured_in.append(self.epoch)
        read, self._pending = self._pending, []
        self._read += read
        now = time.perf_counter()
        scalars |= {f"loss/{task}/train": mean for task, mean in _means(read).items()}
        assert self.step.optimizer is not None
        for index, (group, rate) in enumerate(zip(self.step.optimizer.param_groups, self._rates, strict=False)):
            scalars[f"lr/{group.get('name', index if len(self._rates) > 1 else 'default')}"] = rate
        scalars["speed/samples_per_second"] = self._samples / (now - self._clock)
        self.hand_out(scalars)
        self._samples = 0
        self._clock = time.perf_counter()

    def _gather(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Reads the losses that haven't been read yet, the last weights, and these tensors, from the device in one go.

        Raises:
            UserError: for a loss that isn't finite.
        """
        for _, step in self._window:
            tensors = {**tensors, **{f"weight/{task}": weight for task, weight in step.weights.items()}}
        losses = [loss for _, step in self._window for loss in step.losses.values()]
        at_hand = [tensor.double() for tensor in (*losses, *tensors.values())]
        values = iter(torch.stack(at_hand).tolist() if at_hand else ())
        rows = [{task: next(values) for task in step.losses} for _, step in self._window]
        for (place, _), row in zip(self._window, rows, strict=True):
            found = {task: f"its loss is {loss}" for task, loss in row.items() if not math.isfinite(loss)}
            if found:
                self._intact = False  # the parameters may have gone too
                raise self.faults.note(place, found, "ended the run", all_at_once=len(found) == len(row))
        self._pending += rows
        figures = dict(zip(tensors, values, strict=True))
        self.weights |= {tag: value for tag, value in figures.items() if tag.startswith("weight/")}
        self._window.clear()
        return self.weights | figures

    def _measured(self, result: StepResult) -> dict[str, Tensor]:
        """What was measured in the step, by tag."""
        assert result.grad_norms is not None
        assert result.cosines is not None
        assert result.total_norm is not None
        for name, tasks in (result.reach or {}).items():
            self.reach[name].update(tasks)
        tensors = {f"grad_norm/{task}": norm for task, norm in result.grad_norms.items()}
        tensors["grad_norm/total"] = result.total_norm
        return tensors | {f"cosine/{a}~{b}": cosine for (a, b), cosine in result.cosines.items()}

    def _prepare_validation(self) -> None:
        from mtl.monitor import Monitor
        from mtl.validation import Validation

        if self.val is not None and self._validation is None:
            named = [names for _, names in self.val.parts()]
            tasks = [t for t in self.step.tasks if any(names is None or t.name in names for names in named)]
            self._validation = Validation(self.step.model, tasks, self.step.autocast)
            self.monitor = Monitor(self._monitor_terms, self._validation.kinds())

    def _validate(self) -> None:
        self._prepare_validation()
        if self.val is None or self._validation is None or self.monitor is None:
            self.best_epoch = self.epoch
            return
        figures = self._validation(self.val)
        value = self.monitor(figures)
        if self.monitor.better(value, self.best) or not self.best_epoch:
            self.best, self.best_epoch, self.figures = value, self.epoch, figures
        broken = [f"{t}/{n}" for t, named in figures.items() for n, v in named.items() if math.isnan(v)]
        if broken:
            self.tell(f"warning  on validation {', '.join(broken)} is nan: a prediction is, or there are no labels")
        scalars = tags(figures, "val") | {"monitor/val": value}
        self.hand_out(scalars)

    def hand_out(self, scalars: Mapping[str, float]) -> None:
        """Gives the loggers their figures."""
        self._tell_loggers("log", self.global_step, self.epoch, scalars)

    def show(self, kind: str, tag: str, value: Any) -> None:
        """Gives a `picture` (H, W, 3), uint8, or the values of a `histogram` to those loggers that take them."""
        self._tell_loggers(kind, tag, self.global_step, value)

    def _tell_loggers(self, method: str, *arguments: Any) -> None:
        """Calls the method of those that have it; one that can't write is told of once, and training goes on."""
        for logger in self.loggers:
            try:
                if hasattr(logger, method):
                    getattr(logger, method)(*arguments)
            except OSError as error:
                self._silence(logger, error)

    def _silence(self, logger: Logger, error: OSError) -> None:
        if id(logger) not in self._silent:
            self.tell(f"error    {type(logger).__name__} can't write: {first_line(error)}. Training goes on")
        self._silent.add(id(logger))

    def _time_to_save(self) -> bool:
        by_steps = self.save_every_steps is not None and self.global_step % self.save_every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        return by_steps or (self.save_every_minutes is not None and minutes >= self.save_every_minutes)

    def _save(self, name: str) -> None:
        self._gather({})
        parameters = self.step.parameters
        finite = torch.stack([p.detach().isfinite().all() for p in parameters.values()])
        if not finite.all():
            broken = ", ".join(n for n, right in zip(parameters, finite.tolist(), strict=True) if not right)
            raise UserError(f"parameters aren't finite after step {self.global_step}, and are not saved: {broken}")
        self.writer.save(name, {**self._saved, **self.state_dict()})
        self._saved_at = time.monotonic()
        self._queued = self.global_step

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in plain types and tensors."""
        loggers = {}
        for logger in self.loggers:
            if hasattr(logger, "state"):
                try:
                    loggers[type(logger).__name__] = logger.state()
                except OSError as error:
                    self._silence(logger, error)
        return {
            "model": self.step.model.state_dict(),
            "step": self.step.state_dict(),
            "random": random_state(),
            "loggers": loggers,
            "faults": self.faults.state(),
            "unmeasured": sorted(self._unmeasured),
            "data": self.train.progress(self.epoch, self.position or 0),
            "reach": {name: sorted(tasks) for name, tasks in self.reach.items()},
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`; the random states are set as well."""
        epoch, position = state["epoch"], state["position"] or 0
        there, here = state["data"], self.train.progress(epoch, position)
        if there != here:
            raise UserError(f"the training data aren't those of the run: it was at {there}, which would be {here} here")
        self.step.model.load_state_dict(state["model"])
        self.step.load_state_dict(state["step"])
        self.reach = {name: set(tasks) for name, tasks in state["reach"].items()}
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self._unmeasured = set(state["unmeasured"])
        set_random_state(state["random"])
        self._loaded = self._queued = self.global_step
        for logger in self.loggers:  # last, since it can't be undone
            if type(logger).__name__ in state["loggers"]:
                logger.resume(state["loggers"][type(logger).__name__])  # type: ignore[attr-defined]
        self.faults.resume(state["faults"])


_COUNTERS = (
    *("global_step", "epoch", "position", "tried", "best", "best_epoch", "figures", "measured", "seconds"),
    *(
        "_read",
        "_pending",
        "_samples",
        "weights",
        "_rates",
        "_ended",
        "_due",
        "memory_per_step",
        "weighed",
        "measured_in",
    ),
)


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By task, the mean over the steps that it took part in."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for task, loss in row.items():
            columns.setdefault(task, []).append(loss)
    return {task: fmean(column) for task, column in columns.items()}


def tags(figures: "Figures", split: str) -> dict[str, float]:
    """A split's figures by their tags: `loss/{task}/{split}`, `metric/{task}/{name}/{split}`."""
    return {
        f"loss/{task}/{split}" if name == "loss" else f"metric/{task}/{name}/{split}": value
        for task, named in figures.items()
        for name, value in named.items()
    }
