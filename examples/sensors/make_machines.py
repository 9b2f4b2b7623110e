"""Writes machines.csv: machines whose risk of failing follows from their measurements."""

import csv
import math
import random
from pathlib import Path


def main() -> None:
    """Draws 600 machines, the same ones in every call."""
    draws = random.Random(0)
    with Path(__file__).with_name("machines.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "temperature", "vibration", "hours", "failed", "days"])
        for _ in range(600):
            model = draws.choice("ABC")
            temperature, vibration = draws.gauss(60, 10), draws.lognormvariate(0.5, 0.5)
            hours = draws.randint(0, 10_000)
            risk = 0.08 * (temperature - 60) + 1.5 * (vibration - 2) + hours / 4000 + (model == "C")
            failed = risk + draws.gauss(0, 0.5) > 1
            days = round(max(1.0, 365 * math.exp(-0.3 * risk) * draws.uniform(0.9, 1.1)))
            label = "" if draws.random() < 0.1 else "yes" if failed else "no"
            cells = [f"{temperature:.1f}", f"{vibration:.2f}", hours, label, days if failed else ""]
            writer.writerow([model, *cells])


if __name__ == "__main__":
    main()
