"""Images with a table: pixels against Pillow and numpy, and messages about files that are missing or damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mtl
from mtl.data import Loader, image_table
from mtl.data.images import IMAGENET_MEAN, IMAGENET_STD, Images, Transform

ROWS = """\
file,kind,age,sharp,part
a.png,cat,3,1,train
more/b.jpg,dog,,0,train
c.png,,5,1,test
d.png,cat,4,,val
"""
OPTIONS: dict[str, Any] = {"targets": ["kind", "age", "sharp"], "classes": ["sharp"], "split_column": "part", "size": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    for index, (name, mode) in enumerate([("a.png", "RGB"), ("more/b.jpg", "RGB"), ("c.png", "L"), ("d.png", "RGBA")]):
        shape = (12 + index, 20, *{"RGB": (3,), "L": (), "RGBA": (4,)}[mode])
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        if mode == "RGBA":
            pixels[..., 3] = 255  # transparent pixels are refused
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text(ROWS)
    return tmp_path


def made(folder: Path, **options: Any) -> mtl.data.Splits:
    return image_table(str(folder), str(folder / "labels.csv"), **{**OPTIONS, **options})


def by_hand(path: Path, height: int, width: int) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)) / 255
    return ((pixels - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)


def test_pictures_and_targets(folder: Path) -> None:
    splits = made(folder, size=[8, 10])
    assert (
        splits.summary()
        == "pictures of labels.csv, split by 'part': 2 train, 1 val, 1 test; fields: image, kind, age, sharp"
    )
    for dataset, index, name in (
        (splits.train, 0, "a.png"),
        (splits.train, 1, "more/b.jpg"),
        (splits.test, 0, "c.png"),
        (splits.val, 0, "d.png"),
    ):
        image = dataset[index]["image"]
        assert image.dtype == torch.float32
        assert type(image) is torch.Tensor
        np.testing.assert_allclose(image, by_hand(folder / name, 8, 10), atol=1e-5)
    assert splits.train.fields["kind"].tolist() == [0, 1]
    assert splits.test.fields["kind"].tolist() == [-100]
    assert splits.train.fields["age"].tolist() == [3, pytest.approx(float("nan"), nan_ok=True)]
    assert splits.train.fields["sharp"].tolist() == [1, 0]
    assert splits.val.fields["sharp"].tolist() == [-100]
    assert splits.facts["targets"]["kind"] == {"kind": "class", "vocabulary": ["cat", "dog"]}


def test_mean_and_std_of_ones_own(folder: Path) -> None:
    image = made(folder, mean=[0, 0, 0], std=[1 / 255] * 3).train[0]["image"]
    with Image.open(folder / "a.png") as original:
        expected = np.asarray(original.resize((8, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_allclose(image, expected, atol=1e-3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_through_a_loader(folder: Path, num_workers: int) -> None:
    splits = made(folder)
    (batch,) = Loader(splits.train, batch_size=2, num_workers=num_workers).batches()
    assert batch["image"].shape == (2, 3, 8, 8)
    for index in range(2):
        assert torch.equal(batch["image"][index], splits.train[index]["image"])


def test_random_splits_depend_on_the_seed_alone(folder: Path) -> None:
    rows = "".join(f"a.png,k{row % 2},{row},1,train\n" for row in range(40))
    (folder / "labels.csv").write_text(ROWS.splitlines()[0] + "\n" + rows)
    ages = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(ages))
        splits = made(folder, split_column=None, split=[0.5, 0.25, 0.25], seed=seed)
        ages.append([dataset.fields["age"].tolist() for _, dataset in splits.items()])
    assert [len(part) for part in ages[0]] == [20, 10, 10]
    assert sorted(sum(ages[0], [])) == list(range(40))
    assert ages[0] == ages[1] != ages[2]


def test_augmented_pictures_are_parts_of_the_picture_and_mirrored(folder: Path) -> None:
    ramp = np.tile(np.arange(0, 240, 12, dtype=np.uint8)[None, :, None], (20, 1, 3))
    Image.fromarray(ramp).save(folder / "a.png")
    dataset = Images([str(folder / "a.png")], {}, Transform(16, [0, 0, 0], [1, 1, 1], augment=True))
    slopes, lowest = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        row = dataset[0]["image"][0, 0]
        slopes.append(bool(row[-1] > row[0]))
        lowest.append(row.min().item())
    assert 3 < sum(slopes) < 17
    assert len(set(lowest)) > 3


def test_messages(folder: Path) -> None:
    def said(**options: Any) -> str:
        with pytest.raises(mtl.UserError) as error:
            made(folder, **options)
        return str(error.value)

    assert said(file="picture").startswith("data.file: there is no column 'picture' in labels.csv (possible: age, file")
    assert said(targets=["knid"], classes=[]).startswith(
        "data.targets: there is no column 'knid' in labels.csv; did you"
    )
    assert said(split_column="kind") == (
        "data.split_column: row 1 of labels.csv has 'cat' in the column 'kind', not one of train, val, test"
    )
    assert said(targets=["image"], classes=[]).startswith("data.targets: the field 'image' is the picture")
    assert said(size=0) == "data.size is 0; it must be a whole number above 0, or two: [height, width]"
    assert said(mean=[0.5]).startswith("data.mean and data.std must be three numbers each")
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes()[:80])
    assert said().startswith(f"data.test: the picture {folder / 'c.png'} is damaged: ")
    (folder / "c.png").unlink()
    assert said() == f"data.labels: row 3 of labels.csv names 'c.png'; there is no file {folder / 'c.png'}"
    with pytest.raises(mtl.UserError, match=r"data\.images: there is no folder .*elsewhere"):
        image_table(str(folder / "elsewhere"), str(folder / "labels.csv"), **OPTIONS)


def test_damaged_picture_is_named_when_it_is_opened(folder: Path) -> None:
    (folder / "more" / "b.jpg").write_bytes(b"not a picture")
    with pytest.raises(
        mtl.UserError, match=r"a batch of Images can't be loaded: sample 1: the picture .*more/b\.jpg is damaged"
    ):
        list(Loader(made(folder).train, batch_size=2).batches())
