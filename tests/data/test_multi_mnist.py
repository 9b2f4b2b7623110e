"""The pairs of digits: how two digits are combined, which digits form a pair, and the problem as a run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from PIL import Image
from test_mnist import write_idx

import mtl
from mtl.data import multi_mnist
from mtl.data.mnist import BUNDLED
from mtl.data.multi_mnist import CHUNK, overlay, pairs


def by_hand(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns one pair (28, 28) in [0, 1], computed pixel by pixel and resized by Pillow."""
    canvas = np.zeros((36, 36), np.float32)
    for row in range(28):
        for column in range(28):
            canvas[row, column] = max(canvas[row, column], left[row, column])
            canvas[row + 6, column + 6] = max(canvas[row + 6, column + 6], right[row, column])
    return np.asarray(Image.fromarray(canvas).resize((28, 28), Image.Resampling.BILINEAR)) / 255


def bundled(part: int) -> tuple[np.ndarray, np.ndarray]:
    with np.load(BUNDLED) as arrays:
        chosen = arrays["split"] == part
        return arrays["image"][chosen], arrays["digit"][chosen]


def test_overlay_is_what_is_made_by_hand() -> None:
    images, _ = bundled(2)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 3, 28, 28), dtype=np.uint8)
    left, right = np.concatenate([images[:5], noise[0]]), np.concatenate([images[100:105], noise[1]])
    made = overlay(torch.from_numpy(left), torch.from_numpy(right))
    expected = np.stack([by_hand(*pair) for pair in zip(left, right, strict=True)])
    assert made.shape == (8, 1, 28, 28)
    np.testing.assert_allclose(made[:, 0].numpy(), expected, atol=1e-5)


def test_samples_of_each_split_are_made_of_two_images_of_that_split() -> None:
    scales = []
    for part, (_, dataset) in enumerate(multi_mnist().items()):
        images, digits = bundled(part)
        assert dataset.fields["left"].tolist() == digits.tolist()
        assert sorted(dataset.fields["right"].tolist()) == sorted(digits.tolist())
        for index in (0, len(images) // 2):
            sample = dataset[index]
            pixels = sample["image"][0].double().numpy().ravel()
            fits = []
            for partner in images[digits == sample["right"].item()]:
                raw = by_hand(images[index], partner).ravel()
                scale = np.polyfit(raw, pixels, 1)
                fits.append((np.abs(np.polyval(scale, raw) - pixels).max(), *scale))
            errors = sorted(fit[0] for fit in fits)
            assert errors[0] < 1e-5 < 0.1 < errors[1]  # one of the images fits, and no other
            scales.append(min(fits)[1:])
    np.testing.assert_allclose(scales, [scales[0]] * 6, rtol=1e-5)  # one mean and one deviation for all splits


def test_training_split_is_standardised() -> None:
    splits = multi_mnist()
    assert [len(dataset) for _, dataset in splits.items()] == [4000, 500, 500]
    for name, dataset in splits.items():
        image, left, right = dataset.fields.values()
        assert list(dataset.fields) == ["image", "left", "right"]
        assert image.shape == (len(dataset), 1, 28, 28)
        assert image.dtype == torch.float32
        assert left.dtype == right.dtype == torch.int64
        assert left.shape == right.shape == (len(dataset),)
        tolerance = 1e-6 if name == "train" else 0.05
        assert image.double().mean().item() == pytest.approx(0, abs=tolerance)
        assert image.double().std().item() == pytest.approx(1, abs=tolerance)


def test_pairs_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = multi_mnist()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = multi_mnist(seed=0), multi_mnist(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for split in range(3):
        one, same, another = (splits.items()[split][1].fields for splits in (first, again, other))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert torch.equal(one["left"], another["left"])
        assert (one["right"] != another["right"]).double().mean() > 0.8
        assert 0.05 < (one["left"] == one["right"]).double().mean() < 0.2  # about one in ten, as for independent digits
    assert first.summary().startswith("Multi-MNIST, pairs (data.seed=0) of MNIST, the 5,000 images bundled with mtl")


def test_chunks_leave_no_trace() -> None:
    count = 2 * CHUNK + 1
    image = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = pairs(image, torch.arange(count), torch.Generator().manual_seed(0)).fields
    assert torch.equal(made["left"], torch.arange(count))
    assert torch.equal(made["right"].sort().values, torch.arange(count))
    assert torch.equal(made["image"], overlay(image, image[made["right"]]))


def test_torchvision_source_pairs_within_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    grey = np.arange(5, 255, 5, dtype=np.uint8)  # image i is of the one value 5 (i + 1) all over
    for part, values in (("train", grey[:40]), ("t10k", grey[40:])):
        write_idx(folder / f"{part}-images-idx3-ubyte", np.tile(values[:, None, None], (1, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte", values // 5 % 10)
    splits = multi_mnist(source="torchvision", root=str(tmp_path))
    assert splits.summary().startswith("Multi-MNIST, pairs (data.seed=0) of MNIST, the whole data set, from ")
    assert str(tmp_path) in splits.summary()
    image = splits.train.fields["image"]
    unit = (image[0, 0, 0, 0] - image[0, 0, 0, 27]) / grey[0]
    for dataset, values in ((splits.train, grey[:20]), (splits.val, grey[20:40]), (splits.test, grey[40:])):
        image = dataset.fields["image"][:, 0]
        # The upper left is of the left image alone, the lower right of the right one, the upper right of neither.
        left, right = ((image[:, at, at] - image[:, 0, 27]) / unit for at in (0, 24))
        torch.testing.assert_close(left, torch.from_numpy(values).float(), rtol=0, atol=1e-2)
        torch.testing.assert_close(right.sort().values, torch.from_numpy(values).float(), rtol=0, atol=1e-2)
        assert not torch.equal(left.round(), right.round())
        assert torch.equal(dataset.fields["left"], (left.round() / 5).long() % 10)
        assert torch.equal(dataset.fields["right"], (right.round() / 5).long() % 10)


def test_unknown_source() -> None:
    with pytest.raises(mtl.UserError, match=r"^data\.source: 'web' is not one of bundled, torchvision$"):
        multi_mnist(source="web")


def test_task_trains_from_the_command_line(here: Path) -> None:
    ended = command("train", "task=multi_mnist", "trainer.max_epochs=1", "data.batch_size=250", "seed=3")
    assert ended.code == 0, ended.err
    assert "Multi-MNIST, pairs (data.seed=0) of MNIST, the 5,000 images" in ended.out  # not the run's seed
    assert ended.metrics["status"] == "finished"
    for split in ("val", "test"):
        assert set(ended.metrics[split]) == {"left", "right"}
        for figures in ended.metrics[split].values():
            assert 0 <= figures["accuracy"] <= 1
            assert 0 < figures["loss"] < 2.5
    wrong = command("train", "task=multi_mnist", "data.source=web")
    assert wrong.code == 1
    assert "'web' is not one of bundled, torchvision" in wrong.err
