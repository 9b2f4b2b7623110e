"""Seeds that are derived from other numbers."""

import numpy as np


def seed_of(*numbers: int) -> int:
    """Derives one seed from several numbers. NumPy's SeedSequence alone treats [5, 1] and [5, 1, 0] as the same."""
    if len(numbers) == 2:
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])
    words = [number >> shift & 2**32 - 1 for number in numbers for shift in (0, 32, 64)]
    return int(np.random.SeedSequence([len(numbers), *words]).generate_state(1)[0])
