"""Pictures for the logs, such as cosines and predictions. Each is a uint8 array (H, W, 3)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = NDArray[np.uint8]
Array = NDArray[Any]
RIGHT, WRONG = "#1a7f37", "#cf222e"
GAP = 3  # pixels between tiles
LINE = 18  # pixels for a line of text above a row
TILE = 96  # the minimal height and width of a tile in pixels
LETTER, LETTERS = 6, 24  # pixels per letter, and letters per line that fit into a tile
MOST = 256  # the maximal side of a tile in pixels; larger images are subsampled
MOST_CLASSES = 12  # the most classes in a confusion matrix
MOST_NUMBERS = 15  # the most classes in a matrix with numbers in its cells
MOST_NAMES = 40  # the most classes in a matrix with their names
LARGEST_MATRIX = 10.0  # the largest side of a matrix in inches
MOST_PANELS = 4  # the most panels in a row
GREY = 0.5  # the colour of undefined values


def cosine_matrix(tasks: Sequence[str], cosines: Mapping[tuple[str, str], float]) -> Picture:
    """Draws the cosines of all pairs of tasks as a matrix with numbers: blue for agreement, red for conflict.

    Args:
        tasks: The names of the tasks.
        cosines: The cosines by pair of names; pairs without an entry stay empty.
    """
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    np.fill_diagonal(matrix, 1.0)
    for (a, b), cosine in cosines.items():
        i, j = tasks.index(a), tasks.index(b)
        matrix[i, j] = matrix[j, i] = cosine
    side = 1.6 + 0.6 * len(tasks)
    figure, axes = _figure(side + 0.6, side)
    _matrix(axes, matrix, tasks, tasks, "RdBu", -1.0, 1.0, "{:+.2f}")
    return _drawn(figure)


def confusion(predicted: Array, truth: Array, classes: Sequence[str]) -> Picture:
    """Draws the confusion matrix.

    Args:
        predicted, truth: Class numbers, (N,).
        classes: The names of the classes; all classes after the first twelve are combined.
    """
    count = min(len(classes), MOST_CLASSES)
    names = [_short(name) for name in classes[:count]]
    rows, columns = (np.minimum(numbers, count).astype(int) for numbers in (truth, predicted))
    if len(classes) > count or (rows == count).any() or (columns == count).any():
        names.append(f"{max(len(classes) - count, 1)} others")
    matrix = np.zeros((len(names), len(names)))
    np.add.at(matrix, (rows, columns), 1)
    side = 1.6 + 0.45 * len(names)
    figure, axes = _figure(side + 0.6, side)
    _matrix(axes, matrix, names, names, "Blues", 0.0, max(matrix.max(), 1.0), "{:.0f}")
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    return _drawn(figure)


def matrix(values: Array, classes: Sequence[str] | None = None) -> Picture:
    """Draws a square matrix, such as a confusion matrix whose rows are the true classes, (C, C).

    Counts are shown as percentages of their row, other numbers as they are. Matrices of more than 15
    classes have no numbers, and of more than 40 no names.

    Args:
        values: The matrix.
        classes: The names of the classes; None for their numbers.
    """
    count = len(values)
    known = classes is not None and len(classes) == count
    names = [_short(str(name)) for name in (classes if classes is not None and known else range(count))]
    names = names if count <= MOST_NAMES else []
    shown, unit = shares(values)
    side = 1.6 + min(0.45 * count, LARGEST_MATRIX)
    figure, axes = _figure(side + 0.6, side)
    finite = shown[np.isfinite(shown)]
    low, high = min(0.0, finite.min(initial=0.0)), max(finite.max(initial=0.0), 1e-9)
    form = "" if count > MOST_NUMBERS else "{:.0f}" if unit else "{:.2g}"
    _matrix(axes, shown, names, names, "Blues", low, 100.0 if unit else high, form)
    if count > MOST_NUMBERS:
        axes.tick_params(labelsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    axes.set_title(unit, fontsize=9)
    return _drawn(figure)


def shares(values: Array) -> tuple[Array, str]:
    """Returns a matrix of counts as percentages of their row, or another matrix as it is, and the unit.

    Rows without any count are NaN.
    """
    if not np.isfinite(values).all() or (values < 0).any() or (values % 1).any() or values.max() <= 1:
        return values, ""
    sums = values.sum(1, keepdims=True)
    return np.where(sums > 0, 100 * values / np.maximum(sums, 1), np.nan), "% of each true class"


def yes_and_no(predicted: Array, truth: Array, labels: Sequence[str]) -> Picture:
    """Draws how often each of several binary labels was predicted correctly and wrongly.

    Args:
        predicted, truth: 0 or 1, (N, K); a truth below 0 is a missing label, which isn't counted.
        labels: The names of the labels; only the first twelve are shown.
    """
    shown = labels[:MOST_CLASSES]
    kinds = {"yes, is yes": (1, 1), "yes, is no": (1, 0), "no, is yes": (0, 1), "no, is no": (0, 0)}
    counts = [((predicted == p) & (truth == t)).sum(0)[: len(shown)] for p, t in kinds.values()]
    matrix = np.stack(counts, axis=1).astype(float)
    figure, axes = _figure(4.4, 1.8 + 0.45 * len(shown))
    _matrix(axes, matrix, [_short(name) for name in shown], list(kinds), "Blues", 0.0, max(matrix.max(), 1.0), "{:.0f}")
    if len(labels) > len(shown):
        axes.set_title(f"the first {len(shown)} of {len(labels)} labels", fontsize=9)
    return _drawn(figure)


def scatter(predicted: Array, truth: Array) -> Picture:
    """Draws predicted numbers, (N,) or (N, K), against the true ones; on the line both are equal.

    There is one panel for each of the first four of K numbers. Pairs with a non-finite number are left out.
    """
    columns = list(zip(np.atleast_2d(predicted.T), np.atleast_2d(truth.T), strict=True))
    shown = columns[:MOST_PANELS]
    figure, first = _figure(3.6 * len(shown), 3.4)
    first.remove()
    for index, (guess, true) in enumerate(shown):
        finite = np.isfinite(guess) & np.isfinite(true)
        guess, true = guess[finite], true[finite]
        axes = figure.add_subplot(1, len(shown), index + 1)
        axes.scatter(true, guess, s=8, alpha=0.6)
        both = np.concatenate([true, guess])
        low, high = (float(both.min()), float(both.max())) if both.size else (0.0, 1.0)
        axes.plot([low, high], [low, high], color="gray", linewidth=1)
        axes.set_xlabel("truth")
        axes.set_ylabel("predicted")
        if len(columns) > 1:
            axes.set_title(f"number {index + 1} of {len(columns)}", fontsize=9)
    return _drawn(figure)


def labelled(images: Sequence[Array], words: Sequence[str], right: Sequence[bool | None]) -> Picture:
    """Draws images in rows of four, below lines of text that are green if they are right and red if they are wrong.

    Args:
        images: Arrays (H, W, 3) in [0, 1].
        words: The text above each image.
        right: Whether each text is right; None if that is undefined.
    """
    colours = [{True: RIGHT, False: WRONG, None: "black"}[each] for each in right]
    starts = range(0, len(images), 4)
    return _grid(
        [images[i : i + 4] for i in starts], [words[i : i + 4] for i in starts], [colours[i : i + 4] for i in starts]
    )


def side_by_side(rows: Sequence[Sequence[Array]], titles: Sequence[str]) -> Picture:
    """Draws one row of images (H, W, 3) in [0, 1] per sample, such as input, prediction and truth."""
    return _grid(rows, [[*titles], *([""] * len(titles) for _ in rows[1:])], None)


def rgb(image: Array, scale: Array | None = None) -> Array:
    """Converts an image (1 or 3, H, W) to (H, W, 3) in [0, 1], scaled by the range of `scale` or of the image itself.

    Non-finite pixels become grey.
    """
    image = np.asarray(image, dtype=np.float64)
    shown = np.moveaxis(image if len(image) == 3 else np.repeat(image, 3, axis=0), 0, -1)
    finite = np.asarray(image if scale is None else scale, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    stretched: Array = ((shown - low) / (high - low or 1.0)).clip(0, 1)
    return np.where(np.isfinite(shown), stretched, GREY)


def numbers_as_colours(*maps: Array) -> list[Array]:
    """Converts maps of numbers (H, W) to colours (H, W, 3) in [0, 1] with a common scale; undefined values are grey."""
    finite = np.concatenate([m[np.isfinite(m)].ravel() for m in maps])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return [_coloured("viridis", (m - low) / (high - low or 1.0), np.isfinite(m)) for m in maps]


def classes_as_colours(*maps: Array) -> list[Array]:
    """Converts maps of class numbers (H, W) to colours (H, W, 3) in [0, 1]; numbers below 0 (no class) are grey."""
    return [_coloured("tab20", (m % 20 + 0.5) / 20, m >= 0) for m in maps]


def _coloured(name: str, values: Array, defined: Array) -> Array:
    from matplotlib import colormaps

    colours = np.asarray(colormaps[name](np.where(defined, values, 0.0)))[..., :3]
    coloured: Array = np.where(defined[..., None], colours, GREY)
    return coloured


def _grid(rows: Sequence[Sequence[Array]], words: Sequence[Sequence[str]], colours: Any) -> Picture:
    rows = [[image[:: -(-len(image) // MOST), :: -(-image.shape[1] // MOST)] for image in row] for row in rows]
    height = max(image.shape[0] for row in rows for image in row)
    width = max(image.shape[1] for row in rows for image in row)
    longest = max((len(line) for row in words for word in row for line in word.split("\n")), default=0)
    least = max(TILE, LETTER * min(longest, LETTERS))
    factor = max(1, -(-TILE // min(height, width)), -(-least // width))
    height, width = height * factor, width * factor
    above = [max((LINE * (word.count("\n") + 1) for word in row if word), default=0) for row in words]
    total = sum(height + GAP + line for line in above), (width + GAP) * max(map(len, rows))
    canvas = np.ones((*total, 3))
    texts = []
    top = 0
    for r, row in enumerate(rows):
        top += above[r]
        for c, image in enumerate(row):
            tile = image.repeat(factor, axis=0).repeat(factor, axis=1)
            left = c * (width + GAP)
            canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
            if words[r][c]:
                texts.append((left + width / 2, top - 4, words[r][c], colours[r][c] if colours else "black"))
        top += height + GAP
    figure, axes = _figure(total[1] / 100, total[0] / 100)
    axes.set_position((0, 0, 1, 1))
    axes.imshow(canvas, aspect="auto")
    axes.set_axis_off()
    letters = width // LETTER
    for x, y, text, colour in texts:
        for index, line in enumerate(reversed(text.split("\n"))):
            axes.text(x, y - index * LINE, _short(line, letters), color=colour, ha="center", va="baseline", fontsize=8)
    return _drawn(figure, tight=False)


def _matrix(
    axes: "Axes",
    matrix: Array,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: str,
    low: float,
    high: float,
    form: str,
) -> None:
    axes.imshow(matrix, cmap=colours, vmin=low, vmax=high)
    if rows:
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
    for (i, j), value in np.ndenumerate(matrix):
        if form and np.isfinite(value):
            dark = (value - low) / (high - low) > 0.8 or (low < 0 and value < 0.6 * low)
            axes.text(
                j, i, form.format(value), ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    return figure, figure.add_subplot()


def _drawn(figure: "Figure", *, tight: bool = True) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if tight:
        figure.set_layout_engine("tight")
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _short(text: str, letters: int = 18) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
