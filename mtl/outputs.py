"""The meaning of a task's prediction, and its conversion to probabilities, values or ranks for metrics and pictures.

    kind                the prediction
    logits              logits of classes along dimension 1, as for cross-entropy; log-probabilities count as logits
    multilabel_logits   an independent binary logit in each element
    probabilities       numbers in [0, 1], of classes or of binary labels
    values              numbers in the unit of the target
    log_values          logarithms of such values, the default of `torch.nn.PoissonNLLLoss`

The kind is never guessed from the numbers in a batch, since figures would then depend on the batch size.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mtl.choices import OUTPUTS
from mtl.errors import UserError

if TYPE_CHECKING:
    from mtl.task import Task

_SIGN = torch.iinfo(torch.int64).min


def output_of_loss(loss: Any) -> str | None:
    """Returns the kind of prediction that one of torch's losses, or a subclass, expects; None for other losses."""
    match loss:
        case nn.CrossEntropyLoss() | nn.NLLLoss() | nn.KLDivLoss():
            return "logits"
        case nn.BCEWithLogitsLoss() | nn.MultiLabelSoftMarginLoss() | nn.SoftMarginLoss():
            return "multilabel_logits"
        case nn.BCELoss():
            return "probabilities"
        case nn.PoissonNLLLoss():
            return "log_values" if loss.log_input else "values"
        case nn.MSELoss() | nn.L1Loss() | nn.SmoothL1Loss() | nn.HuberLoss() | nn.GaussianNLLLoss():
            return "values"
    return None


def output_of(task: "Task") -> str | None:
    """Returns the kind of the task's prediction: `task.output`, or what the loss expects; None if neither is known."""
    return task.output or output_of_loss(task.loss)


def check_output(task: "Task") -> None:
    """Raises a UserError if `task.output` is unknown or contradicts the task's loss.

    Losses of values, such as the mean squared error, don't contradict other kinds.
    """
    if task.output is None:
        return
    if task.output not in OUTPUTS:
        raise UserError(f"task '{task.name}': output is {task.output!r}; it must be one of {', '.join(OUTPUTS)}")
    taken = output_of_loss(task.loss)
    if taken not in (None, "values", task.output):
        raise UserError(
            f"task '{task.name}': output is {task.output}, but its loss, {type(task.loss).__name__}, takes {taken}. "
            f"Set tasks.{task.name}.output={taken}, or another loss"
        )


def at_least_single(prediction: Any) -> Any:
    """Returns the prediction, a tensor or nested tensors, with half-precision tensors converted to float32."""
    half = (torch.float16, torch.bfloat16)
    return tree_map(lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in half else leaf, prediction)


def probabilities(task: "Task", prediction: Tensor) -> Tensor:
    """Converts the task's prediction to probabilities, in float64.

    Raises:
        UserError: If logits of classes have no dimension of classes, or if probabilities are outside [0, 1].
    """
    prediction = prediction.double()
    match output_of(task):
        case "logits":
            return _by_class(task, prediction).softmax(1)
        case "multilabel_logits":
            return prediction.sigmoid()
    # Rounding, to bfloat16 at worst, may give numbers slightly outside the interval.
    if ((prediction < -0.01) | (prediction > 1.01)).any():
        low, high = prediction.min().item(), prediction.max().item()
        raise UserError(
            f"task '{task.name}': its output is probabilities, but its predictions are between {low:.4g} and "
            f"{high:.4g}. Set tasks.{task.name}.output to one of {', '.join(OUTPUTS)}"
        )
    return prediction.clamp(0, 1)


def log_probabilities(task: "Task", prediction: Tensor) -> Tensor:
    """Converts the task's prediction to the logarithms of the probabilities of classes, in float64.

    Raises:
        UserError: If the conversion isn't possible, see `probabilities`.
    """
    if output_of(task) == "logits":
        return _by_class(task, prediction.double()).log_softmax(1)
    return probabilities(task, prediction).log()


def as_values(task: "Task", prediction: Any) -> Any:
    """Converts binary logits to probabilities and logarithms to values; other predictions don't change.

    The result has at least float32.
    """
    prediction = at_least_single(prediction)
    if isinstance(prediction, Tensor) and prediction.is_floating_point():
        match output_of(task):
            case "multilabel_logits":
                return prediction.double().sigmoid().to(prediction.dtype)
            case "log_values":
                return prediction.exp()
    return prediction


def ranks(task: "Task", prediction: Tensor) -> Tensor:
    """Converts the task's prediction to scores in [0, 1], float64, in the order of the probabilities or values.

    Probabilities saturate, since a float64 sigmoid is 1 for logits above 37; these scores don't. For logits of classes,
    the scores are in the order of log(p / (1 - p)), which is the same order for all samples and classes.

    Raises:
        UserError: If the conversion isn't possible, see `probabilities`.
    """
    match output_of(task):
        case "logits":
            return _in_order(_rounded(_margins(_by_class(task, prediction.double()))))
        case "probabilities":
            return probabilities(task, prediction)
    return _in_order(prediction.double())


def _by_class(task: "Task", prediction: Tensor) -> Tensor:
    if prediction.ndim < 2:
        raise UserError(
            f"task '{task.name}': its output is logits of classes along dimension 1, but its prediction has shape "
            f"{tuple(prediction.shape)}; for a single logit of yes or no, set "
            f"tasks.{task.name}.output=multilabel_logits"
        )
    return prediction


def _margins(logits: Tensor) -> Tensor:
    """Returns log(p / (1 - p)) for the softmax p: each logit minus the log-sum-exp of the other logits."""
    if logits.shape[1] == 2:
        return logits - logits.flip(1)
    highest, top = logits.max(1, keepdim=True)
    # Subtracting the highest logit makes the numbers equal for samples whose logits differ by a constant.
    below = (logits - highest).where(logits != highest, 0.0)
    is_top = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top, True)
    exponentials = below.exp()
    rest = (exponentials.sum(1, keepdim=True) - exponentials).clamp(min=1.0).log()  # the highest one is among the rest
    return torch.where(is_top, -below.masked_fill(is_top, -math.inf).logsumexp(1, keepdim=True), below - rest)


def _rounded(margins: Tensor) -> Tensor:
    """Rounds to 44 bits, so that ties remain ties: the order of summation changes the last bits of the margins."""
    bits = margins.view(torch.int64)
    return ((bits + 128) >> 8 << 8).view(torch.float64)


def _in_order(scores: Tensor) -> Tensor:
    """Maps float64 numbers to [0, 1] in the same order, with a resolution of 50 bits; NaN stays NaN.

    Floats have the order of their bit patterns, negative ones in reverse. The last 3 bits of the patterns are dropped.
    """
    bits = (scores + 0.0).contiguous().view(torch.int64)  # adding 0.0 converts -0.0 to 0.0
    ordered = torch.where(bits >= 0, bits, _SIGN - bits) >> 3
    return (ordered + 0x2FEE000000000000).view(torch.float64).masked_fill(scores.isnan(), math.nan)
