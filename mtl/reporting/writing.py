"""Formats numbers and names as text."""

import math
import re

from mtl.reporting.estimates import Estimate

LONGEST_SLUG = 50  # characters; a file name may have 255 bytes, and a letter up to four bytes
NOTHING = 1e-12  # relative to the mean; smaller intervals are rounding errors


def number(value: float) -> str:
    """Formats a number with four digits and a typographic minus sign."""
    return f"{value:.4g}".replace("-", "−")


def plus_minus(estimate: Estimate | None) -> str:
    """Formats an estimate as `0.934 ± 0.012`, or only the mean if there is no interval.

    The interval has two digits, or one digit if the mean would have more than five.
    """
    if estimate is None:
        return "–"
    if estimate.half is None:
        return number(estimate.mean)
    if estimate.half <= NOTHING * abs(estimate.mean):
        return f"{number(estimate.mean)} ± 0"
    first = -math.floor(math.log10(estimate.half))  # the place of the interval's first digit
    size = math.floor(math.log10(abs(estimate.mean))) if estimate.mean else -first
    places = max(first, min(first + 1, 4 - size))
    if places > 6:
        return f"{estimate.mean:.{max(1, places + size + 1)}g} ± {estimate.half:.2g}".replace("-", "−")
    places = max(0, places)
    return f"{estimate.mean:.{places}f} ± {estimate.half:.{places}f}".replace("-", "−")


def signed(estimate: Estimate | None) -> str:
    """Formats a difference with the interval, as `+1.2 [−0.3, +2.7]`."""
    if estimate is None:
        return "–"
    if estimate.half is None or estimate.low is None or estimate.high is None:
        return f"{estimate.mean:+.3g}".replace("-", "−")
    places = max(0, 1 - math.floor(math.log10(estimate.half))) if estimate.half else 4
    form = f"+.{places}f" if places <= 6 else "+.2g"
    mean, low, high = (f"{value:{form}}" for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def p_value(p: float | None) -> str:
    """Formats a p-value with three decimals; smaller values are shown as less than 0.001."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def shortened(text: str, most: int) -> str:
    """Shortens the text to the beginning and the end, because paths differ at the end."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"


def slug(text: str) -> str:
    """Returns the text, or the beginning of long texts, in characters that are safe in file names."""
    return re.sub(r"[^\w.-]+", "-", text)[:LONGEST_SLUG].strip("-.").lower() or "problem"


def listed(items: list[str], most: int = 6) -> str:
    """Joins items as `a, b and c`; long lists end with the number of further items; `;` separates items with commas."""
    if any("," in item for item in items):
        return "; ".join(items[:most] + [f"{len(items) - most} more"] * (len(items) > most))
    if len(items) > most:
        return f"{', '.join(items[:most])} and {len(items) - most} more"
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
