"""The meaning of predictions, by the loss or as declared, and their conversions."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import nn

import mtl
from mtl.losses import BinaryCrossEntropy
from mtl.outputs import as_values, at_least_single, output_of, probabilities, ranks


def task(loss=None, **options):
    return mtl.Task("t", head=nn.Identity(), loss=loss or (lambda p, y: p.mean()), target="y", **options)


class Focal(nn.CrossEntropyLoss):
    """A subclass, which takes the same predictions as its base class."""


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (nn.CrossEntropyLoss(), "logits"),
        (Focal(), "logits"),
        (nn.NLLLoss(), "logits"),
        (nn.BCEWithLogitsLoss(), "multilabel_logits"),
        (BinaryCrossEntropy(), "multilabel_logits"),
        (nn.MultiLabelSoftMarginLoss(), "multilabel_logits"),
        (nn.SoftMarginLoss(), "multilabel_logits"),
        (nn.BCELoss(), "probabilities"),
        *((loss(), "values") for loss in (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)),
        (nn.PoissonNLLLoss(), "log_values"),
        (nn.PoissonNLLLoss(log_input=False), "values"),
        (nn.MultiMarginLoss(), None),
        (nn.KLDivLoss(), "logits"),
        (None, None),
    ],
)
def test_by_the_loss(loss: nn.Module | None, kind: str | None) -> None:
    assert output_of(task(loss)) == kind


def test_what_is_stated() -> None:
    assert output_of(task(output="logits")) == "logits"
    assert output_of(task(nn.MSELoss(), output="probabilities")) == "probabilities"  # the Brier score as a loss
    with pytest.raises(mtl.UserError, match=r"output is logits, but its loss, BCEWithLogitsLoss, takes multilabel_log"):
        task(nn.BCEWithLogitsLoss(), output="logits")
    with pytest.raises(mtl.UserError, match=r"output is 'logit'; it must be one of logits, multilabel_logits, prob"):
        task(output="logit")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_those_of_float64(dtype: torch.dtype) -> None:
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).mul(8).to(dtype)
    each = [[1 / (1 + math.exp(-x)) for x in row] for row in logits.tolist()]
    of_classes = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits.tolist()]
    for kind, right in (("multilabel_logits", each), ("logits", of_classes)):
        found = probabilities(task(output=kind), logits)
        torch.testing.assert_close(found, torch.tensor(right, dtype=torch.float64), rtol=1e-13, atol=0)
    shown = as_values(task(nn.BCEWithLogitsLoss()), logits)
    assert shown.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(shown.double(), torch.tensor(each, dtype=torch.float64), rtol=1e-7, atol=0)
    assert torch.equal(as_values(task(nn.CrossEntropyLoss()), logits).to(dtype), logits)
    rates = as_values(task(nn.PoissonNLLLoss()), logits)
    torch.testing.assert_close(rates, at_least_single(logits).exp())
    assert at_least_single({"a": (logits, "b")})["a"][0].dtype == shown.dtype


def test_what_is_no_probability_is_refused() -> None:
    kind = task(output="probabilities")
    assert probabilities(kind, torch.tensor([-1e-3, 0.5, 1.0 + 2**-7])).tolist() == [0, 0.5, 1]  # rounded in bfloat16
    with pytest.raises(
        mtl.UserError, match=r"output is probabilities, but its predictions are between -2 and 3\. Set tasks\.t\.o"
    ):
        probabilities(kind, torch.tensor([0.5, -2.0, 3.0]))
    with pytest.raises(
        mtl.UserError, match=r"has shape \(4,\); for a single logit of yes or no, set tasks\.t\.output=multil"
    ):
        ranks(task(output="logits"), torch.zeros(4))


def test_scores_of_logits_are_in_their_order() -> None:
    """Far beyond where a sigmoid is 0 or 1, and as near to each other as the numbers are."""
    rising = [
        -math.inf,
        -1e300,
        -1e4,
        -38.0,
        -1.0000001,
        -1.0,
        -2e-30,
        -1e-30,
        0.0,
        1e-45,
        1e-30,
        0.5,
        24.0,
        37.5,
        38.0,
    ]
    rising += [1e4, math.nextafter(1e4, 2e4) + 1e-10, 1e300, math.inf]
    scores = ranks(task(output="multilabel_logits"), torch.tensor(rising, dtype=torch.float64))
    assert (scores.diff() > 0).all()
    assert 0 <= scores[0] < scores[-1] <= 1
    assert ranks(task(output="values"), torch.tensor([0.0, -0.0])).unique().numel() == 1
    every = torch.arange(0, 2**31 - 2**23, 9973, dtype=torch.int32).view(torch.float32)  # of both signs
    scores = ranks(task(output="values"), torch.cat([-every.flip(0), every[1:]]))
    assert (scores.diff() > 0).all()
    assert ranks(task(output="values"), torch.tensor([math.nan])).isnan()


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_scores_of_classes_are_in_the_order_of_their_probabilities(classes: int, scale: float) -> None:
    """Of all samples and classes, where the probabilities themselves, 1 - 1e-400 and such, are no floats."""
    with localcontext() as context:
        context.prec = 1500 if scale > 100 else 60
        count = 6 if scale > 100 else 30
        logits = torch.randn(count, classes, generator=torch.Generator().manual_seed(classes)) * scale
        logits = torch.cat([logits, logits[:2], logits[:2].flip(1)])  # and ties
        rows = [[Decimal(x).exp() for x in row] for row in logits.double().tolist()]
        exact = [p / sum(row) for row in rows for p in row]
        scores = ranks(task(output="logits"), logits).flatten().tolist()
        ordered = sorted(zip(exact, scores, strict=True))
        tie = Decimal(10) ** -(context.prec - 20)
        for (p, score), (q, other) in zip(ordered, ordered[1:], strict=False):
            assert score == other if q - p < tie else score < other


def test_the_same_probabilities_are_ties() -> None:
    """Logits that differ by a constant, and classes that share a sample's highest one."""
    logits = torch.tensor([[3.0, 1.0, 0.5, 0.25], [3.0, 3.0, 1.0, 2.0]])
    moved = torch.cat([logits, logits + 64, logits.flip(1) - 1024])
    a, b, c = ranks(task(output="logits"), moved).split(2)
    assert torch.equal(a, b)
    assert torch.equal(a, c.flip(1))
    assert a[1, 0] == a[1, 1]
