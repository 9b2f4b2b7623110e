"""What the logs show beside numbers, at intervals: the tasks' cosines, some predictions, histograms if asked for."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from mtl import pictures
from mtl.batch import Batch
from mtl.data import Drawn, Fields, Loader, Mix
from mtl.errors import told
from mtl.passes import look
from mtl.precision import Autocast
from mtl.task import Task

if TYPE_CHECKING:
    from mtl.model import MultiTaskModel
    from mtl.trainer import Trainer

SHOWN = 8  # samples of which images are shown
MAPS = 4  # samples whose maps are shown
COUNTED = 256  # samples where there is no image


class Gallery:
    """Called with the trainer after each epoch, it gives pictures and histograms to those loggers that take them.

    Args:
        loader: of the samples whose predictions are shown, some of them; None for none.
        pictures_every: epochs from one set of pictures to the next; the last epoch has one too. None for none.
        histograms_every: the same of histograms of all parameters and their gradients.
        facts: what is known of the data: names of classes.
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
        """Shows what is due."""
        if _due(trainer, self.pictures_every) and trainer.loggers.takes("picture"):
            try:
                found = self.pictures(trainer)
            except Exception as error:  # odd data; training is worth more than its pictures
                trainer.tell(f"warning  no more pictures: {told(error)}")
                self.pictures_every = None
                return
            for tag, picture in found.items():
                trainer.loggers.show("picture", tag, trainer.global_step, picture)
        if _due(trainer, self.histograms_every) and trainer.loggers.takes("histogram"):
            for name, parameter in trainer.step.parameters.items():
                trainer.loggers.show("histogram", f"parameter/{name}", trainer.global_step, parameter.detach())
                gradient = parameter.grad
                if gradient is not None:
                    values = gradient.coalesce().values() if gradient.is_sparse else gradient
                    trainer.loggers.show("histogram", f"gradient/{name}", trainer.global_step, values)

    def pictures(self, trainer: "Trainer") -> dict[str, pictures.Picture]:
        """By tag: `cosine/matrix`, the mean since the last pictures, and `prediction/{task}`."""
        found = {}
        names = [task.name for task in trainer.step.tasks]
        since = max(trainer.epoch - (self.pictures_every or 1), 0)
        readings = trainer.readings
        cosines = mean_cosines(
            [m for m, epoch in zip(readings.measured, readings.measured_in, strict=True) if epoch > since]
        )
        if cosines:
            found["cosine/matrix"] = pictures.cosine_matrix(names, cosines)
        for loader, which in self.loader.parts() if self.loader is not None else []:
            tasks = [task for task in trainer.step.tasks if which is None or task.name in which]
            tasks = [task for task in tasks if task.objective is None]
            if tasks:
                batch = some_samples(loader, COUNTED if not has_images(loader, trainer.step.model) else SHOWN)
                predictions = predict(trainer.step.model, tasks, batch, trainer.step.autocast)
                image = image_of(trainer.step.model, batch)
                for task in tasks:
                    names_of = class_names(self.facts, task.target)
                    picture = show(predictions[task.name], batch.get(task.target), image, names_of)
                    if picture is not None:
                        found[f"prediction/{task.name}"] = picture
        return found


def _due(trainer: "Trainer", every: int | None) -> bool:
    return every is not None and (trainer.epoch % every == 0 or trainer.epoch == trainer.max_epochs)


def mean_cosines(measured: Sequence[Mapping[str, float]]) -> dict[tuple[str, str], float]:
    """By pair of tasks, the mean over the steps in which their cosine was measured and defined."""
    tags = dict.fromkeys(tag for figures in measured for tag in figures if tag.startswith("cosine/"))
    found = {}
    for tag in tags:
        values = [figures[tag] for figures in measured if np.isfinite(figures.get(tag, np.nan))]
        if values:
            a, b = tag.removeprefix("cosine/").split("~")
            found[a, b] = fmean(values)
    return found


def some_samples(loader: Loader, count: int) -> Batch:
    """A batch of some of the data set's samples, evenly spaced, or an iterable one's first; loaded in this process."""
    dataset: Any = loader.dataset
    if not isinstance(dataset, IterableDataset | Drawn):
        indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long()
        dataset = (
            Fields(dataset.take(indices.to(loader.device)))
            if isinstance(dataset, Fields)
            else Subset(dataset, indices.tolist())
        )
    few = Loader(dataset, batch_size=count, seed=loader.seed, device=loader.device, collate=loader.collate)
    return next(few.batches())


def predict(model: "MultiTaskModel", tasks: Sequence[Task], batch: Batch, autocast: Autocast) -> dict[str, Any]:
    """Each task's predictions in eval mode, without gradients; the model's mode is afterwards what it was."""
    training = model.training
    model.eval()
    try:
        (found,) = look(model, [(tasks, batch)], autocast, take=lambda task, prediction, batch: prediction)
    finally:
        model.train(training)
    return {task.name: prediction for task, prediction in zip(tasks, found, strict=True)}


def image_of(model: "MultiTaskModel", batch: Batch) -> Tensor | None:
    """The first of the model's inputs that looks like images, (N, 1 or 3, H, W)."""
    inputs = (batch.get(name) for name in model.inputs)
    return next((x for x in inputs if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)), None)


def has_images(loader: Loader, model: "MultiTaskModel") -> bool:
    """Whether the samples have one."""
    return image_of(model, some_samples(loader, 1)) is not None


def class_names(facts: Mapping[str, Any], target: str) -> Sequence[str] | None:
    """What the data's facts, or those of one of its sources, call the target's classes."""
    for known in (facts, *facts.values()):
        targets = known.get("targets") if isinstance(known, Mapping) else None
        names = targets.get(target, {}).get("vocabulary") if isinstance(targets, Mapping) else None
        if names:
            return [str(name) for name in names]
    return None


def show(
    prediction: Any, target: Any, image: Tensor | None, names: Sequence[str] | None = None
) -> pictures.Picture | None:
    """The picture of a task's predictions, by their shapes; None for what there is no picture of.

    Args:
        prediction: logits of classes (N, C) or (N, C, H, W), logits (N,) or (N, C) of yes or no, numbers (N,), maps
            (N, H, W) or images (N, 1 or 3, H, W).
        target: what the prediction is compared with, class numbers or floats.
        image: the input, (N, 1 or 3, H, W), if it is one.
        names: of the classes.
    """
    if not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
        return None
    prediction, target = prediction.float().cpu(), target.cpu()
    whole = not target.is_floating_point()
    shape = tuple(prediction.shape[2:])
    if prediction.ndim == target.ndim + 1 and whole and (prediction.ndim == 2 or shape == tuple(target.shape[1:])):
        classes = prediction.argmax(1)
        if target.ndim == 1:
            return _classes(classes, target, image, names or [str(i) for i in range(prediction.shape[1])])
        if target.ndim == 3:
            coloured = [
                pictures.classes_as_colours(p, t) for p, t in zip(classes[:MAPS].numpy(), target.numpy(), strict=False)
            ]
            return _maps(coloured, image)
    if prediction.shape != target.shape:
        return None
    if target.ndim == 1 and set(target[target.isfinite()].unique().tolist()) <= {0, 1} and whole:
        return _classes((prediction > 0).long(), target, image, ["no", "yes"])
    if target.ndim == 1:
        return _numbers(prediction.numpy(), target.float().numpy(), image)
    pairs = list(zip(prediction[:MAPS].numpy(), target[:MAPS].float().numpy(), strict=True))
    if target.ndim == 3:
        return _maps([pictures.numbers_as_colours(p, t) for p, t in pairs], image)
    if target.ndim == 4 and target.shape[1] in (1, 3):
        return _maps([[pictures.rgb(p, t), pictures.rgb(t)] for p, t in pairs], image)
    return None


def _classes(predicted: Tensor, truth: Tensor, image: Tensor | None, names: Sequence[str]) -> pictures.Picture:
    there = (truth >= 0).numpy()
    if image is None:
        return pictures.confusion(predicted.numpy()[there], truth.numpy()[there], names)

    def name(number: int) -> str:
        return names[number] if number < len(names) else str(number)

    words, right = [], []
    for p, t, known in zip(predicted[:SHOWN].tolist(), truth[:SHOWN].tolist(), there, strict=False):
        words.append(name(p) if known and p == t else f"{name(p)} (is {name(t)})" if known else f"{name(p)} (unknown)")
        right.append(p == t if known else None)
    return pictures.labelled([pictures.rgb(each) for each in image[:SHOWN].float().cpu().numpy()], words, right)


def _numbers(predicted: Any, truth: Any, image: Tensor | None) -> pictures.Picture:
    if image is None:
        there = np.isfinite(truth)
        return pictures.scatter(predicted[there], truth[there])
    pairs = list(zip(predicted[:SHOWN], truth[:SHOWN], strict=True))
    images = [pictures.rgb(each) for each in image[:SHOWN].float().cpu().numpy()]
    words = [f"{p:.3g} (is {t:.3g})" if np.isfinite(t) else f"{p:.3g} (unknown)" for p, t in pairs]
    return pictures.labelled(images, words, [None] * len(pairs))


def _maps(pairs: Sequence[Sequence[Any]], image: Tensor | None) -> pictures.Picture:
    if image is None:
        return pictures.side_by_side(pairs, ["predicted", "truth"])
    inputs = [pictures.rgb(each) for each in image[: len(pairs)].float().cpu().numpy()]
    rows = [[first, *pair] for first, pair in zip(inputs, pairs, strict=True)]
    return pictures.side_by_side(rows, ["input", "predicted", "truth"])
