"""The direction with the same, or a preferred, cosine to every gradient, which two balancers scale differently."""

import torch
from torch import Tensor


def bisector(gramian: Tensor, preferences: Tensor) -> Tensor:
    """Returns the coefficients x, (T,), of the combination Gᵀx whose projections on the unit gradients are preferences.

    With the unit gradients as the rows of U, the combination is U⁺p. Gradients that are zero get the coefficient 0. If
    the other gradients are linearly dependent, such a combination may not exist; the result is then the one with the
    smallest squared error.

    Args:
        gramian: The Gramian of the gradients, (T, T).
        preferences: p, the projections, (T,).
    """
    norms = gramian.diagonal().sqrt()
    coefficients = torch.zeros_like(norms)
    moving = norms > 0
    lengths = norms[moving]
    cosines = gramian[moving][:, moving] / torch.outer(lengths, lengths)
    inverse = torch.linalg.pinv(cosines, rtol=1e-12, hermitian=True)
    coefficients[moving] = (inverse @ preferences[moving]) / lengths
    return coefficients
