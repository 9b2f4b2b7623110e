"""The content of pictures, read back from their pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn

import mtl
from mtl import cli
from mtl.loggers import pictures
from mtl.losses import BinaryCrossEntropy
from mtl.training import predictions
from mtl.training.gallery import class_names

GREEN, RED = 1, 0  # channels
IMAGES = torch.zeros(4, 1, 8, 8)
NAN = float("nan")


def show(
    prediction: Any,
    target: Any,
    image: torch.Tensor | None,
    names: list[str] | None = None,
    *,
    loss: nn.Module | None = None,
    mask: torch.Tensor | None = None,
) -> Any:
    """Returns the picture of a task with this loss; by default, with the usual loss for classes or numbers."""
    if loss is None:
        whole = isinstance(target, torch.Tensor) and not target.is_floating_point()
        loss = nn.CrossEntropyLoss() if whole else nn.MSELoss()
    task = mtl.Task("t", head=nn.Identity(), loss=loss, target="y", mask=None if mask is None else "m")
    return predictions.show(task, prediction, {"y": target} | ({} if mask is None else {"m": mask}), image, names)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Provides, by kind of picture, the arguments of the last one; nothing is drawn."""
    found: dict[str, tuple[Any, ...]] = {}
    for kind in ("labelled", "confusion", "yes_and_no", "scatter", "side_by_side"):
        monkeypatch.setattr(pictures, kind, lambda *given, kind=kind: found.update({kind: given}))
    return found


def words(drawn: dict[str, tuple[Any, ...]]) -> tuple[list[str], list[bool | None]]:
    _, said, right = drawn["labelled"]
    return said, right


def count(picture: np.ndarray, channel: int) -> int:
    """Returns the number of pixels in which this channel is well above the two others."""
    others = np.delete(picture.astype(int), channel, axis=-1).max(-1)
    return int((picture[..., channel] - others > 25).sum())


def cells(picture: np.ndarray, number: int) -> np.ndarray:
    """Returns the colour of each cell of a matrix with a frame, near the cell's corner, where there is no number."""
    dark = (picture.astype(int).sum(-1) < 60).astype(float)
    rows, columns = np.flatnonzero(dark.mean(1) > 0.4), np.flatnonzero(dark.mean(0) > 0.4)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    at = [
        [
            picture[int(top + (bottom - top) * (i + 0.15) / number), int(left + (right - left) * (j + 0.15) / number)]
            for j in range(number)
        ]
        for i in range(number)
    ]
    return np.array(at).astype(int)


def test_a_matrix_is_blue_where_tasks_agree_and_red_where_they_fight() -> None:
    picture = pictures.cosine_matrix(["a", "b", "c"], {("a", "b"): -0.8, ("a", "c"): 0.5})
    assert picture.dtype == np.uint8
    found = cells(picture, 3)
    assert (found == found.transpose(1, 0, 2)).all()
    assert found[0, 1][0] > found[0, 1][2] + 50  # red
    assert found[0, 2][2] > found[0, 2][0] + 50  # blue
    assert (found[1, 2] > 250).all()  # nothing is known
    assert found[0, 0][2] > found[0, 0][0]


def test_numbers_are_written_into_the_matrix() -> None:
    one = pictures.cosine_matrix(["a", "b"], {("a", "b"): 0.1234})
    same = pictures.cosine_matrix(["a", "b"], {("a", "b"): 0.1236})  # both +0.12, of nearly one colour
    other = pictures.cosine_matrix(["a", "b"], {("a", "b"): -0.1234})
    assert np.abs(one.astype(int) - same).max() < 4
    assert np.abs(one.astype(int) - other).max() > 100


def test_classes_are_green_where_right_and_red_where_wrong() -> None:
    images = torch.zeros(4, 1, 8, 8)
    logits = torch.eye(3)[[0, 1, 2, 0]]
    right = show(logits, torch.tensor([0, 1, 2, 0]), images)
    wrong = show(logits, torch.tensor([1, 2, 0, 1]), images)
    unknown = show(logits, torch.full((4,), -100), images)
    assert count(right, GREEN) > 10
    assert count(right, RED) == 0
    assert count(wrong, RED) > 10
    assert count(wrong, GREEN) == 0
    assert count(unknown, RED) == count(unknown, GREEN) == 0


def test_yes_and_no() -> None:
    images, loss = torch.zeros(2, 1, 8, 8), BinaryCrossEntropy()
    assert count(show(torch.tensor([2.0, -2.0]), torch.tensor([1, 0]), images, loss=loss), RED) == 0
    assert count(show(torch.tensor([2.0, -2.0]), torch.tensor([0, 1]), images, loss=loss), GREEN) == 0


def test_a_confusion_matrix_counts_in_its_colours() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, -100])
    logits = torch.eye(2)[[0, 0, 0, 0, 1, 1]]
    found = cells(show(logits, truth, None), 2)
    darkness = 255 - found.mean(-1)
    assert darkness[0, 0] > darkness[1, 0] > darkness[0, 1]  # 3, 1 and 0 times; rows are the truth
    assert darkness[1, 0] == pytest.approx(darkness[1, 1])


def tiles(picture: np.ndarray, rows: int, columns: int, size: int) -> list[list[np.ndarray]]:
    """Returns the square tiles of a picture below a line of titles."""
    pitch = size + pictures.GAP
    return [
        [picture[18 + r * pitch : 18 + r * pitch + size, c * pitch : c * pitch + size] for c in range(columns)]
        for r in range(rows)
    ]


def test_maps_of_classes_stand_beside_the_truth() -> None:
    truth = torch.randint(0, 4, (2, 48, 48), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.one_hot(truth, 4).movedim(-1, 1).float()
    truth[0, :24] = -100
    picture = show(logits, truth, torch.rand(2, 3, 48, 48))
    shown = tiles(picture, 2, 3, 96)
    assert np.abs(shown[1][1].astype(int) - shown[1][2]).max() < 10  # predicted is the truth
    assert (np.abs(shown[0][2][:46].astype(int) - 128) < 4).all()  # grey where there is none
    assert np.abs(shown[0][1][:46].astype(int) - 128).max() > 50


def test_maps_of_numbers_have_one_scale() -> None:
    truth = torch.linspace(0, 1, 48 * 48).view(1, 48, 48)
    half = tiles(show(truth / 2, truth, torch.rand(1, 1, 48, 48)), 1, 3, 96)[0]
    assert np.abs(half[1][-2].astype(int) - half[2][47]).max() < 12  # half of the most is the middle's colour
    assert np.abs(half[1][-1].astype(int) - half[2][-1]).max() > 60


def test_images_that_were_redrawn() -> None:
    truth = torch.rand(1, 1, 48, 48)
    shown = tiles(show(truth.clone(), truth, truth), 1, 3, 96)[0]
    assert np.abs(shown[0].astype(int) - shown[1]).max() < 4
    assert np.abs(shown[1].astype(int) - shown[2]).max() < 4


def test_numbers_without_an_image_are_points() -> None:
    truth = torch.linspace(-1, 1, 50)
    picture = show(truth, truth, None)
    blue = np.argwhere((picture[..., 2].astype(int) - picture[..., 0]) > 80)
    correlation = np.corrcoef(blue[:, 0], blue[:, 1])[0, 1]
    assert correlation < -0.99  # all on the diagonal


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ({"a": torch.zeros(2)}, torch.zeros(2)),
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2, 1, 1, 1, 3), torch.zeros(2, 1, 1, 1, 3)),
        (torch.zeros(2), None),
        (torch.zeros(2, 5, 8, 8), torch.zeros(2, 4, 4, dtype=torch.long)),
    ],
)
def test_what_has_no_picture_has_none(prediction: object, target: object) -> None:
    assert show(prediction, target, torch.zeros(2, 1, 8, 8)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bool])
def test_yes_or_no_is_what_the_loss_says_whatever_the_type(drawn: Any, dtype: torch.dtype) -> None:
    target = torch.tensor([1, 0, 1, 0]).to(dtype)
    show(torch.tensor([0.2, -3.0, -0.2, 3.0]), target, IMAGES, loss=BinaryCrossEntropy())
    assert words(drawn) == (["yes", "no", "no (is yes)", "yes (is no)"], [True, True, False, False])


def test_numbers_that_happen_to_be_0_and_1_are_numbers(drawn: Any) -> None:
    show(
        torch.tensor([0.25, 0.75, 1.5, -1.0]),
        torch.tensor([0, 1, 1, 0]),
        IMAGES,
        loss=nn.PoissonNLLLoss(log_input=False),
    )
    assert words(drawn)[0] == ["0.25 (is 0)", "0.75 (is 1)", "1.5 (is 1)", "-1 (is 0)"]


def test_probabilities_are_yes_from_a_half_on(drawn: Any) -> None:
    show(torch.tensor([0.6, 0.4]), torch.tensor([1.0, 1.0]), IMAGES[:2], loss=nn.BCELoss())
    assert words(drawn)[0] == ["yes", "no (is yes)"]


def test_classes_by_their_names(drawn: Any) -> None:
    show(torch.eye(3)[[0, 1, 2]], torch.tensor([0, 2, -100]), IMAGES[:3], ["apple", "pear", "plum"])
    assert words(drawn) == (["apple", "pear (is plum)", "plum (unknown)"], [True, False, None])
    show(torch.eye(2), torch.tensor([0, 1]), None, ["apple", "pear"])
    assert drawn["confusion"][2] == ["apple", "pear"]


def test_a_truth_of_shares_is_the_largest_one_s_class(drawn: Any) -> None:
    shares = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.5, NAN]])
    show(torch.eye(2)[[1, 1, 0]], shares, IMAGES[:3], loss=nn.CrossEntropyLoss())
    assert words(drawn) == (["1", "1 (is 0)", "0 (unknown)"], [True, False, None])


def test_0_and_1_of_a_loss_of_one_s_own_are_no_and_yes(drawn: Any) -> None:
    show(torch.tensor([2.0, -2.0]), torch.tensor([1, 1]), IMAGES[:2], ["dead", "alive"], loss=nn.Identity())
    assert words(drawn) == (["alive", "dead (is alive)"], [True, False])
    show(torch.tensor([2.0, -2.0]), torch.tensor([7, 1]), IMAGES[:2], loss=nn.Identity())
    assert words(drawn)[0] == ["2 (is 7)", "-2 (is 1)"]


def test_names_that_are_not_these_labels_names_are_not_shown(drawn: Any) -> None:
    loss = BinaryCrossEntropy()
    show(torch.ones(1, 2), torch.ones(1, 2), IMAGES[:1], ["hat", "beard", "smile"], loss=loss)
    assert words(drawn)[0] == ["0\n1"]
    show(torch.ones(1), torch.ones(1), IMAGES[:1], ["hat", "beard", "smile"], loss=loss)
    assert words(drawn)[0] == ["yes"]


def test_whole_numbers_of_maps_are_missing_where_the_mask_says_so(drawn: Any) -> None:
    target, mask = torch.arange(4).view(1, 2, 2), torch.tensor([[[True, True], [False, True]]])
    show(target.float(), target, None, loss=nn.Identity(), mask=mask)
    ((predicted, truth),), _ = drawn["side_by_side"]
    same = (predicted == truth).all(-1)
    assert same.tolist() == [[True, True], [False, True]]
    assert (truth[1, 0] == pictures.GREY).all()


MISSING = {
    "ignore_index": ({"loss": nn.CrossEntropyLoss(ignore_index=255)}, torch.tensor([0, 255, 1, 255])),
    "another number": ({"loss": nn.NLLLoss(ignore_index=-1)}, torch.tensor([0, -1, 1, -1])),
    "uint8": ({"loss": nn.CrossEntropyLoss(ignore_index=255)}, torch.tensor([0, 255, 1, 255], dtype=torch.uint8)),
    "mask": ({"mask": torch.tensor([1, 0, 1, 0])}, torch.tensor([0, 1, 1, 0])),
    "a loss of one's own": ({"loss": nn.Identity(), "mask": torch.tensor([1, 0, 1, 0])}, torch.tensor([0, 2, 1, 0])),
}


@pytest.mark.parametrize("kind", MISSING)
def test_classes_that_are_missing_are_no_truth(drawn: Any, kind: str) -> None:
    options, target = MISSING[kind]
    show(torch.eye(3)[[0, 1, 0, 2]], target, IMAGES, **options)
    assert words(drawn) == (["0", "1 (unknown)", "0 (is 1)", "2 (unknown)"], [True, None, False, None])
    show(torch.eye(3)[[0, 1, 0, 2]], target, None, **options)
    predicted, truth, _ = drawn["confusion"]
    assert (predicted.tolist(), truth.tolist()) == ([0, 0], [0, 1])


@pytest.mark.parametrize(
    ("target", "mask"),
    [
        ([1.0, NAN, 0.0, NAN], None),
        ([1, -100, 0, -100], None),
        ([1.0, 0.0, 0.0, 1.0], [True, False, True, False]),
        ([1, 0, 0, 1], [True, False, True, False]),
    ],
)
def test_yes_or_no_that_is_missing_is_no_truth(drawn: Any, target: list[float], mask: list[bool] | None) -> None:
    given = {"loss": BinaryCrossEntropy(), "mask": None if mask is None else torch.tensor(mask)}
    show(torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.tensor(target), IMAGES, **given)
    assert words(drawn) == (["yes", "yes (unknown)", "yes (is no)", "no (unknown)"], [True, None, False, None])
    show(torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.tensor(target), None, **given)
    assert drawn["confusion"][1].tolist() == [1, 0]


def test_numbers_that_are_missing_are_no_truth(drawn: Any) -> None:
    mask = torch.tensor([True, False, True])
    show(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.5, NAN]), IMAGES[:3], mask=mask)
    assert words(drawn) == (["1 (is 1.5)", "2 (unknown)", "3 (unknown)"], [None] * 3)
    show(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.5, NAN]), None, mask=mask)
    assert np.isfinite(drawn["scatter"][1]).tolist() == [True, False, False]


def test_points_are_those_of_which_both_numbers_are_there() -> None:
    predicted, truth = np.array([0.0, 1.0, 5.0, np.inf]), np.array([0.0, 1.0, np.nan, 1.0])
    assert (pictures.scatter(predicted, truth) == pictures.scatter(predicted[:2], truth[:2])).all()
    assert pictures.scatter(predicted[2:], truth[2:]).shape == pictures.scatter(predicted, truth).shape


def test_a_whole_number_of_a_regression_is_what_it_is(drawn: Any) -> None:
    show(torch.tensor([-99.0]), torch.tensor([-100]), IMAGES[:1], loss=nn.MSELoss())
    assert words(drawn)[0] == ["-99 (is -100)"]


def grey(tile: np.ndarray) -> bool:
    return bool((np.abs(tile.astype(int) - 128) < 4).all())


@pytest.mark.parametrize("whole", [True, False])
def test_pixels_that_are_missing_are_grey(whole: bool) -> None:
    """Of classes and of numbers: those that the mask leaves out, of the first sample in part and of the second all."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(1, 4, (2, 48, 48), generator=generator)
    prediction = torch.nn.functional.one_hot(target, 4).movedim(-1, 1).float() if whole else target.float()
    mask = torch.ones(2, 48, 48, dtype=torch.bool)
    mask[0, :24] = mask[1] = False
    picture = show(prediction, target if whole else target.float(), torch.rand(2, 3, 48, 48), mask=mask)
    shown = tiles(picture, 2, 3, 96)
    assert grey(shown[0][2][:46])
    assert np.abs(shown[0][1][50:].astype(int) - shown[0][2][50:]).max() < 10
    assert grey(shown[1][2])
    assert not grey(shown[1][1])


def test_a_map_s_ignored_class_is_grey() -> None:
    target = torch.full((1, 48, 48), 255)
    target[:, 24:] = 1
    logits = torch.nn.functional.one_hot(torch.ones(1, 48, 48, dtype=torch.long), 4).movedim(-1, 1).float()
    picture = show(logits, target, torch.zeros(1, 1, 48, 48), loss=nn.CrossEntropyLoss(ignore_index=255))
    shown = tiles(picture, 1, 3, 96)
    assert grey(shown[0][2][:46])
    assert np.abs(shown[0][1][50:].astype(int) - shown[0][2][50:]).max() < 10


def test_an_image_s_missing_pixels_are_grey() -> None:
    truth = torch.rand(1, 3, 48, 48)
    truth[:, :, :24] = NAN
    shown = tiles(show(truth.nan_to_num(), truth, truth.nan_to_num()), 1, 3, 96)[0]
    assert grey(shown[2][:46])
    assert not grey(shown[2][50:])


def test_several_labels_above_an_image_mistakes_first(drawn: Any) -> None:
    target = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [-100, -100, -100]])
    yes = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]])
    show(yes * 2.0 - 1, target, IMAGES, ["hat", "beard", "smile"], loss=BinaryCrossEntropy())
    assert words(drawn) == (
        ["hat", "smile (is not)\nnot beard (is)\nhat", "none", "beard (unknown)"],
        [True, False, True, None],
    )
    show(torch.ones(1, 6), torch.ones(1, 6), IMAGES[:1], loss=BinaryCrossEntropy())
    assert words(drawn)[0] == ["0\n1\n2\n3 more"]


def test_several_labels_without_an_image_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One label is always right; of the other what is missing isn't counted."""
    found = []
    monkeypatch.setattr(pictures, "_matrix", lambda axes, *rest: found.append(rest))
    target = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, NAN]])
    guess = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, -1.0], [1.0, -1.0]])
    show(guess, target, None, ["hat", "beard"], loss=BinaryCrossEntropy())
    ((matrix, rows, columns, *_),) = found
    assert (rows, columns) == (["hat", "beard"], ["yes, is yes", "yes, is no", "no, is yes", "no, is no"])
    assert matrix.tolist() == [[4, 0, 0, 0], [0, 1, 2, 0]]


def test_each_line_of_words_has_its_place() -> None:
    """All rows of 18 pixels above the image have letters in them; a wide image has room for more of these."""
    image = np.full((256, 256, 3), 0.5)
    one, three = (pictures.labelled([image], ["\n".join(["word"] * lines)], [False]) for lines in (1, 3))
    assert three.shape[0] - one.shape[0] == 2 * pictures.LINE
    assert all(count(three[start : start + pictures.LINE], RED) > 5 for start in (0, 18, 36))
    long, longer = (pictures.labelled([image], [f"{'word ' * 5}{end}"], [False]) for end in "xy")
    assert (long != longer).any()


def test_several_numbers(drawn: Any) -> None:
    prediction, target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.5, NAN], [3.5, 4.5]])
    show(prediction, target, IMAGES[:2])
    assert words(drawn)[0] == ["1 (is 1.5)\n2 (unknown)", "3 (is 3.5)\n4 (is 4.5)"]
    show(prediction, target, None)
    assert drawn["scatter"][0].shape == (2, 2)
    show(prediction[:, :1], target[:, :1], None)
    assert drawn["scatter"][0].shape == (2,)


def test_several_numbers_have_a_panel_each() -> None:
    truth = torch.linspace(0, 1, 50)[:, None].expand(50, 6)
    one, six = (show(truth[:, :count], truth[:, :count], None) for count in (1, 6))
    assert six.shape[1] == pytest.approx(pictures.MOST_PANELS * one.shape[1])
    dark = (six.astype(int).sum(-1) < 60).mean(0)  # frames are dark lines
    assert ((dark > 0.5)[1:] & ~(dark > 0.5)[:-1]).sum() == 2 * pictures.MOST_PANELS


def test_maps_of_two_numbers_stand_in_pairs(drawn: Any) -> None:
    target = torch.rand(2, 2, 8, 8)
    show(target, target, torch.rand(2, 3, 8, 8))
    rows, titles = drawn["side_by_side"]
    assert titles == ["input", "predicted", "truth", "predicted", "truth"]
    assert [len(row) for row in rows] == [5, 5]
    assert np.array_equal(rows[0][1], rows[0][2])
    assert not np.array_equal(rows[0][1], rows[0][3])


def test_maps_of_yes_and_no_are_probabilities(drawn: Any) -> None:
    target = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    show(torch.zeros(1, 2, 2), target, None, loss=BinaryCrossEntropy())
    half = pictures.numbers_as_colours(np.full((2, 2), 0.5), target[0].numpy())
    (shown,), _ = drawn["side_by_side"]
    assert np.array_equal(shown, half)


SHIPPED = {
    "binary": (torch.randn(4), [torch.tensor([0, 1, 1, -100]), torch.tensor([0.0, 1.0, 1.0, NAN])]),
    "classification": (torch.randn(4, 3), [torch.tensor([0, 1, 2, -100])]),
    "dense_regression": (torch.randn(4, 8, 8), [torch.randn(4, 8, 8)]),
    "dense_regression of two": (torch.randn(4, 2, 8, 8), [torch.randn(4, 2, 8, 8)]),
    "depth": (torch.randn(4, 8, 8), [torch.rand(4, 8, 8).masked_fill(torch.rand(4, 8, 8) < 0.2, NAN)]),
    "edges": (torch.randn(4, 8, 8), [(torch.rand(4, 8, 8) < 0.5).float()]),
    "normals": (torch.randn(4, 3, 8, 8), [torch.randn(4, 3, 8, 8)]),
    "multilabel": (torch.randn(4, 3), [torch.ones(4, 3), torch.ones(4, 3, dtype=torch.long)]),
    "multilabel of one": (torch.randn(4, 1), [torch.ones(4, 1)]),
    "reconstruction": (torch.randn(4, 3, 8, 8), [torch.randn(4, 3, 8, 8)]),
    "regression": (torch.randn(4), [torch.randn(4)]),
    "regression of two": (torch.randn(4, 2), [torch.randn(4, 2)]),
    "segmentation": (torch.randn(4, 3, 8, 8), [torch.randint(0, 3, (4, 8, 8))]),
}


def test_every_shipped_objective_has_its_picture() -> None:
    objectives = {path.stem: OmegaConf.load(path) for path in (Path(cli.CONFIG_DIR) / "objective").glob("*.yaml")}
    assert {name.split()[0] for name in SHIPPED} == set(objectives)
    for name, (prediction, targets) in SHIPPED.items():
        loss = get_class(objectives[name.split()[0]].loss._target_)()
        for target in targets:
            for image in (None, torch.rand(4, 1, 8, 8)):
                assert show(prediction, target, image, loss=loss) is not None, (name, target.dtype, image is None)


def test_a_confusion_matrix_counts_all_classes_past_the_twelfth_together() -> None:
    truth = torch.tensor([0, 20, 25, 29])
    picture = show(torch.eye(30)[[0, 20, 0, 13]], truth, None)
    darkness = 255 - cells(picture, 13).mean(-1)
    assert darkness[12, 12] > darkness[12, 0] == pytest.approx(darkness[0, 0])
    assert darkness[0, 0] > darkness[0, 12] == pytest.approx(darkness[5, 5])


def test_the_truth_goes_to_the_right_of_a_scatter() -> None:
    truth = torch.linspace(-1, 1, 50)
    picture = show(0 * truth, truth, None)
    blue = np.argwhere((picture[..., 2].astype(int) - picture[..., 0]) > 80)
    assert np.ptp(blue[:, 1]) > 100
    assert np.ptp(blue[:, 0]) < 30


def test_large_images_are_thinned() -> None:
    picture = show(torch.zeros(1, 600, 900), torch.zeros(1, 600, 900), torch.zeros(1, 3, 600, 900))
    assert max(picture.shape) < 3 * 260 + 20


def test_names_of_classes() -> None:
    facts = {"targets": {"fruit": {"kind": "class", "vocabulary": ["apple", "pear"]}}}
    assert class_names(facts, "fruit") == ["apple", "pear"]
    assert class_names({"small": facts, "large": {}}, "fruit") == ["apple", "pear"]
    assert class_names({}, "fruit") is None
    assert class_names(facts, "weight") is None
