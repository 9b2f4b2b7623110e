"""The small quadratic programs of several balancers, solved exactly by an active-set method."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RIDGE = 1e-14  # added to the unit diagonal, so that the system can be solved if rows are linearly dependent
TOLERANCE = 1e-12  # of the gradient at the solution, relative to the sum of the absolute values of its terms


def minimise(matrix: Array, linear: Array, *, simplex: bool) -> Array:
    """Returns the x ≥ 0 that minimises ½ xᵀAx + bᵀx, with Σx = 1 if `simplex`.

    The variables are scaled so that A has a unit diagonal, since the rows of a Gramian may differ in size by any
    factor. The method is that of Lawson and Hanson for non-negative least squares: the variable with the most negative
    gradient is added to the active variables, the problem is solved for the active variables, and variables that
    would become negative are removed.

    Args:
        matrix: A, (n, n), symmetric positive semidefinite, with a diagonal above zero.
        linear: b, (n,); in the range of A unless `simplex`.
        simplex: Whether the sum of the variables is one.

    Returns:
        x, (n,). If A is singular, there may be several solutions, all with the same Ax.

    Raises:
        ArithmeticError: If 50 n rounds don't reach a solution, which only rounding errors can cause.
    """
    count = len(linear)
    scale = 1 / np.sqrt(matrix.diagonal())
    a = matrix * np.outer(scale, scale)
    unit = 1 / scale.max() if simplex else float(np.abs(linear * scale).max())
    if unit == 0.0:
        return np.zeros(count)
    b = linear * scale / unit  # in these units all numbers are of order one, whatever the scale of the gradients
    total = scale * unit if simplex else np.zeros(count)
    x = np.zeros(count)
    if simplex:
        best = int(np.argmin(0.5 / total**2 + b / total))
        x[best] = 1 / total[best]
    else:  # often the solution's active variables are those with b < 0; this start saves adding them one by one
        likely = b < 0
        together = _unbounded(likely, a, b, total)
        x = together if together.min() >= 0 else x
    blocked = np.zeros(count, dtype=bool)
    for _ in range(50 * count):
        inside = x > 0
        gradient, terms = a @ x + b, np.abs(a) @ x + np.abs(b)
        if simplex:
            multiplier = float(gradient[inside] @ total[inside] / (total[inside] @ total[inside]))
            gradient, terms = gradient - multiplier * total, terms + abs(multiplier) * total
        wanting = np.where(inside | blocked, np.inf, gradient + TOLERANCE * terms)
        entering = int(np.argmin(wanting))
        if wanting[entering] >= 0:
            w: Array = x * scale * unit
            return w / w.sum() if simplex else w
        moved = _let_in(entering, inside, x, a, b, total)
        # Because of rounding, a variable may be removed immediately; it is blocked until another variable has changed.
        blocked = np.zeros(count, dtype=bool) if moved is not None else blocked
        blocked[entering] = moved is None
        x = x if moved is None else moved
    shown = f"; the Gramian is {matrix.tolist()}" if count <= 5 else ""
    raise ArithmeticError(f"the quadratic program of {count} tasks was not solved{shown}")


def _let_in(entering: int, inside: NDArray[np.bool_], x: Array, a: Array, b: Array, total: Array) -> Array | None:
    """Returns the minimum with one more active variable, without those that reach zero; None if x can't change.

    Args:
        entering: The index of the variable to add.
        inside: Whether each variable is active, (n,).
        x: The current point, (n,).
        a, b, total: A, b and the coefficients of the constraint total·x = 1, see `minimise`, for variables that are
            scaled so that A has a unit diagonal; total is zero if there is no constraint.
    """
    inside = inside.copy()
    inside[entering] = True
    while True:
        target = _unbounded(inside, a, b, total)
        if target[inside].min() > 0:
            return target
        falling = np.flatnonzero(inside & (target <= 0))
        if entering in falling and x[entering] == 0:
            return None
        steps = x[falling] / (x[falling] - target[falling])
        x = x + steps.min() * (target - x)
        x[falling[steps == steps.min()]] = 0.0
        inside &= x > 0


def _unbounded(inside: NDArray[np.bool_], a: Array, b: Array, total: Array) -> Array:
    """Returns the minimum over the active variables, of any sign, under total·x = 1 unless total is zero."""
    chosen = np.flatnonzero(inside)
    system = a[np.ix_(chosen, chosen)] + RIDGE * np.eye(len(chosen))
    x = np.zeros(len(b))
    if total.any():
        edge = total[chosen]
        free, along = np.linalg.solve(system, np.stack([-b[chosen], edge], axis=1)).T
        x[chosen] = free + along * (1 - edge @ free) / (edge @ along)
    else:
        x[chosen] = np.linalg.solve(system, -b[chosen])
    return x
