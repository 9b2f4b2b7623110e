"""MovieLens: ratings of movies by users, with genres, facts about the users, and movies that a user liked before."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl.data import numeric
from mtl.data.fields import Fields, Splits
from mtl.data.splitting import NAMES, check_shares
from mtl.errors import UserError

FROM_ONE = numeric.Kind("int32", "a whole number of at least 1", lambda x: (x >= 1) & (x < 2**31))
RATING = numeric.Kind("float32", "a rating above 0, of at most 5", lambda x: (x > 0) & (x <= 5))
NO_GENRES = "(no genres listed)"
OF_USERS = ("gender", "age", "occupation")
BY = ("time", "user")


def movielens(
    *,
    root: str = "data/ml-1m",
    history: int = 20,
    like: float = 4.0,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    by: str = "time",
) -> Splits:
    """Returns the ratings of a MovieLens data set, from the files `*.dat` of ml-1m or ml-10m, or `*.csv` of newer ones.

    The fields are `user` and `movie`, (N,), with the numbers in the files, `genres`, (N, most genres of a movie), and
    `history`, (N, history): the last movies that the user gave at least `like` before, most recent last. If there is a
    file `users.dat`, `gender`, `age` and `occupation`, (N,), are fields too. All of them are int32; 0 stands for users
    and movies that the training split doesn't have, and fills shorter lists. `user_id` is the user's number even if
    the user is new, as a metric within each user needs it. The targets are `rating`, in stars, and `like`, 1 for
    ratings of at least `like` and otherwise 0, (N,) float32 each.

    Only ratings of an earlier second are in the history of a rating, and so no rating of validation or test is in the
    history of a training rating. Ratings of one second are always in one split. The fact `columns` has the largest
    number of a user and of a movie, and the vocabulary of each other input.

    Args:
        root: The folder of the files.
        history: The largest number of movies in a history; 0 for no such field.
        like: The smallest rating of a movie that the user likes.
        split: The shares of training, validation and test, in the order of time.
        by: `time`: validation and test are the last ratings of all, and many of their users may be new. `user`: they
            are the last ratings of each user; the model then also learns from what other users rated later.

    Raises:
        UserError: If a file is missing or damaged, or if an argument is wrong.
    """
    check_shares(split)
    _check(history, like, by)
    ratings, fields, columns = _read(Path(root))
    part = np.searchsorted(np.cumsum(split)[:-1].round(9), _positions(ratings, by), side="right")
    for name in ("user", "movie"):
        present = np.unique(ratings[name][part == 0])
        fields[name] = np.where(np.isin(ratings[name], present), ratings[name], 0)
        columns[name] = {"kind": "category", "size": max(1, int(present[-1]))}
    if history:
        fields["history"] = _history(ratings, fields["movie"], history, like)
        columns["history"] = {"kind": "ids", "size": columns["movie"]["size"]}
    fields["user_id"] = ratings["user"]
    fields["rating"] = ratings["rating"]
    fields["like"] = (ratings["rating"] >= like).astype(np.float32)
    data: dict[str, Any] = {}
    for number, name in enumerate(NAMES):
        rows = np.flatnonzero(part == number)
        if split[number] and not len(rows):
            raise UserError(f"data.split: {split[number]} of {len(part)} ratings leaves none for {name}")
        if split[number]:
            data[name] = Fields({field: torch.from_numpy(values[rows]) for field, values in fields.items()})
    return Splits(**data, name=f"MovieLens in {root}, split by {by}", facts={"columns": columns})


def _read(folder: Path) -> tuple[numeric.Arrays, numeric.Arrays, dict[str, Any]]:
    """Returns the ratings, and genres and facts about users as fields, sorted by user and time; and the columns."""
    kind = _layout(folder)
    ratings = _ratings(folder, kind)
    fields: numeric.Arrays = {}
    columns: dict[str, Any] = {}
    _add_genres(folder, kind, ratings["movie"], fields, columns)
    if (folder / "users.dat").is_file():
        _add_users(folder, ratings["user"], fields, columns)
    order = np.lexsort((ratings["time"], ratings["user"]))
    ratings, fields = ({name: values[order] for name, values in some.items()} for some in (ratings, fields))
    return ratings, fields, columns


def _check(history: Any, like: Any, by: Any) -> None:
    if type(history) is not int or history < 0:
        raise UserError(f"data.history is {history!r}; it must be a whole number of at least 0")
    if type(like) not in (int, float) or not 0 < like <= 5:
        raise UserError(f"data.like is {like!r}; it must be a rating above 0, of at most 5")
    if by not in BY:
        raise UserError(f"data.by is {by!r}; it must be one of {', '.join(BY)}")


def _layout(folder: Path) -> str:
    """Returns the suffix of the files: dat or csv.

    Raises:
        UserError: If the files are missing.
    """
    for kind in ("dat", "csv"):
        if all((folder / f"{name}.{kind}").is_file() for name in ("ratings", "movies")):
            return kind
    raise UserError(
        f"MovieLens: {folder.resolve()} must contain ratings.dat and movies.dat (of ml-1m also users.dat), or "
        "ratings.csv and movies.csv: get ml-1m.zip, ml-25m.zip or ml-latest-small.zip from "
        "https://grouplens.org/datasets/movielens and unpack it, or name another folder with data.root=…"
    )


def _ratings(folder: Path, kind: str) -> numeric.Arrays:
    """Returns user, movie, rating and time of each rating."""
    path = folder / f"ratings.{kind}"
    kinds = {"userId": FROM_ONE, "movieId": FROM_ONE, "rating": RATING, "timestamp": numeric.TIME}
    if kind == "csv" and (names := numeric.header(path)) != list(kinds):
        raise UserError(f"data: the first line of {path} is {','.join(names)}; it must be {','.join(kinds)}")
    read = numeric.columns_of(path, kinds, separator="::" if kind == "dat" else ",")
    return dict(zip(("user", "movie", "rating", "time"), read.values(), strict=True))


def _positions(ratings: numeric.Arrays, by: str) -> Any:
    """Returns for each rating the share of ratings before it, of all or of its user; rows are sorted by user and time.

    Ratings of one second have one position.
    """
    user, time = ratings["user"], ratings["time"]
    if by == "time":
        return np.searchsorted(np.sort(time), time) / len(time)
    first = np.searchsorted(user, user)
    return (_before(user, time) - first) / (np.searchsorted(user, user, side="right") - first)


def _before(user: Any, time: Any) -> Any:
    """Returns for each row, sorted by user and time, the first row with the same user and time."""
    new = np.ones(len(user), bool)
    new[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    return np.flatnonzero(new)[np.cumsum(new) - 1]


def _history(ratings: numeric.Arrays, movies: Any, length: int, like: float) -> Any:
    """Returns the last movies that the user liked in earlier seconds, (N, length), filled with 0."""
    liked = ratings["rating"] >= like
    number = np.concatenate([[0], np.cumsum(liked)])  # of liked movies before each row
    end = number[_before(ratings["user"], ratings["time"])]
    start = np.maximum(number[np.searchsorted(ratings["user"], ratings["user"])], end - length)
    of_liked = np.append(movies[liked], 0)  # so that there is a last one
    lists = np.zeros((len(liked), length), np.int32)
    for place in range(length):
        index = start + place
        lists[:, place] = np.where(index < end, of_liked[np.minimum(index, len(of_liked) - 1)], 0)
    return lists


def _add_genres(folder: Path, kind: str, movies: Any, fields: dict[str, Any], columns: dict[str, Any]) -> None:
    """Adds the genres of the rated movies."""
    path = folder / f"movies.{kind}"
    numbers, rows = _listed(path, ("movieId", "title", "genres"))
    of_movies = [[each for each in row[-1].split("|") if each and each != NO_GENRES] for row in rows]
    vocabulary = sorted({genre for genres in of_movies for genre in genres})
    codes = {genre: code for code, genre in enumerate(vocabulary, start=1)}
    table = np.zeros((len(rows), max(1, *map(len, of_movies))), np.int32)
    for row, genres in zip(table, of_movies, strict=True):
        row[: len(genres)] = [codes[genre] for genre in genres]
    fields["genres"] = table[_places(movies, numbers, path, f"ratings.{kind}", "movie")]
    columns["genres"] = {"kind": "ids", "vocabulary": vocabulary}


def _add_users(folder: Path, users: Any, fields: dict[str, Any], columns: dict[str, Any]) -> None:
    """Adds gender, age and occupation of the users."""
    path = folder / "users.dat"
    numbers, rows = _listed(path, ("userId", *OF_USERS, "zip code"))
    places = _places(users, numbers, path, "ratings.dat", "user")
    for column, name in enumerate(OF_USERS, start=1):
        vocabulary, codes = np.unique([row[column] for row in rows], return_inverse=True)
        fields[name] = (codes + 1).astype(np.int32)[places]
        columns[name] = {"kind": "category", "vocabulary": vocabulary.tolist()}


def _listed(path: Path, names: Sequence[str]) -> tuple[Any, list[list[str]]]:
    """Returns the ids in the first column of a small file, (rows,), and the cells of its rows."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = [row for row in csv.reader(file) if row][1:]
    else:
        rows = list(numeric.rows_of(path, "::"))
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise numeric.wrong_row(path, number, row, names)
        if not FROM_ONE.reads(row[0]):
            raise numeric.wrong_cell(path, number, row[0], names[0], FROM_ONE.what)
    return np.array([int(row[0]) for row in rows], np.int64), rows


def _places(ids: Any, numbers: Any, path: Path, of: str, what: str) -> Any:
    """Returns for each id its row in a file that lists them.

    Raises:
        UserError: If the file doesn't list an id.
    """
    order = np.argsort(numbers)
    place = numeric.codes(ids, numbers[order])
    if not place.all():
        row = int(np.flatnonzero(place == 0)[0])
        raise UserError(f"data: row {row + 1} of {path.parent / of}: the {what} {ids[row]} isn't in {path.name}")
    return order[place - 1]
