"""A made click log: users are shown items, some click, and some of those who clicked buy. The truth is known."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.data.fields import Fields, Splits
from mtl.errors import UserError

HOURS = 24
DEVICES = 4
TASTES = 2  # dimensions of what a user likes and an item has
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def made_ctr(*, num_samples: int = 200_000, num_users: int = 2_000, num_items: int = 500, seed: int = 0) -> Splits:
    """Impressions with the fields user, item, hour, device, (N,) int64 from 1 on; click, conversion, (N,) float32.

    `click` is 0 or 1, `conversion` too, but NaN where there was no click: whether one would have bought isn't known.
    Both are drawn with the chances of a `Truth`; users and items by Zipf's law, number k in proportion to 1/k.

    The fact `columns` says how many categories each input has, and `best_auc` by target what a model that knew the
    truth would reach, expected, on the test split.

    Args:
        num_samples: of all splits together: 0.8 for training, 0.1 for validation, 0.1 for test.
        num_users, num_items: how many there are; not all need occur.
        seed: of the truth and of the samples.

    Raises:
        UserError: for too few of any.
    """
    given = {"num_samples": (num_samples, 10), "num_users": (num_users, 1), "num_items": (num_items, 1)}
    for name, (value, least) in given.items():
        if type(value) is not int or value < least:
            raise UserError(f"data.{name} is {value!r}; it must be a whole number of at least {least}")
    generator = torch.Generator().manual_seed(seed)
    truth = Truth(num_users, num_items, generator)
    parts = {name: truth.draw(round(share * num_samples), generator) for name, share in SHARES.items()}
    test = parts["test"]
    click, conversion = truth.chances(test).values()
    sizes = {"user": num_users, "item": num_items, "hour": HOURS, "device": DEVICES}
    facts = {
        "columns": {name: {"kind": "category", "size": size} for name, size in sizes.items()},
        "best_auc": {"click": best_auc(click), "conversion": best_auc(conversion, click)},
    }
    name = f"made clicks (data.seed={seed}) of {num_users:,} users on {num_items:,} items"
    return Splits(**{split: Fields(fields) for split, fields in parts.items()}, name=name, facts=facts, warnings=())


class Truth:
    """What each user likes and each item has, and with what chance a click and a purchase come of it.

    The log-odds of a click are −1.2 + openness_user + lure_item + hour + device + liking, with liking = tastes_user ·
    traits_item; those of a purchase after it −0.7 + means_user + appeal_item − lure_item / 2 + liking / 2: what lures
    sells less.

    Args:
        num_users, num_items: how many there are.
        generator: of all these numbers, normally distributed.
    """

    def __init__(self, num_users: int, num_items: int, generator: torch.Generator) -> None:
        def normal(*shape: int, std: float) -> Tensor:
            return std * torch.randn(shape, generator=generator)

        self.num_users, self.num_items = num_users, num_items
        self.users = normal(num_users, 2, std=0.5)  # openness, means
        self.items = normal(num_items, 2, std=0.8)  # lure, appeal
        self.hours, self.devices = normal(HOURS, std=0.3), normal(DEVICES, std=0.3)
        self.tastes, self.traits = normal(num_users, TASTES, std=0.7), normal(num_items, TASTES, std=0.7)

    def chances(self, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a click, and of a conversion if there was one, (N,) each."""
        user, item, hour, device = (fields[name] - 1 for name in ("user", "item", "hour", "device"))
        liking = (self.tastes[user] * self.traits[item]).sum(1)
        lure, appeal = self.items[item].unbind(1)
        openness, means = self.users[user].unbind(1)
        click = -1.2 + openness + lure + self.hours[hour] + self.devices[device] + liking
        return {"click": click.sigmoid(), "conversion": (-0.7 + means + appeal - lure / 2 + liking / 2).sigmoid()}

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """So many samples: all fields, (count,) each."""

        def which(number: int) -> Tensor:
            return torch.randint(1, number + 1, (count,), generator=generator)

        fields = {"user": zipf(self.num_users, count, generator), "item": zipf(self.num_items, count, generator)}
        fields |= {"hour": which(HOURS), "device": which(DEVICES)}
        chances = self.chances(fields)
        click, conversion = (
            (torch.rand(count, generator=generator) < chances[name]).float() for name in ("click", "conversion")
        )
        return fields | {"click": click, "conversion": conversion.masked_fill(click == 0, torch.nan)}


def zipf(number: int, count: int, generator: torch.Generator) -> Tensor:
    """So many draws of 1 … number, k with a chance in proportion to 1/k: (count,) int64."""
    total = (1 / torch.arange(1, number + 1, dtype=torch.float64)).cumsum(0)
    draws = torch.rand(count, generator=generator, dtype=torch.float64) * total[-1]
    return torch.searchsorted(total, draws).clamp(max=number - 1) + 1


def best_auc(chance: Tensor, there: Tensor | None = None) -> float:
    """The AUC of the true chances, expected: Σ p_i (1 − p_j) over the pairs with p_i > p_j, over that of all pairs.

    Args:
        chance: of a yes, (N,); ties count half.
        there: the chance with which each label is there, (N,).
    """
    chance, order = chance.double().sort()
    weight = torch.ones_like(chance) if there is None else there.double()[order]
    yes, no = weight * chance, weight * (1 - chance)
    below = no.cumsum(0) - no / 2
    return float((yes * below).sum() / (yes.sum() * no.sum()))
