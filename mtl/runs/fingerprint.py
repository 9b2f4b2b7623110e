"""Fingerprints of a run's data; runs whose fingerprints differ can't be compared."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from mtl.errors import FOREIGN
from mtl.process.seeding import random_state, seed_cpu, set_random_state

NUM_SAMPLES = 16  # number of samples that are read; reading all of them could take hours


def fingerprints(splits: Iterable[tuple[str, Any]]) -> dict[str, str | None]:
    """Returns the fingerprint of each split; several sources are joined, and None if one of them has no fingerprint."""
    fingerprints_by_split: dict[str, list[str | None]] = {}
    for split, dataset in splits:
        fingerprints_by_split.setdefault(split, []).append(fingerprint(dataset))
    return {split: None if None in each else "+".join(map(str, each)) for split, each in fingerprints_by_split.items()}


def fingerprint(dataset: Any) -> str | None:
    """Returns a digest of a data set in memory, or of the length and some evenly spaced samples of a map-style one.

    Random transforms draw from fixed seeds, so that the digest depends only on the data; the random state is restored.
    The result is None for iterable data sets and for data sets whose samples can't be read.
    """
    if isinstance(dataset, IterableDataset):
        return None
    digest = hashlib.sha256(str(len(dataset)).encode())
    fields = getattr(dataset, "fields", None)
    if isinstance(fields, Mapping) and all(isinstance(field, Tensor) for field in fields.values()):
        _take(digest, fields)
        return digest.hexdigest()[:16]
    state = random_state()
    try:
        seed_cpu(0)
        for index in np.linspace(0, len(dataset) - 1, NUM_SAMPLES).round().astype(int).tolist():
            _take(digest, dataset[index])
    except FOREIGN:  # training reports the error if it matters
        return None
    finally:
        set_random_state(state)
    return digest.hexdigest()[:16]


def _take(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode())
            _take(digest, value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            _take(digest, each)
    elif isinstance(value, Tensor | np.ndarray | np.generic):
        array = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    else:
        digest.update(repr(value).encode())
