"""Metrics have the same values for every batch size and precision."""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
import torchmetrics.classification as by_class
import yaml
from conftest import ROOT
from torch import nn
from torchmetrics import Metric

import mtl
from mtl.config.targets import make
from mtl.data import Fields, Loader
from mtl.step.precision import autocast_for
from mtl.training.metrics import GUESSING, RANKED, TaskMetric
from mtl.training.validation import Validation

CLASSES = 3
ARGUMENTS = {"num_classes": CLASSES, "num_labels": CLASSES, "num_groups": 2, "beta": 1.5, "fpr_range": (0.1, 0.9)}
ARGUMENTS |= dict.fromkeys(("min_precision", "min_recall", "min_specificity", "min_sensitivity"), 0.5)
ALL = {
    name: cls
    for name, cls in vars(by_class).items()
    if isinstance(cls, type) and name.startswith(("Binary", "Multiclass", "Multilabel"))
}


def made(cls: type[Metric], **options: Any) -> Metric:
    wanted = signature(cls.__init__).parameters
    options = {name: value for name, value in ARGUMENTS.items() if name in wanted} | options
    return cls(**options)


class Given(nn.Module):
    """A trunk that returns its input, in the data type of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x


def figures(
    metrics: dict[str, Callable[[], Metric]],
    predictions: torch.Tensor,
    target: torch.Tensor,
    *,
    size: int,
    loss: Any = None,
    precision: str = "fp32",
    **options: Any,
) -> dict[str, float]:
    """Returns the figures of a model with these predictions."""
    loss = loss or (lambda p, y: p.float().mean())
    task = mtl.Task("t", head=nn.Identity(), loss=loss, target="y", metrics=metrics, **options)
    model = mtl.MultiTaskModel(Given(), [task], inputs=["x"])
    loader = Loader(Fields({"x": predictions, "y": target}), batch_size=size)
    return Validation(model, [task], autocast_for(precision, torch.device("cpu")))(loader)["t"]


def logits_of(kind: str, count: int = 40, *, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits, for some samples all in [0, 1], and labels that depend on them."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(count, *[CLASSES] * (kind != "Binary"), generator=generator) * scale
    logits[::4] = logits[::4].sigmoid()
    noisy = logits + scale * torch.randn(logits.shape, generator=generator)
    return logits, noisy.argmax(1) if kind == "Multiclass" else (noisy > 0).long()


def kind_of(name: str) -> str:
    return next(kind for kind in ("Binary", "Multiclass", "Multilabel") if name.startswith(kind))


def updated(metric: Metric, *batches: tuple[torch.Tensor, ...]) -> Any:
    for batch in batches:
        groups = [torch.arange(len(batch[1])) % 2] * ("groups" in signature(type(metric).update).parameters)
        metric.update(*batch, *groups)
    return metric.compute()


def same(one: Any, other: Any, tolerance: float = 1e-6) -> bool:
    if isinstance(one, dict | tuple | list):
        values = zip(*(list(v.values()) if isinstance(v, dict) else v for v in (one, other)), strict=True)
        return len(one) == len(other) and all(same(a, b) for a, b in values)
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(ALL))
def test_it_is_known_which_metrics_guess(name: str) -> None:
    """Logits that all lie in [0, 1] are what a metric that guesses takes for probabilities."""
    kind = kind_of(name)
    logits, target = logits_of(kind, 80)
    logits = logits.sigmoid()
    converted = logits.double().softmax(1) if kind == "Multiclass" else logits.double().sigmoid()
    thresholds = [0.3, 0.5, 0.6, 0.7] if "thresholds" in signature(ALL[name].__init__).parameters else None
    options = {"thresholds": thresholds} if thresholds else {}
    if "Fairness" in name or "GroupStat" in name or "Ranking" in name or "Coverage" in name:
        assert issubclass(ALL[name], GUESSING)  # by the order within a sample, or of two groups
        return
    as_they_are, right = (updated(made(ALL[name], **options), (p, target)) for p in (logits, converted))
    assert issubclass(ALL[name], GUESSING) == (not same(as_they_are, right))


def single(name: str) -> bool:
    """Returns whether the metric returns one number for predictions and targets."""
    logits, target = logits_of(kind_of(name))
    given = logits.softmax(1) if kind_of(name) == "Multiclass" else logits.sigmoid()
    if "groups" in signature(ALL[name].update).parameters:
        return False
    value = updated(made(ALL[name]), (given, target))
    return isinstance(value, torch.Tensor) and value.numel() == 1


def shipped() -> dict[str, Callable[[], Metric]]:
    """Returns every metric in the configs with its arguments, by file, task and name."""
    found = {}
    for path in [*(ROOT / "configs/objective").glob("*.yaml"), *(ROOT / "configs/task").glob("*.yaml")]:
        config = yaml.safe_load(path.read_text())
        tasks = {"": config} if path.parent.name == "objective" else config.get("tasks", {})
        for task, name, node in ((t, n, m) for t, c in tasks.items() for n, m in (c.get("metrics") or {}).items()):
            if node is not None and not node["_target_"].startswith("mtl.metrics."):  # several figures
                node = {key: CLASSES if "num_outputs" in str(value) else value for key, value in node.items()}
                found[f"{Path(path).stem}{task}_{name}"] = partial(make, node, "here")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["Binary", "Multiclass", "Multilabel", "values"])
def test_every_metric_is_the_same_whatever_the_batches(kind: str, precision: str) -> None:
    metrics: dict[str, Callable[[], Metric]]
    if kind == "values":
        logits, target = logits_of("Binary")
        target = target + 0.25
        metrics = {n: f for n, f in shipped().items() if not isinstance(f(), tuple(ALL.values()))}
        assert len(metrics) >= 4
        output, convert = "values", lambda p: p.float()
    else:
        logits, target = logits_of(kind)
        metrics = {name: partial(made, cls) for name, cls in ALL.items() if kind_of(name) == kind and single(name)}
        metrics |= {f"{name}Binned": partial(f, thresholds=9) for name, f in metrics.items() if "AUROC" in name}
        metrics |= {n: f for n, f in shipped().items() if type(f()).__name__.startswith(kind)}
        assert len(metrics) >= 15
        output = "logits" if kind == "Multiclass" else "multilabel_logits"
        convert = lambda p: p.double().softmax(1) if kind == "Multiclass" else p.double().sigmoid()  # noqa: E731
    type_ = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    given = convert(logits.to(type_))
    for size in (1, 7, 40):
        found = figures(metrics, logits, target, size=size, output=output, precision=precision)
        for name, metric in metrics.items():
            right = updated(metric(), (given, target)).item()
            assert found[name] == pytest.approx(right, abs=2e-6), (name, size)


def mann_whitney(scores: list[float], positive: list[bool]) -> float:
    pairs = [(p, q) for (p, a), (q, b) in product(zip(scores, positive, strict=True), repeat=2) if a and not b]
    return sum((p > q) + 0.5 * (p == q) for p, q in pairs) / len(pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", [mtl.losses.BinaryCrossEntropy(), None])
@pytest.mark.parametrize("spread", [(24.0, 14.0), (-0.8, 13.7), (0.0, 1.0), (1e4, 200.0), (0.0, 1e-30)])
def test_auroc_is_that_of_the_ranks(spread: tuple[float, float], loss: Any, precision: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = spread[0] + spread[1] * torch.rand(60, generator=generator)
    logits[:10] = logits[10:20]  # ties
    target = (torch.rand(60, generator=generator) < 0.4).long()
    options = {} if loss else {"output": "multilabel_logits"}
    scores = logits.to(torch.bfloat16 if precision == "bf16" else torch.float32).tolist()
    right = mann_whitney(scores, target.bool().tolist())
    for size in (1, 7, 60):
        metrics = {"auc": by_class.BinaryAUROC, "gini": lambda: 2 * by_class.BinaryAUROC() - 1}
        found = figures(metrics, logits, target, size=size, loss=loss, precision=precision, **options)
        assert found["auc"] == pytest.approx(right, abs=1e-6)
        assert found["gini"] == pytest.approx(2 * right - 1, abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3])
def test_auroc_of_classes_is_that_of_the_ranks(offset: float) -> None:
    """Of two classes that is the order of the difference of their logits, also where the softmax is 1."""
    generator = torch.Generator().manual_seed(3)
    margin = offset + torch.rand(50, generator=generator)
    margin[:10] = margin[10:20]
    target = (torch.rand(50, generator=generator) < 0.4).long()
    logits = torch.stack([torch.zeros(50), margin], 1)
    right = mann_whitney(margin.tolist(), target.bool().tolist())
    for size in (1, 7, 50):
        metric = {"auc": partial(torchmetrics.AUROC, task="multiclass", num_classes=2)}
        found = figures(metric, logits, target, size=size, loss=nn.CrossEntropyLoss())
        assert found["auc"] == pytest.approx(right, abs=1e-6)


def test_labels_whose_logits_saturate() -> None:
    logits, target = logits_of("Multilabel")
    moved = logits / 10 + torch.tensor([40.0, -50.0, 1e3])
    metric = partial(by_class.MultilabelAUROC, num_labels=CLASSES)
    found = figures({"auc": metric}, moved, target, size=7, output="multilabel_logits")["auc"]
    each = [mann_whitney(moved[:, i].tolist(), target[:, i].bool().tolist()) for i in range(CLASSES)]
    assert found == pytest.approx(sum(each) / CLASSES, abs=1e-6)


def test_a_guess_is_refused_where_nothing_is_known() -> None:
    logits, target = logits_of("Binary")
    with pytest.raises(
        mtl.UserError, match=r"metric 'auc', BinaryAUROC, takes probabilities, and .* Set tasks\.t\.outpu"
    ):
        figures({"auc": by_class.BinaryAUROC}, logits, target, size=7)
    with pytest.raises(mtl.UserError, match="takes probabilities, and the predictions are values"):
        figures({"f1": by_class.BinaryF1Score}, logits, target, size=7, output="values")
    with pytest.raises(mtl.UserError, match="predictions are logits of classes. Use the metric for several classes"):
        figures({"f1": lambda: 1 - by_class.BinaryF1Score()}, logits, target, size=7, output="logits")
    wrapped = lambda: torchmetrics.wrappers.Running(by_class.BinaryF1Score(), window=3)  # noqa: E731
    with pytest.raises(mtl.UserError, match="BinaryF1Score, takes probabilities"):
        figures({"f1": wrapped}, logits, target, size=7)
    logits, target = logits_of("Multiclass")
    accuracy = {"accuracy": partial(by_class.MulticlassAccuracy, num_classes=CLASSES, average="micro")}
    right = (logits.argmax(1) == target).double().mean().item()
    assert figures(accuracy, logits, target, size=7)["accuracy"] == pytest.approx(right)  # it needs no probabilities


def test_values_have_ranks() -> None:
    logits, target = logits_of("Binary")
    right = mann_whitney(logits.tolist(), target.bool().tolist())
    found = figures({"auc": by_class.BinaryAUROC}, logits, target, size=7, output="values")
    assert found["auc"] == pytest.approx(right, abs=1e-6)


class Best(by_class.BinaryROC):
    """A custom metric, the threshold with the most correct samples, which uses the scores themselves."""

    def compute(self) -> torch.Tensor:
        false, true, thresholds = super().compute()
        return thresholds[(true - false).argmax()]


class Mean(Metric):
    """A custom metric, the mean of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [])

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        assert preds.dtype in (torch.float32, torch.float64)
        assert target.dtype == torch.int64
        self.values.append(preds)

    def compute(self) -> torch.Tensor:
        return torch.cat(self.values).mean()


def test_metrics_of_one_s_own() -> None:
    logits, target = logits_of("Binary")
    false, true, thresholds = (
        x.tolist() for x in torchmetrics.functional.roc(logits.double().sigmoid(), target, "binary")
    )
    gains = [t - f for t, f in zip(true, false, strict=True)]
    metrics = {"best": Best, "mean": Mean}
    found = figures(metrics, logits, target.byte(), size=7, output="multilabel_logits")
    assert found["best"] == pytest.approx(thresholds[gains.index(max(gains))])
    assert found["mean"] == pytest.approx(logits.sigmoid().mean().item(), rel=1e-6)
    assert figures({"mean": Mean}, logits, target, size=7)["mean"] == pytest.approx(logits.mean().item(), rel=1e-6)
    assert Best not in RANKED


def test_kl_divergence_is_of_shares() -> None:
    logits, _ = logits_of("Multiclass")
    shares = torch.rand(40, CLASSES).softmax(1)
    metric = {"kl": torchmetrics.KLDivergence}
    right = (logits.softmax(1) * (logits.log_softmax(1) - shares.log())).sum(1).mean().item()
    found = figures(metric, logits, shares, size=7, loss=nn.CrossEntropyLoss())
    assert found["kl"] == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("log_prob", [False, True])
@pytest.mark.parametrize("given", ["logits", "log-probabilities", "probabilities"])
def test_divergences_are_given_what_they_take(given: str, log_prob: bool) -> None:
    logits, _ = logits_of("Multiclass")
    shares = torch.rand(40, CLASSES).softmax(1)
    p, q = logits.double().softmax(1), shares.double()
    middle = (p + q) / 2
    right = {
        "kl": (p * (p / q).log()).sum(1).mean().item(),
        "js": ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)).mean().item() / 2,
    }
    kinds = {"kl": torchmetrics.KLDivergence, "js": torchmetrics.regression.JensenShannonDivergence}
    metrics = {name: partial(kind, log_prob=log_prob) for name, kind in kinds.items()}
    match given:
        case "logits":
            prediction, options = logits, {"output": "logits"}
        case "log-probabilities":
            prediction, options = (
                logits.log_softmax(1),
                {"loss": nn.KLDivLoss(reduction="batchmean", log_target=log_prob)},
            )
        case _:
            prediction, options = logits.softmax(1), {"output": "probabilities"}
    for size in (1, 7, 40):
        found = figures(metrics, prediction, shares.log() if log_prob else shares, size=size, **options)
        assert found["kl"] == pytest.approx(right["kl"], rel=1e-5)
        assert found["js"] == pytest.approx(right["js"], rel=1e-5)


def test_divergences_of_what_is_not_known_are_refused() -> None:
    logits, _ = logits_of("Multiclass")
    shares = torch.rand(40, CLASSES).softmax(1)
    metric = {"kl": torchmetrics.KLDivergence}
    with pytest.raises(mtl.UserError, match=r"the kind of the predictions isn't known. Set tasks\.t\.output=logits or"):
        figures(metric, logits, shares, size=7)
    with pytest.raises(mtl.UserError, match="probabilities of classes, and the predictions are multilabel_logits"):
        figures(metric, logits, shares, size=7, loss=nn.BCEWithLogitsLoss())
    with pytest.raises(
        mtl.UserError, match=r"expects log-probabilities in the target 'y', and the loss expects probabilities"
    ):
        figures(
            {"kl": partial(torchmetrics.KLDivergence, log_prob=True)},
            logits,
            shares,
            size=7,
            loss=nn.CrossEntropyLoss(),
        )
    with pytest.raises(mtl.UserError, match=r"Set tasks\.t\.metrics\.kl\.log_prob=true"):
        figures(
            metric,
            logits.log_softmax(1),
            shares.log(),
            size=7,
            loss=nn.KLDivLoss(reduction="batchmean", log_target=True),
        )


@pytest.mark.parametrize("length", [CLASSES, 5])
def test_perplexity_has_its_classes_where_they_are(length: int) -> None:
    """As many tokens as classes fit a wrong order of the dimensions, too."""
    torch.manual_seed(0)
    logits, target = torch.randn(12, CLASSES, length), torch.randint(CLASSES, (12, length))
    target[:, -1] = -100
    right = nn.functional.cross_entropy(logits, target).exp().item()
    metric = {"p": partial(torchmetrics.text.Perplexity, ignore_index=-100)}
    for size in (1, 7, 12):
        found = figures(metric, logits, target, size=size, loss=nn.CrossEntropyLoss())
        assert found["p"] == pytest.approx(right, rel=1e-5)
    with pytest.raises(mtl.UserError, match="Perplexity, takes logits of classes, and the predictions are probabiliti"):
        figures(metric, logits.softmax(1), target, size=7, output="probabilities")


def test_a_class_of_nan_has_no_figure() -> None:
    logits, target = logits_of("Multiclass")
    logits[3] = math.nan
    metrics = {"accuracy": partial(by_class.MulticlassAccuracy, num_classes=CLASSES)}
    metrics |= {"iou": partial(by_class.MulticlassJaccardIndex, num_classes=CLASSES)}
    found = figures(metrics, logits, target, size=7, loss=nn.CrossEntropyLoss())
    assert math.isnan(found["accuracy"])
    assert math.isnan(found["iou"])


@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_prediction_that_is_nan_has_no_figure(size: int) -> None:
    logits, target = logits_of("Binary")
    logits[3] = math.nan
    metrics = {"auc": by_class.BinaryAUROC, "f1": by_class.BinaryF1Score}
    found = figures(metrics, logits, target, size=size, output="multilabel_logits")
    assert math.isnan(found["auc"])
    assert math.isnan(found["f1"])


@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_class_that_weighs_nothing_counts_in_metrics(size: int) -> None:
    logits, target = logits_of("Multiclass")
    accuracy = {"accuracy": partial(by_class.MulticlassAccuracy, num_classes=CLASSES, average="micro")}
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0]))
    found = figures(accuracy, logits, target, size=size, loss=loss)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == target).double().mean().item())
    assert found["loss"] == pytest.approx(loss(logits, target).item(), rel=1e-6)


def test_it_is_refused_before_the_first_batch() -> None:
    task = mtl.Task("t", head=nn.Identity(), loss=nn.MultiMarginLoss(), target="y", metrics={"a": by_class.BinaryAUROC})
    with pytest.raises(mtl.UserError, match="the kind of the predictions isn't known"):
        TaskMetric(task, "a", torch.device("cpu"))
