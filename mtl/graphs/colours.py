"""One colour per task, the same in all pictures of a step."""

import colorsys
from collections.abc import Sequence

LIGHT = ("#8ecbe8", "#f7c06b", "#8fd6b5", "#f2a3c7", "#c9b8f0", "#f0e080", "#f29e88", "#b5c7d3")
MANY = "#d9d9d9"  # the colour of what several tasks share


def colours(tasks: Sequence[str]) -> dict[str, str]:
    """Returns a light colour for each task."""
    if len(tasks) <= len(LIGHT):
        return dict(zip(tasks, LIGHT, strict=False))
    wheel = [colorsys.hls_to_rgb(index / len(tasks), 0.75, 0.7) for index in range(len(tasks))]
    return {
        task: "#" + "".join(f"{round(255 * part):02x}" for part in rgb) for task, rgb in zip(tasks, wheel, strict=True)
    }
