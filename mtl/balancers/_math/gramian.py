"""The Gramian of gradients that are given in pieces."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

COLUMNS = 16_384  # how much of the rows is summed at once in float64


def gramian(pieces: Iterable[Sequence[Tensor | None]]) -> Tensor:
    """G Gᵀ, shape (T, T), float64; each piece is the same columns of all T rows, in any one shape; None is zeros.

    Summed in float64 over chunks of columns: a plain float32 product over 11 M columns is off by up to 1 %.
    """
    total: Tensor | None = None
    for piece in pieces:
        rows = [torch.view_as_real(r) if r is not None and r.is_complex() else r for r in _dense(piece)]
        present = next(row for row in rows if row is not None)
        flat = [row.reshape(-1) if row is not None else None for row in rows]
        for start in range(0, max(present.numel(), 1), COLUMNS):
            end = min(start + COLUMNS, present.numel())
            chunk = torch.zeros(len(rows), end - start, dtype=torch.float64, device=present.device)
            for to, row in zip(chunk, flat, strict=True):
                if row is not None:
                    to.copy_(row[start:end])
            product = chunk @ chunk.T
            total = product if total is None else total + product
    assert total is not None
    return total


def _dense(rows: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The rows, those of a sparse embedding reduced to the indices that any of them touches."""
    sparse = [row.coalesce() if row is not None and row.is_sparse else None for row in rows]
    touched = [None if row is None else _places(row) for row in sparse]
    there = [places for places in touched if places is not None]
    if not there:
        return list(rows)
    indices = torch.unique(torch.cat(there))
    dense: list[Tensor | None] = []
    for row, thin, places in zip(rows, sparse, touched, strict=True):
        if thin is None and row is not None:
            return [r.to_dense() if r is not None else None for r in rows]  # one of them is dense: all have to be
        if thin is None or places is None:
            dense.append(None)
        else:
            values = thin.values()
            reduced = values.new_zeros(len(indices), *values.shape[1:])
            dense.append(reduced.index_copy_(0, torch.searchsorted(indices, places), values))
    return dense


def _places(thin: Tensor) -> Tensor:
    """One number for each index of a sparse tensor, which may be of several dimensions, as those of a gather are."""
    first: Tensor
    first, *others = thin.indices()
    for index, size in zip(others, thin.shape[1:], strict=False):
        first = first * size + index
    return first
