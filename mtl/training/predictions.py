"""Pictures that compare the predictions of a task with the targets."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.batch import Batch
from mtl.labels import MISSING_CLASS, label_mask, target_of
from mtl.loggers import pictures
from mtl.outputs import as_values, output_of
from mtl.task import BY_CLASS, BY_ELEMENT, Task

SHOWN = 8  # the number of samples in a picture with input images
MAPS = 4  # the number of samples in a picture of maps
LINES = 4  # the largest number of lines above an image, and of numbers or labels shown for a sample


def show(
    task: Task, prediction: Any, batch: Batch, image: Tensor | None, names: Sequence[str] | None = None
) -> pictures.Picture | None:
    """Draws the predictions of a task; the kind of picture depends on the loss and on the shapes.

    Args:
        task: The task.
        prediction: Logits of classes (N, C) or (N, C, H, W), binary logits or their probabilities (N,) or (N, K),
            numbers (N,) or (N, K), maps (N, H, W) or (N, K, H, W), or images (N, 1 or 3, H, W). The meaning follows
            from the task, see `mtl.outputs`.
        batch: The batch with the target, class numbers or floats. Missing labels, see `mtl.labels`, are shown as
            unknown.
        image: The input images, (N, 1 or 3, H, W); None if the inputs aren't images.
        names: The names of the classes, or of the binary labels.

    Returns:
        The picture; None if no kind of picture suits the prediction.
    """
    truth = batch.get(task.target)
    if not isinstance(prediction, Tensor) or not isinstance(truth, Tensor):
        return None
    prediction, truth = as_values(task, prediction).float().cpu(), _with_missing(task, batch).cpu()
    whole = not truth.is_floating_point()
    if isinstance(task.loss, BY_CLASS) and not whole and truth.shape == prediction.shape:  # a share of each class
        truth = torch.where(truth.isnan().any(1), MISSING_CLASS, truth.argmax(1))
        whole = True
    if whole and prediction.ndim == truth.ndim + 1 and prediction.shape[2:] == truth.shape[1:]:
        classes = prediction.argmax(1)
        if truth.ndim == 1:
            return _classes(classes, truth, image, names or [str(i) for i in range(prediction.shape[1])])
        return _class_maps(classes, truth, image) if truth.ndim == 3 else None
    if prediction.shape != truth.shape:
        return None
    if truth.ndim == 2 and truth.shape[1] == 1:
        prediction, truth = prediction[:, 0], truth[:, 0]
    if _is_yes_or_no(task, truth) and truth.ndim <= 2:
        yes = (prediction > (0.5 if output_of(task) else 0.0)).long()
        truth = truth if whole else torch.where(truth.isnan(), MISSING_CLASS, (truth > 0.5).long())
        if truth.ndim == 1:
            return _classes(yes, truth, image, names if names and len(names) == 2 else ["no", "yes"])
        count = truth.shape[1]
        labels = names if names and len(names) == count else [str(i) for i in range(count)]
        return _labels(yes, truth, image, labels)
    if whole:
        truth = truth.float().masked_fill(truth == MISSING_CLASS, math.nan)
    if truth.ndim <= 2:
        return _numbers(prediction.numpy(), truth.numpy(), image)
    pairs = list(zip(prediction[:MAPS].numpy(), truth[:MAPS].numpy(), strict=True))
    if truth.ndim == 3:
        return _maps([pictures.numbers_as_colours(p, t) for p, t in pairs], image)
    if truth.ndim == 4 and truth.shape[1] in (1, 3):
        return _maps([[pictures.rgb(p, t), pictures.rgb(t)] for p, t in pairs], image)
    if truth.ndim == 4:
        each = [[pictures.numbers_as_colours(*both) for both in zip(p, t, strict=True)][:LINES] for p, t in pairs]
        return _maps([[each for both in row for each in both] for row in each], image)
    return None


def _with_missing(task: Task, batch: Batch) -> Tensor:
    """Returns the target as class numbers, with -100 for missing labels, or as floats, with NaN for missing ones."""
    target: Tensor = target_of(task, batch)
    numbers = target.is_floating_point() or isinstance(task.loss, BY_ELEMENT)
    present = label_mask(task, batch)
    target = target.float() if numbers else target.long()
    if present is None:
        return target
    missing = ~present.view(*present.shape, *[1] * (target.ndim - present.ndim))
    return target.masked_fill(missing, math.nan if numbers else MISSING_CLASS)


def _is_yes_or_no(task: Task, truth: Tensor) -> bool:
    """Returns whether the labels are binary, by the meaning of the prediction.

    If the meaning isn't known, integer targets that are all 0 or 1 are binary labels.
    """
    if output_of(task) is not None and output_of(task) not in ("multilabel_logits", "probabilities"):
        return False
    if isinstance(task.loss, BY_ELEMENT):
        return output_of(task) is not None
    whole = not truth.is_floating_point()
    return whole and truth.ndim <= 2 and set(truth.flatten().tolist()) <= {0, 1, MISSING_CLASS}


def _classes(predicted: Tensor, truth: Tensor, image: Tensor | None, names: Sequence[str]) -> pictures.Picture:
    is_known = (truth >= 0).numpy()
    if image is None:
        return pictures.confusion(predicted.numpy()[is_known], truth.numpy()[is_known], names)

    def name(number: int) -> str:
        return names[number] if number < len(names) else str(number)

    words, right = [], []
    for p, t, known in zip(predicted[:SHOWN].tolist(), truth[:SHOWN].tolist(), is_known, strict=False):
        words.append(name(p) if known and p == t else f"{name(p)} (is {name(t)})" if known else f"{name(p)} (unknown)")
        right.append(p == t if known else None)
    return pictures.labelled(_inputs(image, SHOWN), words, right)


def _labels(predicted: Tensor, truth: Tensor, image: Tensor | None, names: Sequence[str]) -> pictures.Picture:
    """Draws (N, K) binary labels: above each image the labels that are or were predicted as 1, mistakes first."""
    if image is None:
        return pictures.yes_and_no(predicted.numpy(), truth.numpy(), names)
    words, right = [], []
    for p, t in zip(predicted[:SHOWN], truth[:SHOWN], strict=True):
        known = t >= 0
        lines = [f"{names[i]} (is not)" for i in ((p == 1) & (t == 0)).nonzero()[:, 0]]
        lines += [f"not {names[i]} (is)" for i in ((p == 0) & (t == 1)).nonzero()[:, 0]]
        lines += [names[i] for i in ((p == 1) & (t == 1)).nonzero()[:, 0]]
        lines += [f"{names[i]} (unknown)" for i in ((p == 1) & ~known).nonzero()[:, 0]]
        words.append("\n".join(_first(lines)) or "none")
        right.append(bool((p == t)[known].all()) if known.any() else None)
    return pictures.labelled(_inputs(image, SHOWN), words, right)


def _numbers(predicted: Any, truth: Any, image: Tensor | None) -> pictures.Picture:
    """Draws (N,) or (N, K) numbers."""
    if image is None:
        return pictures.scatter(predicted, truth)
    words = []
    for each in zip(predicted[:SHOWN], truth[:SHOWN], strict=True):
        pairs = zip(*map(np.atleast_1d, each), strict=True)
        words.append(
            "\n".join(_first([f"{p:.3g} (is {t:.3g})" if np.isfinite(t) else f"{p:.3g} (unknown)" for p, t in pairs]))
        )
    return pictures.labelled(_inputs(image, SHOWN), words, [None] * len(words))


def _first(lines: Sequence[str]) -> Sequence[str]:
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], f"{len(lines) - LINES + 1} more"]


def _class_maps(predicted: Tensor, truth: Tensor, image: Tensor | None) -> pictures.Picture:
    pairs = zip(predicted[:MAPS].numpy(), truth[:MAPS].numpy(), strict=True)
    return _maps([pictures.classes_as_colours(p, t) for p, t in pairs], image)


def _maps(rows: Sequence[Sequence[Any]], image: Tensor | None) -> pictures.Picture:
    """Draws rows of pairs of a predicted map and the true one."""
    titles = ["predicted", "truth"] * (len(rows[0]) // 2)
    if image is None:
        return pictures.side_by_side(rows, titles)
    inputs = _inputs(image, len(rows))
    return pictures.side_by_side([[first, *row] for first, row in zip(inputs, rows, strict=True)], ["input", *titles])


def _inputs(image: Tensor, count: int) -> list[Any]:
    return [pictures.rgb(each) for each in image[:count].float().cpu().numpy()]
