"""The small quadratic programs that several balancers are, solved exactly by an active set."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RIDGE = 1e-14  # on the unit diagonal, so that dependent rows leave the system solvable
TOLERANCE = 1e-12  # of the gradient at the solution, relative to the terms that it is the sum of


def minimise(matrix: Array, linear: Array, *, simplex: bool) -> Array:
    """The x ≥ 0 that minimises ½ xᵀAx + bᵀx, with Σx = 1 if `simplex`.

    The variables are scaled so that A has a unit diagonal: rows of a Gramian may differ in size by any factor. Then it
    goes as Lawson and Hanson's non-negative least squares: a variable whose gradient is most negative is let in, the
    problem is solved on those that are in, and variables that would become negative are put out.

    Args:
        matrix: A, (n, n), symmetric positive semidefinite, its diagonal above zero.
        linear: b, (n,). Without `simplex`, in the range of A.
        simplex: whether the variables sum to one.

    Returns:
        x, (n,). Where A is singular there are several; Ax is the same for all.

    Raises:
        ArithmeticError: where no solution is found in 50 n rounds, which rounding alone can bring about.
    """
    count = len(linear)
    scale = 1 / np.sqrt(matrix.diagonal())
    a = matrix * np.outer(scale, scale)
    unit = 1 / scale.max() if simplex else float(np.abs(linear * scale).max())
    if unit == 0.0:
        return np.zeros(count)
    b = linear * scale / unit  # in these units everything is of order one, whatever the scale of the gradients
    total = scale * unit if simplex else np.zeros(count)
    x = np.zeros(count)
    if simplex:
        best = int(np.argmin(0.5 / total**2 + b / total))
        x[best] = 1 / total[best]
    else:  # those that alone would want in are often those that are in, which saves letting them in one by one
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
        # One that would leave again at once is kept out by rounding alone, until something else has moved.
        blocked = np.zeros(count, dtype=bool) if moved is not None else blocked
        blocked[entering] = moved is None
        x = x if moved is None else moved
    shown = f"; the Gramian is {matrix.tolist()}" if count <= 5 else ""
    raise ArithmeticError(f"the quadratic program of {count} tasks was not solved{shown}")


def _let_in(entering: int, inside: NDArray[np.bool_], x: Array, a: Array, b: Array, total: Array) -> Array | None:
    """The minimum over the variables inside and the entering one, those that reach zero put out; None if no step."""
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
    """The minimum over the variables inside, whatever their sign, under total·x = 1 if total isn't zero."""
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
