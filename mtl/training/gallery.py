"""Pictures and histograms for the logs: cosines between tasks, predictions, parameters and gradients."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from mtl import tags
from mtl.batch import Batch
from mtl.data import Drawn, Fields, Loader, Mix
from mtl.distributed.collectives import any_process, rank
from mtl.distributed.sharding import is_sharded, whole
from mtl.errors import FOREIGN, describe_error
from mtl.loggers import pictures
from mtl.outputs import at_least_single
from mtl.safety.bounded import MOST_IN_MATRICES, MOST_ROWS
from mtl.step.forward import without_gradients
from mtl.step.precision import Autocast
from mtl.task import Task
from mtl.training.predictions import SHOWN, show

if TYPE_CHECKING:
    from mtl.model import MultiTaskModel
    from mtl.training.trainer import Trainer
    from mtl.training.validation import Matrices

COUNTED = 256  # the number of samples in a picture without input images


class Gallery:
    """Hook that sends pictures and histograms after an epoch to the loggers that support them.

    Args:
        loader: The loader of the samples whose predictions are shown; None for no predictions.
        pictures_every: The number of epochs from one set of pictures to the next. The last epoch always has a set, also
            if the training stops early. None for no pictures.
        histograms_every: The same for histograms of all parameters and their gradients.
        facts: The facts about the data, such as the names of classes.
    """

    def __init__(
        self,
        loader: Loader | Mix | None,
        *,
        pictures_every: int | None,
        histograms_every: int | None,
        facts: Mapping[str, Any],
    ) -> None:
        self.loader = loader
        self.pictures_every = pictures_every
        self.histograms_every = histograms_every
        self.facts = facts

    def __call__(self, trainer: "Trainer") -> None:
        """Sends the pictures and histograms that are due after the current epoch."""
        if _shows(trainer, "picture", self.pictures_every):
            try:
                images = self.pictures(trainer)
            except FOREIGN as error:  # unusual data should not end the training
                trainer.report(f"warning  no more pictures: {describe_error(error)}")
                self.pictures_every = None
                return
            for tag, picture in images.items():
                trainer.loggers.show("picture", tag, trainer.global_step, picture)
        if _shows(trainer, "histogram", self.histograms_every):
            for name, parameter in trainer.step.parameters.items():
                trainer.loggers.show("histogram", tags.parameter(name), trainer.global_step, whole(parameter.detach()))
                gradient = parameter.grad
                if gradient is not None:
                    values = gradient.coalesce().values() if gradient.is_sparse else whole(gradient)
                    trainer.loggers.show("histogram", tags.gradient(name), trainer.global_step, values)

    def pictures(self, trainer: "Trainer") -> dict[str, pictures.Picture]:
        """Draws the mean cosines since the last pictures, `cosine/matrix`, the predictions, and confusion matrices.

        Returns:
            The pictures by tag.
        """
        predicted = self._predictions(trainer)  # before anything is drawn, which only one of several processes may do
        images = {}
        names = [task.name for task in trainer.step.tasks]
        every = self.pictures_every or 1
        since = (trainer.epoch - 1) // every * every  # the same for a run that ended earlier and was resumed
        cosines = {pair: fmean(values) for pair, values in trainer.readings.cosines(since).items()}
        if cosines:
            images[tags.COSINE_MATRIX] = pictures.cosine_matrix(names, cosines)
        for task, prediction, batch, image in predicted if rank() == 0 else ():
            picture = show(task, prediction, batch, image, class_names(self.facts, task.target))
            if picture is not None:
                images[tags.prediction(task.name)] = picture
        if rank() == 0:
            images |= matrix_pictures(trainer.step.tasks, trainer.selection.matrices, "val", self.facts)
        return images

    def _predictions(self, trainer: "Trainer") -> list[tuple[Task, Any, Batch, Tensor | None]]:
        """Returns the tasks, each with predictions for some samples, their batch, and their input images if any."""
        predicted = []
        for loader, which in self.loader.by_source() if self.loader is not None else []:
            tasks = [task for task in trainer.step.tasks if which is None or task.name in which]
            tasks = [task for task in tasks if task.objective is None]
            if tasks:
                batch = some_samples(loader, SHOWN)
                image = image_of(trainer.step.model, batch)
                if image is None:
                    batch = some_samples(loader, COUNTED)
                predictions = predict(trainer.step.model, tasks, batch, trainer.step.passes.autocast)
                predicted += [(task, predictions[task.name], batch, image) for task in tasks]
        return predicted


def _shows(trainer: "Trainer", kind: str, every: int | None) -> bool:
    """Returns whether this kind is due and a logger takes it; with sharded parameters, all processes take part."""
    is_due = every is not None and (trainer.epoch % every == 0 or not trainer.goes_on)
    shows = is_due and trainer.loggers.takes(kind)
    return any_process([shows])[0] if is_sharded(next(trainer.step.model.parameters())) else shows


def matrix_pictures(
    tasks: Sequence[Task], matrices: "Matrices", split: str, facts: Mapping[str, Any]
) -> dict[str, pictures.Picture]:
    """Draws metrics whose values are matrices, by tag.

    Args:
        tasks: The tasks.
        matrices: The matrices by task and metric.
        split: The split on which they were computed.
        facts: The facts about the data, such as the names of classes.
    """
    return {
        tags.metric(task.name, name, split): pictures.matrix(values.numpy(), class_names(facts, task.target))
        for task in tasks
        for name, values in matrices.get(task.name, {}).items()
    }


def as_lists(tasks: Sequence[Task], splits: "Mapping[str, Matrices]", facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns matrices of up to a hundred classes as lists, for metrics.json, with the names of the classes.

    If all matrices together have too many values to be read again, the last ones are left out.

    Args:
        tasks: The tasks.
        splits: The matrices by split, task and metric.
        facts: The facts about the data, such as the names of classes.
    """
    small: dict[str, dict[str, dict[str, Any]]] = {}
    room = MOST_IN_MATRICES
    for split, each in splits.items():
        for task, by_name in each.items():
            for name, matrix in by_name.items():
                if len(matrix) <= MOST_ROWS and matrix.numel() <= room:
                    small.setdefault(split, {}).setdefault(task, {})[name] = matrix.tolist()
                    room -= matrix.numel()
    drawn = {task for each in small.values() for task in each}
    classes = {task.name: names for task in tasks if task.name in drawn and (names := class_names(facts, task.target))}
    return {"matrices": small, "classes": classes} if drawn else {}


def some_samples(loader: Loader, count: int) -> Batch:
    """Returns a batch of `count` evenly spaced samples, or of the first samples of an iterable data set."""
    dataset: Any = loader.dataset
    if not isinstance(dataset, IterableDataset | Drawn):
        indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long()
        dataset = (
            Fields(dataset.take(indices.to(loader.device)))
            if isinstance(dataset, Fields)
            else Subset(dataset, indices.tolist())
        )
    options: dict[str, Any] = {"seed": loader.seed, "device": loader.device, "collate": loader.collate}
    if isinstance(dataset, IterableDataset):
        options["readers"] = {"processes": 1, "workers": 1}
    batches: Any = Loader(dataset, batch_size=count, divided=False, **options).batches()  # one process draws pictures
    with closing(batches):  # also closes the files of a stream
        batch: Batch = next(batches)
    return batch


def predict(model: "MultiTaskModel", tasks: Sequence[Task], batch: Batch, autocast: Autocast) -> dict[str, Any]:
    """Computes the predictions of each task in eval mode, at least in float32; the model's mode is restored."""
    training = model.training
    model.eval()
    try:
        (values,) = without_gradients(model, [(tasks, batch)], autocast, take=lambda task, prediction, _: prediction)
    finally:
        model.train(training)
    return {task.name: at_least_single(prediction) for task, prediction in zip(tasks, values, strict=True)}


def image_of(model: "MultiTaskModel", batch: Batch) -> Tensor | None:
    """Returns the first input of the model that has the shape of images, (N, 1 or 3, H, W); None if there is none."""
    inputs = (batch.get(name) for name in model.inputs)
    return next((x for x in inputs if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)), None)


def class_names(facts: Mapping[str, Any], target: str) -> Sequence[str] | None:
    """Returns the names of a target's classes from the facts about the data, or about one of its sources."""
    for of_source in (facts, *facts.values()):
        targets = of_source.get("targets") if isinstance(of_source, Mapping) else None
        names = targets.get(target, {}).get("vocabulary") if isinstance(targets, Mapping) else None
        if names:
            return [str(name) for name in names]
    return None
