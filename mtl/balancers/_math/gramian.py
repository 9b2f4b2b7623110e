"""The Gramian of gradients, computed piece by piece."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

COLUMNS = 16_384  # the number of columns of a chunk, which is converted to float64 at once


def gramian(pieces: Iterable[Sequence[Tensor | None]]) -> Tensor:
    """Returns the Gramian G Gᵀ, (T, T), float64.

    The sum is computed in float64 over chunks of columns: a plain float32 product over 11 M columns is off by up to
    1 %.

    Args:
        pieces: The columns of G in pieces, such as the gradients of one parameter: T tensors of the same shape, or None
            instead of a tensor of zeros. At least one tensor of a piece is not None.
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
    """Returns dense rows; sparse rows of an embedding are reduced to the indices that at least one row contains."""
    sparse_rows = [row.coalesce() if row is not None and row.is_sparse else None for row in rows]
    indices_of_rows = [None if row is None else _flat_indices(row) for row in sparse_rows]
    present = [indices for indices in indices_of_rows if indices is not None]
    if not present:
        return list(rows)
    union = torch.unique(torch.cat(present))
    dense: list[Tensor | None] = []
    for row, sparse, indices in zip(rows, sparse_rows, indices_of_rows, strict=True):
        if sparse is None and row is not None:
            return [r.to_dense() if r is not None else None for r in rows]  # one row is dense, so all must be
        if sparse is None or indices is None:
            dense.append(None)
        else:
            values = sparse.values()
            reduced = values.new_zeros(len(union), *values.shape[1:])
            dense.append(reduced.index_copy_(0, torch.searchsorted(union, indices), values))
    return dense


def _flat_indices(sparse: Tensor) -> Tensor:
    """Returns one number for each index of a sparse tensor; gathers, for example, have several sparse dimensions."""
    first: Tensor
    first, *others = sparse.indices()
    for index, size in zip(others, sparse.shape[1:], strict=False):
        first = first * size + index
    return first
