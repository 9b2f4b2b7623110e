"""Numbers and names as text."""

import math
import re

from mtl.reporting.estimates import Estimate


def number(value: float) -> str:
    """Four digits, with a real minus sign."""
    return f"{value:.4g}".replace("-", "−")


def plus_minus(found: Estimate | None) -> str:
    """`0.934 ± 0.012`: two digits of the interval, if the mean then has no more than five. A mean alone without one."""
    if found is None:
        return "–"
    if found.half is None:
        return number(found.mean)
    if found.half <= 5e-5 * abs(found.mean):
        return f"{number(found.mean)} ± 0"
    places = 1 - math.floor(math.log10(found.half))
    if found.mean:
        places = min(places, 4 - math.floor(math.log10(abs(found.mean))))
    if places > 6:
        return f"{found.mean:.3g} ± {found.half:.2g}".replace("-", "−")
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


def slug(text: str) -> str:
    """The text as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.").lower() or "problem"


def listed(items: list[str], most: int = 6) -> str:
    """`a, b and c`; of many the first, and how many more there are."""
    if len(items) > most:
        return f"{', '.join(items[:most])} and {len(items) - most} more"
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
