"""MovieLens: the fields of small files in both of its layouts, histories and splits by hand, and the problem as a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import command

import mtl
from mtl.data import movielens

MOVIES = {10: "Animation|Children's|Comedy", 2571: "Sci-Fi", 30: "", 300: "Comedy|Sci-Fi"}
USERS = {1: ("F", 1, 10), 2: ("M", 56, 16), 7: ("M", 25, 0)}
RATINGS = [  # user, movie, rating, time
    (1, 10, 5, 100),
    (1, 2571, 4, 200),
    (1, 30, 3, 300),
    (1, 300, 5, 400),
    (2, 30, 4, 150),
    (2, 10, 2, 150),
    (2, 300, 5, 350),
    (7, 2571, 4, 500),
    (7, 10, 1, 600),
    (1, 10, 4, 700),
]


def dat(folder: Path, ratings: Any = RATINGS) -> str:
    """Writes the files of ml-1m."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{number}::L'été: 2001 ({number})::{genres}" for number, genres in MOVIES.items()]
    (folder / "movies.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    lines = [f"{user}::{gender}::{age}::{work}::48067" for user, (gender, age, work) in USERS.items()]
    (folder / "users.dat").write_text("\n".join(lines) + "\n")
    (folder / "ratings.dat").write_text("".join("::".join(map(str, rating)) + "\n" for rating in ratings))
    return str(folder)


def newer(folder: Path, ratings: Any = RATINGS) -> str:
    """Writes the files of ml-25m and ml-latest, with quoted titles and half stars."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f'{n},"Été, l\'"" (2001)",{genres or "(no genres listed)"}' for n, genres in MOVIES.items()]
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "\n".join(rows) + "\n", encoding="utf-8")
    rows = [f"{user},{movie},{rating:.1f},{time}" for user, movie, rating, time in ratings]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows) + "\n")
    return str(folder)


def raw(splits: mtl.data.Splits) -> dict[str, list[dict[str, Any]]]:
    """Returns the samples of each split with the ids and genres of the files; None for unknown ones."""
    columns = splits.facts["columns"]

    def of_file(name: str, code: int) -> str | None:
        if not code or "size" in columns[name]:
            return str(code) if code else None
        return columns[name]["vocabulary"][code - 1]

    listed: dict[str, list[dict[str, Any]]] = {}
    for split, data in splits.items():
        listed[split] = []
        for index in range(len(data)):
            sample = {name: value.tolist() for name, value in data[index].items()}
            for name in columns:
                value = sample[name]
                sample[name] = [of_file(name, v) for v in value] if isinstance(value, list) else of_file(name, value)
            listed[split].append(sample)
    return listed


@pytest.mark.parametrize("write", [dat, newer])
def test_fields_by_hand(tmp_path: Path, write: Callable[..., str]) -> None:
    splits = movielens(root=write(tmp_path), history=2, split=(0.8, 0, 0.2))
    columns = splits.facts["columns"]
    assert columns["genres"] == {"kind": "ids", "vocabulary": ["Animation", "Children's", "Comedy", "Sci-Fi"]}
    assert columns["user"] == {"kind": "category", "size": 7}
    assert columns["movie"] == {"kind": "category", "size": 2571}
    assert columns["history"] == {"kind": "ids", "size": 2571}
    if write is dat:
        assert columns["age"] == {"kind": "category", "vocabulary": ["1", "25", "56"]}
    listed = raw(splits)
    assert [len(listed[split]) for split in ("train", "test")] == [8, 2]
    inputs = ["genres", *(["gender", "age", "occupation"] if write is dat else []), "user", "movie", "history"]
    assert list(listed["train"][0]) == [*inputs, "user_id", "rating", "like"]
    by_time = {(s["user"], s["movie"], s["rating"]): s for s in [*listed["train"], *listed["test"]]}
    last = by_time["1", "10", 4.0]
    assert last["history"] == ["2571", "300"]  # 10 was liked earlier than the two, and 30 was not liked
    assert last["genres"] == ["Animation", "Children's", "Comedy"]
    assert by_time["1", "300", 5.0]["history"] == ["10", "2571"]
    assert by_time["1", "2571", 4.0]["history"] == ["10", None]
    assert by_time["2", "10", 2.0]["history"] == [None, None]  # 30 was rated in the same second
    assert by_time["2", "300", 5.0]["history"] == ["30", None]
    assert by_time["1", "30", 3.0]["genres"] == [None] * 3
    assert (by_time["1", "30", 3.0]["like"], by_time["1", "2571", 4.0]["like"]) == (0, 1)
    if write is dat:
        assert [by_time["7", "2571", 4.0][name] for name in ("gender", "age", "occupation")] == ["M", "25", "0"]
    assert {(s["user"], s["rating"]) for s in listed["test"]} == {("7", 1.0), ("1", 4.0)}  # the last two of all
    assert {value.dtype for value in splits.train[0].values()} == {torch.int32, torch.float32}


def test_users_that_are_new_in_a_later_split(tmp_path: Path) -> None:
    listed = raw(movielens(root=dat(tmp_path), split=(0.6, 0.1, 0.3)))
    assert [(s["user"], s["movie"]) for s in listed["test"]] == [("1", "10"), (None, "2571"), (None, "10")]
    assert [s["user_id"] for s in listed["test"]] == [1, 7, 7]


def test_each_users_last_ratings(tmp_path: Path) -> None:
    listed = raw(movielens(root=dat(tmp_path), split=(0.5, 0.25, 0.25), by="user"))
    assert [(s["user"], s["movie"]) for s in listed["train"]] == [
        *(("1", "10"), ("1", "2571"), ("1", "30")),
        *(("2", "30"), ("2", "10")),
        ("7", "2571"),
    ]
    assert [(s["user"], s["movie"]) for s in listed["val"]] == [("1", None), ("2", None), ("7", "10")]
    assert [(s["user"], s["movie"]) for s in listed["test"]] == [("1", "10")]


@pytest.mark.parametrize("by", ["time", "user"])
@pytest.mark.parametrize("history", [1, 3, 50])
def test_no_future_in_any_history(tmp_path: Path, by: str, history: int) -> None:
    """All histories of random ratings, with many ties, against a loop over the ratings."""
    draws = np.random.default_rng(history)
    pairs = draws.permutation(40 * 30)[:500]  # a user rates a movie once, so that a sample is known by both
    ratings = [
        (int(pair // 30) + 1, int(pair % 30 + 1) * 7, int(stars), int(time))
        for pair, stars, time in zip(pairs, draws.integers(1, 6, 500), draws.integers(0, 90, 500), strict=True)
    ]
    global MOVIES
    genres, MOVIES = MOVIES, {7 * number: "Drama" for number in range(1, 31)}
    try:
        splits = movielens(root=newer(tmp_path, ratings), history=history, split=(0.6, 0.2, 0.2), by=by)
    finally:
        MOVIES = genres
    listed = raw(splits)
    assert sum(map(len, listed.values())) == 500
    at = {(user, movie): time for user, movie, _, time in ratings}
    known = {name: {sample[name] for sample in listed["train"]} for name in ("user", "movie")}
    checked = 0
    for samples in listed.values():
        for sample in samples:
            if sample["user"] is None or sample["movie"] is None:
                continue
            user, now = int(sample["user"]), at[int(sample["user"]), int(sample["movie"])]
            liked = sorted(
                (time, movie) for u, movie, stars, time in ratings if u == user and stars >= 4 and time < now
            )
            times = [time for time, _ in liked[-history:]]
            mine = [movie for movie in sample["history"] if movie is not None]
            expected = [str(movie) for _, movie in liked[-history:] if str(movie) in known["movie"]]
            if len(set(times)) == len(times) and (len(liked) <= history or liked[-history - 1][0] < times[0]):
                assert mine == expected  # without ties the order is known
                checked += 1
            assert all(at[user, int(movie)] < now for movie in mine)
            assert len(sample["history"]) == history
    assert checked > 200
    last = {}
    for split, samples in listed.items():
        times = [at[int(s["user"]), int(s["movie"])] for s in samples if s["user"] and s["movie"]]
        last[split] = (min(times), max(times))
    if by == "time":
        assert last["train"][1] < last["val"][0]
        assert last["val"][1] < last["test"][0]
    else:
        for user in known["user"]:
            of_user = [
                [at[int(user), int(s["movie"])] for s in listed[split] if s["user"] == user and s["movie"]]
                for split in ("train", "val", "test")
            ]
            present = [times for times in of_user if times]
            assert all(max(a) < min(b) for a, b in zip(present, present[1:], strict=False))


DAMAGED = [
    ("ratings", "1::10::x::5", "row 11 of {file} has 'x' in the column 'rating'; it must be a rating above 0"),
    ("ratings", "1::10::6::5", "row 11 of {file} has '6' in the column 'rating'; it must be a rating above 0"),
    ("ratings", "1::10::0::5", "row 11 of {file} has '0' in the column 'rating'; it must be a rating above 0"),
    ("ratings", "1::10::4", "row 11 of {file} has 3 values; it must have 4: userId, movieId, rating, timestamp"),
    ("ratings", "1::10::4::5::6", "row 11 of {file} has 5 values; it must have 4"),
    ("ratings", "1:2:10::4::5", "row 11 of {file} has 3 values; it must have 4"),
    ("ratings", "1.5::10::4::5", "row 11 of {file} has '1.5' in the column 'userId'; it must be a whole number"),
    ("ratings", "1::11::4::5", "row 11 of {file}: the movie 11 isn't in movies.dat"),
    ("ratings", "3::10::4::5", "row 11 of {file}: the user 3 isn't in users.dat"),
    ("movies", "12::A", "row 5 of {file} has 2 values; it must have 3: movieId, title, genres"),
    ("movies", "x::A::Drama", "row 5 of {file} has 'x' in the column 'movieId'; it must be a whole number"),
    ("users", "9::F::1", "row 4 of {file} has 3 values; it must have 5: userId, gender, age, occupation, zip code"),
]


@pytest.mark.parametrize(("name", "row", "message"), DAMAGED)
def test_a_damaged_row_is_named(tmp_path: Path, name: str, row: str, message: str) -> None:
    dat(tmp_path)
    file = tmp_path / f"{name}.dat"
    file.write_text(file.read_text(encoding="latin-1") + row + "\n", encoding="latin-1")
    with pytest.raises(mtl.UserError) as raised:
        movielens(root=str(tmp_path))
    assert message.format(file=file) in str(raised.value)


def test_files_that_are_missing_or_have_other_columns(tmp_path: Path) -> None:
    with pytest.raises(
        mtl.UserError, match=r"must contain ratings\.dat and .*https://grouplens\.org/datasets/movielens"
    ):
        movielens(root=str(tmp_path))
    newer(tmp_path)
    file = tmp_path / "ratings.csv"
    file.write_text(file.read_text().replace("rating,", "stars,"))
    with pytest.raises(
        mtl.UserError, match=r"is userId,movieId,stars,timestamp; it must be userId,movieId,rating,time"
    ):
        movielens(root=str(tmp_path))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"history": -1}, "data.history is -1; it must be a whole number of at least 0"),
        ({"like": 9}, "data.like is 9; it must be a rating above 0, of at most 5"),
        ({"by": "movie"}, "data.by is 'movie'; it must be one of time, user"),
        ({"split": [0.5, 0.4]}, r"data.split is \[0.5, 0.4\]; it must be three shares that sum to 1"),
        ({"split": [0.94, 0.05, 0.01]}, "data.split: 0.05 of 10 ratings leaves none for val"),
    ],
)
def test_arguments_that_cannot_be(tmp_path: Path, argument: dict[str, Any], message: str) -> None:
    with pytest.raises(mtl.UserError, match=message):
        movielens(root=dat(tmp_path), **argument)


def test_without_a_history(tmp_path: Path) -> None:
    splits = movielens(root=dat(tmp_path), history=0)
    assert "history" not in splits.train[0]
    assert "history" not in splits.facts["columns"]


@pytest.mark.parametrize(
    "arguments",
    [["model.inputs=[user,movie,genres,history,gender,age,occupation]"], ["balancer=upgrad", "data.by=user"]],
)
def test_the_problem_trains(here: Path, arguments: list[str]) -> None:
    draws = np.random.default_rng(0)
    user, movie = draws.choice([1, 2, 7], 1500), draws.choice(list(MOVIES), 1500)
    stars = np.where((user == 1) == (movie > 100), 5, 1)  # what users like depends on user and movie
    dat(here / "data" / "ml-1m", zip(user, movie, stars, range(1500), strict=True))
    ended = command("train", "task=movielens", "data.batch_size=50", "trainer.max_epochs=5", "logger=[]", *arguments)
    assert ended.code == 0, ended.err
    assert ended.metrics["test"]["rating"]["rmse"] < 1  # the standard deviation is 2
    assert ended.metrics["test"]["like"]["auc"] > 0.95
    assert set(ended.metrics["test"]["like"]) == {"auc", "gauc", "loss"}
    model = mtl.load(ended.run)
    splits = movielens(root="data/ml-1m", by="user" if "data.by=user" in arguments else "time")
    of_file = {name: [sample[name] for sample in raw(splits)["test"][:20]] for name in model.inputs}
    encoded = {name: splits.test.fields[name][:20] for name in model.inputs}
    assert torch.equal(model(of_file)["rating"], model(encoded)["rating"])
