"""Writes small made data sets in the layouts of MovieLens 1M and of Ali-CCP.

python scripts/make_recommender.py data/ml-1m
python scripts/make_recommender.py data/ali-ccp --kind aliccp
"""

import argparse
from pathlib import Path

import numpy as np

import mtl

GENRES = ("Action", "Children's", "Comedy", "Drama", "Film-Noir", "Sci-Fi")
IDS = (
    *("101", "121", "122", "124", "125", "126", "127", "128", "129", "205", "206", "207", "210", "216", "508", "509"),
    *("702", "853", "301", "109_14", "110_14", "127_14", "150_14"),
)
NUMBERS = ("D109_14", "D110_14", "D127_14", "D150_14", "D508", "D509", "D702", "D853")
OF_ITEMS = ("205", "206", "207", "210", "216")


def write_movielens(folder: Path, ratings: int, seed: int) -> None:
    """Writes ratings.dat, movies.dat and users.dat: users like movies of some genres, and rate in order of time."""
    draws = np.random.default_rng(seed)
    users, movies = 60, 80
    genres = draws.random((movies, len(GENRES))) < 0.3
    tastes = draws.normal(size=(users, len(GENRES)))
    names = ["|".join(np.array(GENRES)[has]) or "Drama" for has in genres]
    lines = [f"{movie}::Film: Part {movie} ({1950 + movie % 50})::{names[movie - 1]}" for movie in range(1, movies + 1)]
    (folder / "movies.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    of_users = zip(draws.choice(["F", "M"], users), draws.choice([1, 18, 25, 35, 45, 50, 56], users), strict=True)
    lines = [
        f"{user}::{gender}::{age}::{draws.integers(0, 21)}::{draws.integers(10000, 99999)}"
        for user, (gender, age) in enumerate(of_users, start=1)
    ]
    (folder / "users.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    user, movie = draws.integers(0, users, ratings), draws.integers(0, movies, ratings)
    liking = (tastes[user] * genres[movie]).sum(1) / 2 + draws.normal(0, 0.5, ratings)
    stars = np.clip(np.round(3.5 + liking), 1, 5).astype(int)
    time = 956703932 + np.sort(draws.integers(0, 10**6, ratings))
    lines = [f"{u + 1}::{m + 1}::{r}::{t}" for u, m, r, t in zip(user, movie, stars, time, strict=True)]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")


def write_aliccp(folder: Path, rows: int, seed: int) -> None:
    """Writes ali_ccp_train.csv, ali_ccp_val.csv and ali_ccp_test.csv from the simulated click log of `mtl`."""
    draws = np.random.default_rng(seed)
    for split, log in mtl.data.made_ctr(num_samples=rows, num_users=80, num_items=50, seed=seed).items():
        fields = {name: values.numpy() for name, values in log.fields.items()}
        columns = [fields["click"].astype(int).astype(str), fields["purchase"].astype(int).astype(str)]
        for place, name in enumerate(IDS):
            source = fields["item" if name in OF_ITEMS else "hour" if name == "301" else "user"]
            columns.append((source if place in (0, 9) else source % (place + 3)).astype(str))
        columns += [np.round(draws.random(len(log)), 4).astype(str) for _ in NUMBERS]
        lines = [",".join(("click", "purchase", *IDS, *NUMBERS)), *map(",".join, zip(*columns, strict=True))]
        (folder / f"ali_ccp_{split}.csv").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Writes the files that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["movielens", "aliccp"], default="movielens")
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write = write_movielens if options.kind == "movielens" else write_aliccp
    write(options.folder, options.rows, options.seed)


if __name__ == "__main__":
    main()
