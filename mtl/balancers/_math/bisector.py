"""The direction at the same, or a preferred, angle to every gradient, which two balancers lengthen differently."""

import torch
from torch import Tensor


def bisector(gramian: Tensor, preferences: Tensor) -> Tensor:
    """Coefficients x, (T,), of the combination Gᵀx whose projections on the unit gradients are the preferences.

    With the unit gradients as rows of U it is U⁺p. Gradients that are zero get the coefficient 0; where the others are
    dependent no such direction need exist, and it is the nearest one in the sense of least squares.
    """
    norms = gramian.diagonal().sqrt()
    coefficients = torch.zeros_like(norms)
    moving = norms > 0
    lengths = norms[moving]
    cosines = gramian[moving][:, moving] / torch.outer(lengths, lengths)
    inverse = torch.linalg.pinv(cosines, rtol=1e-12, hermitian=True)
    coefficients[moving] = (inverse @ preferences[moving]) / lengths
    return coefficients
