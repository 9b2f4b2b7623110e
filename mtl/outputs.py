"""What a task's prediction means: logits, probabilities or values, and what is made of it for metrics and pictures.

    kind                the prediction
    logits              of classes along dimension 1, as cross-entropy takes them; log-probabilities are logits too
    multilabel_logits   each element is the logit of a yes or no of its own
    probabilities       in [0, 1], of classes or of yes and no
    values              in the unit of the target
    log_values          the logarithm of such values, as `torch.nn.PoissonNLLLoss` takes it by default

The kind is never guessed from a batch's numbers, which would make figures depend on how the samples are batched.
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
    """The kind of prediction that a loss of torch, or a subclass of one, takes; None for others."""
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
    """The kind of the task's prediction: what the task states, or what its loss takes; None where neither is known."""
    return task.output or output_of_loss(task.loss)


def check_output(task: "Task") -> None:
    """Raises a UserError for a stated output that there is not, or that contradicts the task's loss.

    Losses of values, such as a mean squared error, are also used on probabilities and logits.
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
    """The prediction, a tensor or a nest of tensors, with its half-precision tensors in float32."""
    half = (torch.float16, torch.bfloat16)
    return tree_map(lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in half else leaf, prediction)


def probabilities(task: "Task", prediction: Tensor) -> Tensor:
    """The probabilities that the task's prediction stands for, in float64.

    Raises:
        UserError: for logits of classes without a dimension of classes, and for probabilities outside [0, 1].
    """
    prediction = prediction.double()
    match output_of(task):
        case "logits":
            return _by_class(task, prediction).softmax(1)
        case "multilabel_logits":
            return prediction.sigmoid()
    # Rounding, to bfloat16 at worst, may lead out of the interval.
    if ((prediction < -0.01) | (prediction > 1.01)).any():
        low, high = prediction.min().item(), prediction.max().item()
        raise UserError(
            f"task '{task.name}': its predictions are said to be probabilities, and lie between {low:.4g} and "
            f"{high:.4g}. Set tasks.{task.name}.output to what they are: {', '.join(OUTPUTS)}"
        )
    return prediction.clamp(0, 1)


def log_probabilities(task: "Task", prediction: Tensor) -> Tensor:
    """The logarithms of the probabilities of classes that the task's prediction stands for, in float64.

    Raises:
        UserError: as `probabilities`.
    """
    if output_of(task) == "logits":
        return _by_class(task, prediction.double()).log_softmax(1)
    return probabilities(task, prediction).log()


def as_values(task: "Task", prediction: Any) -> Any:
    """The prediction in the terms of the target: probabilities for logits of yes or no, values for their logarithms.

    In float32 at least; logits of classes stay logits.
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
    """Scores in [0, 1], float64, in the order of the probabilities, or values, that the prediction stands for.

    Probabilities themselves saturate: a float64 sigmoid is 1 from a logit of 37 on. The scores of logits don't; of
    classes they are in the order of log(p / (1 - p)), which is one order for all samples and classes.

    Raises:
        UserError: as `probabilities`.
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
            f"task '{task.name}': its output is said to be logits of classes along dimension 1, and its prediction is "
            f"of shape {tuple(prediction.shape)}; a single logit of yes or no is "
            f"tasks.{task.name}.output=multilabel_logits"
        )
    return prediction


def _margins(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of the softmax's probabilities p: each logit less the log-sum-exp of the others."""
    if logits.shape[1] == 2:
        return logits - logits.flip(1)
    highest, top = logits.max(1, keepdim=True)
    # Samples whose logits differ by a constant have the same probabilities: from here on they are the same numbers.
    below = (logits - highest).where(logits != highest, 0.0)
    is_top = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top, True)
    exponentials = below.exp()
    rest = (exponentials.sum(1, keepdim=True) - exponentials).clamp(min=1.0).log()  # the highest one is among the rest
    return torch.where(is_top, -below.masked_fill(is_top, -math.inf).logsumexp(1, keepdim=True), below - rest)


def _rounded(margins: Tensor) -> Tensor:
    """To 44 bits: what sums of exponentials differ by in the last bits, as their order does, stays a tie."""
    bits = margins.view(torch.int64)
    return ((bits + 128) >> 8 << 8).view(torch.float64)


def _in_order(scores: Tensor) -> Tensor:
    """Any float64 numbers in [0, 1], in the same order, to 50 bits; NaN stays NaN.

    Floats are ordered as their bits are, negative ones the other way round. A step of 8 in these becomes one of 1.
    """
    bits = (scores + 0.0).contiguous().view(torch.int64)  # one zero
    ordered = torch.where(bits >= 0, bits, _SIGN - bits) >> 3
    return (ordered + 0x2FEE000000000000).view(torch.float64).masked_fill(scores.isnan(), math.nan)
