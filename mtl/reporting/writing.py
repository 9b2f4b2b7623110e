"""Numbers and names as text."""

import math
import re

from mtl.reporting.estimates import Estimate

LONGEST_SLUG = 50  # characters: a file's name may have 255 bytes, and a letter four of them
NOTHING = 1e-12  # of a mean: what rounding makes of the interval of equal figures


def number(value: float) -> str:
    """Four digits, with a real minus sign."""
    return f"{value:.4g}".replace("-", "−")


def plus_minus(found: Estimate | None) -> str:
    """`0.934 ± 0.012`: two digits of the interval, one where the mean then has more than five. Or a mean alone."""
    if found is None:
        return "–"
    if found.half is None:
        return number(found.mean)
    if found.half <= NOTHING * abs(found.mean):
        return f"{number(found.mean)} ± 0"
    first = -math.floor(math.log10(found.half))  # the place of the interval's first digit
    size = math.floor(math.log10(abs(found.mean))) if found.mean else -first
    places = max(first, min(first + 1, 4 - size))
    if places > 6:
        return f"{found.mean:.{max(1, places + size + 1)}g} ± {found.half:.2g}".replace("-", "−")
    places = max(0, places)
    return f"{found.mean:.{places}f} ± {found.half:.{places}f}".replace("-", "−")


def signed(found: Estimate | None) -> str:
    """`+1.2 [−0.3, +2.7]`: a difference with its interval."""
    if found is None:
        return "–"
    if found.half is None or found.low is None or found.high is None:
        return f"{found.mean:+.3g}".replace("-", "−")
    places = max(0, 1 - math.floor(math.log10(found.half))) if found.half else 4
    form = f"+.{places}f" if places <= 6 else "+.2g"
    mean, low, high = (f"{value:{form}}" for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def p_value(p: float | None) -> str:
    """Three places, and no claim of less than 0.001."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def shortened(text: str, most: int) -> str:
    """So many characters of the text: its beginning and its end, since paths end apart."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"


def slug(text: str) -> str:
    """The text, or its beginning, as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text)[:LONGEST_SLUG].strip("-.").lower() or "problem"


def listed(items: list[str], most: int = 6) -> str:
    """`a, b and c`; of many the first, and how many more there are. `a, b; c` where an item holds a comma itself."""
    if any("," in item for item in items):
        return "; ".join(items[:most] + [f"{len(items) - most} more"] * (len(items) > most))
    if len(items) > most:
        return f"{', '.join(items[:most])} and {len(items) - most} more"
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
