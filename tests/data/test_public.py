"""Public data sets, on small files in the format in which they are published."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mtl
from mtl.data import Loader, celeba, cifar100, office_domain, pets
from mtl.data.cifar100 import MEAN, STD, Shifted
from mtl.data.images import IMAGENET_MEAN, IMAGENET_STD


def picture(path: Path, height: int, width: int, seed: int) -> np.ndarray:
    """Writes an image as PNG, even if the name ends in .jpg, so that the pixels don't change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return pixels


def seen(pixels: np.ndarray, size: int) -> np.ndarray:
    """Returns the input that a model should get from an image."""
    resized = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)) / 255
    return ((resized - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)


# CIFAR-100: three pickles of dicts; a row of data has 1,024 red values, 1,024 green ones, 1,024 blue ones.

GROUPS = [4, 1, 14, 8, 0]  # the coarse class of fine class i


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> dict[str, dict[str, Any]]:
    from torchvision.datasets import CIFAR100

    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    written: dict[str, dict[str, Any]] = {}
    for name, count in (("train", 20), ("test", 5)):
        fine = [(3 * index) % 5 for index in range(count)]
        written[name] = {
            "filenames": [f"{name}_{index}.png" for index in range(count)],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": fine,
            "coarse_labels": [GROUPS[label] for label in fine],
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            **changed,
        }
    written["meta"] = {
        "fine_label_names": [f"f{index}" for index in range(100)],
        "coarse_label_names": [f"c{index}" for index in range(20)],
    }
    for name, content in written.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in written}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    return written


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar(tmp_path, monkeypatch)
    splits = cifar100(root=str(tmp_path), validation=0.25)
    assert {name: len(dataset) for name, dataset in splits.items()} == {"train": 15, "val": 5, "test": 5}
    assert splits.fields() == ["image", "fine", "coarse"]
    test = splits.test.fields
    assert test["fine"].tolist() == written["test"]["fine_labels"]
    assert test["coarse"].tolist() == written["test"]["coarse_labels"]
    red, green, blue = written["test"]["data"][3].reshape(3, 32, 32) / 255
    expected = np.stack([(c - m) / s for c, m, s in zip((red, green, blue), MEAN, STD, strict=True)])
    np.testing.assert_allclose(test["image"][3], expected, atol=1e-5)
    both = torch.cat([splits.train.fields["image"], splits.val.fields["image"]])
    assert len(both.flatten(1).unique(dim=0)) == 20  # nothing is in both
    for dataset in (splits.train, splits.val):
        assert dataset.fields["coarse"].tolist() == [GROUPS[fine] for fine in dataset.fields["fine"]]
    names = splits.facts["targets"]
    assert (len(names["fine"]["vocabulary"]), names["coarse"]["vocabulary"][4]) == (100, "c4")

    torch.manual_seed(5)
    again, other = (cifar100(root=str(tmp_path), validation=0.25, seed=seed) for seed in (0, 1))
    assert torch.equal(again.val.fields["image"], splits.val.fields["image"])
    assert not torch.equal(other.val.fields["image"], splits.val.fields["image"])
    with pytest.raises(mtl.UserError, match=r"data\.validation is 1\.5; it must be a share"):
        cifar100(root=str(tmp_path), validation=1.5)


def test_cifar100_augmented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    plain, augmented = (cifar100(root=str(tmp_path), augment=augment) for augment in (False, True))
    assert isinstance(augmented.train, Shifted)
    assert torch.equal(augmented.val.fields["image"], plain.val.fields["image"])
    image = plain.train[2]["image"]
    ways = [(down, right, mirrored) for down in range(-4, 5) for right in range(-4, 5) for mirrored in (False, True)]
    possible = torch.stack([moved(image, *way) for way in ways])
    drawn = set()
    for seed in range(60):
        torch.manual_seed(seed)
        sample = augmented.train[2]
        assert sample["fine"] == plain.train[2]["fine"]
        places = [ways[index] for index in (possible == sample["image"]).flatten(1).all(1).nonzero().flatten()]
        assert len(places) == 1
        drawn.add(places[0])
    assert {down for down, _, _ in drawn} == {right for _, right, _ in drawn} == set(range(-4, 5))
    assert 15 < sum(mirrored for _, _, mirrored in drawn) < 45


def moved(image: torch.Tensor, down: int, right: int, mirrored: bool) -> torch.Tensor:
    result = torch.zeros_like(image)
    for row in range(32):
        for column in range(32):
            if 0 <= row - down < 32 and 0 <= column - right < 32:
                result[:, row, column] = image[:, row - down, column - right]
    return result.flip(2) if mirrored else result


def test_cifar100_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = r"must contain the files train, test and meta, undamaged: get them from https://www\.cs\.toronto\.edu/~kriz/cifar\.html"
    with pytest.raises(
        mtl.UserError, match=rf"CIFAR-100: its files can't be read in .*cifar-100-python .*{page}.*download=true"
    ):
        cifar100(root=str(tmp_path))
    write_cifar(tmp_path, monkeypatch)
    for name in ("train", "test", "meta"):
        path = tmp_path / "cifar-100-python" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(mtl.UserError, match=page):
            cifar100(root=str(tmp_path))
        path.write_bytes(whole)
    write_cifar(tmp_path, monkeypatch, coarse_labels=[*range(19), 0][:20])
    with pytest.raises(mtl.UserError, match=page):
        cifar100(root=str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR100.url", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(mtl.UserError, match="its files could be neither read nor downloaded in"):
        cifar100(root=str(tmp_path / "elsewhere"), download=True)


# CelebA: texts in columns of which the widths are those of the published files.

ATTRIBUTES = [
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
]
PARTITION = [0, 0, 2, 1, 0]


def attribute(image: int, place: int) -> int:
    return 1 if (image + 1) * (place + 3) % 7 < 3 else -1


def write_celeba(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    from torchvision.datasets import CelebA

    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{index + 1:06}.jpg" for index in range(len(PARTITION))]
    pixels = [picture(folder / "img_align_celeba" / name, 218, 178, index) for index, name in enumerate(names)]

    def write(file: str, head: list[str], rows: list[str]) -> None:
        (folder / file).write_text("".join(f"{line}\n" for line in [*head, *rows]))

    count = str(len(names))
    write(
        "list_attr_celeba.txt",
        [count, " ".join(ATTRIBUTES) + " "],
        [f"{n} " + " ".join(f"{attribute(i, place):2}" for place in range(40)) for i, n in enumerate(names)],
    )
    write("identity_CelebA.txt", [], [f"{name} {2880 + index}" for index, name in enumerate(names)])
    write(
        "list_bbox_celeba.txt",
        [count, "image_id x_1 y_1 width height"],
        [f"{name}    95  71 226 {313 + index}" for index, name in enumerate(names)],
    )
    marks = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"
    write(
        "list_landmarks_align_celeba.txt",
        [count, marks],
        [f"{name} 69  109  106  113   77  142   73  152  108  154" for name in names],
    )
    write("list_eval_partition.txt", [], [f"{name} {part}" for name, part in zip(names, PARTITION, strict=True)])
    files = [
        (key, hashlib.md5((folder / name).read_bytes()).hexdigest() if name.endswith(".txt") else md5, name)
        for key, md5, name in CelebA.file_list
    ]
    monkeypatch.setattr(CelebA, "file_list", files)
    return pixels


@pytest.mark.parametrize("num_workers", [0, 2])
def test_celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    pixels = write_celeba(tmp_path, monkeypatch)
    splits = celeba(root=str(tmp_path), size=16)
    assert splits.fields() == ["image", *ATTRIBUTES]
    for number, (_, dataset) in enumerate(splits.items()):
        chosen = [index for index, part in enumerate(PARTITION) if part == number]
        (batch,) = Loader(dataset, batch_size=5, num_workers=num_workers).batches()
        for place, name in enumerate(ATTRIBUTES):
            assert batch[name].dtype == torch.float32
            assert batch[name].tolist() == [(attribute(index, place) + 1) / 2 for index in chosen]
        for image, index in zip(batch["image"], chosen, strict=True):
            np.testing.assert_allclose(image, seen(pixels[index], 16), atol=1e-5)


def test_celeba_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (
        r"must contain the folder img_align_celeba and list_attr_celeba\.txt, .*get them from https://mmlab\.ie\.cuhk"
    )
    with pytest.raises(mtl.UserError, match=rf"CelebA: its files can't be read in {tmp_path}/celeba .*{page}"):
        celeba(root=str(tmp_path))
    write_celeba(tmp_path, monkeypatch)
    damaged = tmp_path / "celeba" / "img_align_celeba" / "000003.jpg"
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(mtl.UserError, match=r"data\.test: the picture .*000003\.jpg is damaged"):
        celeba(root=str(tmp_path))
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("")
    with pytest.raises(mtl.UserError, match=page):
        celeba(root=str(tmp_path))


# Oxford-IIIT Pet: lists of picture, class 1 to 37, 1 for a cat and 2 for a dog, number within; trimaps of 1, 2 and 3.

PETS = [
    ("Abyssinian_1", 1, 1),
    ("american_bulldog_10", 2, 2),
    ("Bengal_7", 3, 1),
    ("yorkshire_terrier_3", 4, 2),
    ("Abyssinian_12", 1, 1),
    ("Bengal_8", 3, 1),
]


def write_pets(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    written = {}
    for index, (name, _, _) in enumerate(PETS):
        pixels = picture(folder / "images" / f"{name}.jpg", 20, 30, index)
        trimap = np.random.default_rng(index).integers(1, 4, (20, 30), dtype=np.uint8)
        Image.fromarray(trimap).save(folder / "annotations" / "trimaps" / f"{name}.png")
        written[name] = pixels, trimap
    lines = [f"{name} {breed} {species} 1\n" for name, breed, species in PETS]
    (folder / "annotations" / "trainval.txt").write_text("".join(lines[:4]))
    (folder / "annotations" / "test.txt").write_text("".join(lines[4:]))
    return written


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pets(tmp_path: Path, num_workers: int) -> None:
    written = write_pets(tmp_path)
    splits = pets(root=str(tmp_path), size=10, validation=0.25)
    assert {name: len(dataset) for name, dataset in splits.items()} == {"train": 3, "val": 1, "test": 2}
    assert splits.fields() == ["image", "breed", "species", "mask"]
    (batch,) = Loader(splits.test, batch_size=2, num_workers=num_workers).batches()
    assert batch["breed"].tolist() == [0, 2]
    assert batch["species"].tolist() == [0, 0]
    assert batch["mask"].dtype == torch.int64
    for index, (name, _, _) in enumerate(PETS[4:]):
        pixels, trimap = written[name]
        np.testing.assert_allclose(batch["image"][index], seen(pixels, 10), atol=1e-5)
        nearest = np.asarray(Image.fromarray(trimap).resize((10, 10), Image.Resampling.NEAREST))
        assert batch["mask"][index].tolist() == np.array([9, 1, 0, -100])[nearest].tolist()
    held = {sample["breed"].item() for sample in splits.val} | {sample["breed"].item() for sample in splits.train}
    assert held == {0, 1, 2, 3}
    assert splits.facts["targets"]["species"]["vocabulary"] == ["Cat", "Dog"]
    assert splits.facts["targets"]["breed"]["vocabulary"][:2] == ["Abyssinian", "American Bulldog"]


def test_pets_masks_are_drawn_with_their_pictures(tmp_path: Path) -> None:
    write_pets(tmp_path)
    folder = tmp_path / "oxford-iiit-pet"
    trimap = np.where(np.arange(30) < 11, 1, 2).astype(np.uint8)[None].repeat(20, 0)  # the animal is at the left, white
    for name, _, _ in PETS:
        Image.fromarray(trimap).save(folder / "annotations" / "trimaps" / f"{name}.png")
        white = np.where(trimap == 1, 255, 0).astype(np.uint8)[..., None].repeat(3, 2)
        Image.fromarray(white).save(folder / "images" / f"{name}.jpg", format="PNG")
    train = pets(root=str(tmp_path), size=30, augment=True, validation=0.25).train
    left = []
    for seed in range(30):
        torch.manual_seed(seed)
        sample = train[seed % 3]
        bright = sample["image"][0] > 0.2  # half of white, standardised
        assert (bright == (sample["mask"] == 1)).float().mean() > 0.95  # but for the edge
        left.append(bool(sample["mask"][:, 0].float().mean() > sample["mask"][:, -1].float().mean()))
    assert 5 < sum(left) < 25


def test_pets_missing_or_damaged(tmp_path: Path) -> None:
    page = r"must contain the folders images and annotations \(with .*get them from https://www\.robots\.ox\.ac\.uk/~vgg/data/pets"
    with pytest.raises(
        mtl.UserError, match=rf"Oxford-IIIT Pet: its files can't be read in {tmp_path}/oxford-iiit-pet.*{page}"
    ):
        pets(root=str(tmp_path))
    write_pets(tmp_path)
    annotations = tmp_path / "oxford-iiit-pet" / "annotations"
    (annotations / "trimaps" / "Abyssinian_12.png").write_bytes(b"")
    with pytest.raises(mtl.UserError, match=r"data\.test: the picture .*trimaps/Abyssinian_12\.png is damaged"):
        pets(root=str(tmp_path), validation=0.25)
    (annotations / "test.txt").write_text("Abyssinian_12 1\n")
    with pytest.raises(mtl.UserError, match=page):
        pets(root=str(tmp_path))
    (annotations / "test.txt").unlink()
    with pytest.raises(mtl.UserError, match=page):
        pets(root=str(tmp_path))


# Office: a folder for each domain, in it one for each class.


@pytest.mark.parametrize(
    ("kind", "domains", "inner"),
    [
        ("office31", ("amazon", "dslr", "webcam"), "images"),
        ("office31", ("amazon", "dslr", "webcam"), ""),
        ("office_home", ("Art", "Clipart", "Product", "Real World"), ""),
    ],
)
def test_office(tmp_path: Path, kind: str, domains: tuple[str, ...], inner: str) -> None:
    pixels = {}
    for domain in domains:
        for name, count in (("mug", 4), ("bike", 3), ("pen", 3 if domain == domains[1] else 0)):
            for index in range(count):
                path = tmp_path / domain / inner / name / f"frame_{index:04}.jpg"
                pixels[str(path)] = picture(path, 12, 10, len(pixels))
    (tmp_path / domains[0] / inner / "mug" / "notes.txt").write_text("not a picture")
    for domain in domains:
        splits = office_domain(kind=kind, domain=domain, root=str(tmp_path), size=8)
        assert splits.facts["targets"]["label"]["vocabulary"] == ["bike", "mug", "pen"]
        total = 10 if domain == domains[1] else 7
        assert [len(dataset) for _, dataset in splits.items()] == ([6, 2, 2] if total == 10 else [4, 2, 1])
        files = [file for _, dataset in splits.items() for file in dataset.files]
        assert sorted(files) == sorted(path for path in pixels if f"/{domain}/" in path)
        for _, dataset in splits.items():
            for index, file in enumerate(dataset.files):
                sample = dataset[index]
                assert ["bike", "mug", "pen"][sample["label"]] == Path(file).parent.name
                np.testing.assert_allclose(sample["image"], seen(pixels[file], 8), atol=1e-5)
        again = office_domain(kind=kind, domain=domain, root=str(tmp_path), size=8)
        assert again.train.files == splits.train.files
    other = office_domain(kind=kind, domain=domains[1], root=str(tmp_path), seed=1)
    assert other.train.files != office_domain(kind=kind, domain=domains[1], root=str(tmp_path)).train.files


def test_office_messages(tmp_path: Path) -> None:
    for options, message in (
        ({"kind": "office", "domain": "Art"}, "data.kind: 'office' is not one of office31, office_home"),
        ({"kind": "office31", "domain": "Art"}, "data.domain: 'Art' is not one of amazon, dslr, webcam"),
        (
            {"kind": "office_home", "domain": "Real World"},
            f"Office-Home: there are no pictures in {tmp_path}/Real World. This folder must contain a folder for each "
            "class: get the data set from https://www.hemanthdv.org/officeHomeDataset.html",
        ),
    ):
        with pytest.raises(mtl.UserError) as error:
            office_domain(**options, root=str(tmp_path))
        assert str(error.value).startswith(message)
