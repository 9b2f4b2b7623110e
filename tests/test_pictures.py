"""What the pictures show, read back out of their pixels."""

import numpy as np
import pytest
import torch

from mtl import pictures
from mtl.gallery import class_names, mean_cosines, show

GREEN, RED = 1, 0  # channels


def count(picture: np.ndarray, channel: int) -> int:
    """Pixels in which this channel is well above the two others."""
    others = np.delete(picture.astype(int), channel, axis=-1).max(-1)
    return int((picture[..., channel] - others > 25).sum())


def cells(picture: np.ndarray, number: int) -> np.ndarray:
    """The colour of each cell of a matrix with a frame, near its corner, where no number stands."""
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


def test_means_leave_out_what_was_not_measured() -> None:
    measured = [
        {"cosine/a~b": 0.5, "loss/a/train": 1.0},
        {"cosine/a~b": float("nan")},
        {"cosine/a~b": -1.0, "cosine/a~c": 0.25},
    ]
    assert mean_cosines(measured) == {("a", "b"): -0.25, ("a", "c"): 0.25}
    assert mean_cosines([]) == {}


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
    images = torch.zeros(2, 1, 8, 8)
    assert count(show(torch.tensor([2.0, -2.0]), torch.tensor([1, 0]), images), RED) == 0
    assert count(show(torch.tensor([2.0, -2.0]), torch.tensor([0, 1]), images), GREEN) == 0


def test_a_confusion_matrix_counts_in_its_colours() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, -100])
    logits = torch.eye(2)[[0, 0, 0, 0, 1, 1]]
    found = cells(show(logits, truth, None), 2)
    darkness = 255 - found.mean(-1)
    assert darkness[0, 0] > darkness[1, 0] > darkness[0, 1]  # 3, 1 and 0 times; rows are the truth
    assert darkness[1, 0] == pytest.approx(darkness[1, 1])


def tiles(picture: np.ndarray, rows: int, columns: int, size: int) -> list[list[np.ndarray]]:
    """The tiles of a picture made of square ones, below a line of titles."""
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
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2), None),
        (torch.zeros(2, 5, 8, 8), torch.zeros(2, 4, 4, dtype=torch.long)),
    ],
)
def test_what_has_no_picture_has_none(prediction: object, target: object) -> None:
    assert show(prediction, target, torch.zeros(2, 1, 8, 8)) is None


def test_large_images_are_thinned() -> None:
    picture = show(torch.zeros(1, 600, 900), torch.zeros(1, 600, 900), torch.zeros(1, 3, 600, 900))
    assert max(picture.shape) < 3 * 260 + 20


def test_names_of_classes() -> None:
    facts = {"targets": {"fruit": {"kind": "class", "vocabulary": ["apple", "pear"]}}}
    assert class_names(facts, "fruit") == ["apple", "pear"]
    assert class_names({"small": facts, "large": {}}, "fruit") == ["apple", "pear"]
    assert class_names({}, "fruit") is None
    assert class_names(facts, "weight") is None
