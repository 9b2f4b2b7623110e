"""A synthetic click log: users see items, click on some, and buy some of the clicked items. All chances are known."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtl.data.fields import Fields, Splits
from mtl.errors import UserError

HOURS = 24
DEVICES = 4
TASTES = 2  # dimensions of users' tastes and items' traits
LEAST = {"num_samples": 10, "num_users": 1, "num_items": 1, "history": 0, "tags": 0}
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def made_ctr(
    *,
    num_samples: int = 200_000,
    num_users: int = 2_000,
    num_items: int = 500,
    history: int = 0,
    tags: int = 0,
    seed: int = 0,
) -> Splits:
    """Returns impressions with user, item, hour and device, (N,) int64 from 1 on, and three labels, (N,) float32.

    `click` is 0 or 1. `conversion` is 0 or 1 after a click, and NaN without a click, because it is unknown whether the
    user would have bought the item. `purchase` is 1 after a click with a conversion, and 0 for all other impressions,
    as models of chains of events need it. Click and conversion are drawn with the chances of a `Truth`. Users and items
    are drawn by Zipf's law: number k has a probability proportional to 1/k.

    With `history`, the field of this name has the items that the user clicked before, most recent last, and with `tags`
    that field has the tags of the item, which depend on the item's traits. Both are ids from 1 on, (N, number) int64,
    in which 0 stands for no id. They don't change the other fields.

    The fact `columns` has the number of categories of each input. The fact `best_auc` has, for each target, the
    expected AUC on the test split of a model that knows the true chances.

    Args:
        num_samples: The total number of samples; 80 % are for training, 10 % for validation, 10 % for test.
        num_users, num_items: The numbers of users and items; not all of them need occur.
        history: The largest number of items in the history of a sample; 0 for no such field.
        tags: The number of different tags of the items; 0 for no such field.
        seed: The seed of the true chances and of the samples.

    Raises:
        UserError: If one of the numbers is too small.
    """
    _check_numbers(num_samples=num_samples, num_users=num_users, num_items=num_items, history=history, tags=tags)
    generator = torch.Generator().manual_seed(seed)
    truth = Truth(num_users, num_items, generator)
    parts = {name: truth.draw(round(share * num_samples), generator) for name, share in SHARES.items()}
    test = parts["test"]
    click, conversion = truth.chances(test).values()
    sizes = {"user": num_users, "item": num_items, "hour": HOURS, "device": DEVICES}
    columns = {name: {"kind": "category", "size": size} for name, size in sizes.items()}
    if history:
        columns["history"] = {"kind": "ids", "size": num_items}
        _add_history(parts, history)
    if tags:
        columns["tags"] = {"kind": "ids", "size": tags}
        of_items = truth.tags(tags, torch.Generator().manual_seed(seed))  # a generator for them alone
        for fields in parts.values():
            fields["tags"] = of_items[fields["item"] - 1]
    facts = {
        "columns": columns,
        "best_auc": {
            "click": best_auc(click),
            "conversion": best_auc(conversion, click),
            "purchase": best_auc(click * conversion),
        },
    }
    name = f"simulated click log (data.seed={seed}) of {num_users:,} users on {num_items:,} items"
    data: dict[str, Any] = {split: Fields(fields) for split, fields in parts.items()}
    return Splits(**data, name=name, facts=facts)


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        least = LEAST[name]
        if type(value) is not int or value < least:
            raise UserError(f"data.{name} is {value!r}; it must be a whole number of at least {least}")


class Truth:
    """The true chances of a click and of a conversion, from the tastes of users and the traits of items.

    The log-odds of a click are −1.2 + openness_user + lure_item + hour + device + liking, with liking = tastes_user ·
    traits_item. The log-odds of a conversion after a click are −0.7 + means_user + appeal_item − lure_item / 2 +
    liking / 2: items that attract clicks sell less.

    Args:
        num_users, num_items: The numbers of users and items.
        generator: The random generator for all coefficients, which are normally distributed.
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
        """Returns the chance of a click, and the chance of a conversion given a click, (N,) each."""
        user, item, hour, device = (fields[name] - 1 for name in ("user", "item", "hour", "device"))
        liking = (self.tastes[user] * self.traits[item]).sum(1)
        lure, appeal = self.items[item].unbind(1)
        openness, means = self.users[user].unbind(1)
        click = -1.2 + openness + lure + self.hours[hour] + self.devices[device] + liking
        return {"click": click.sigmoid(), "conversion": (-0.7 + means + appeal - lure / 2 + liking / 2).sigmoid()}

    def tags(self, number: int, generator: torch.Generator) -> Tensor:
        """Draws tags, and returns the ids of each item's tags: (num_items, number) int64, 0 for tags it doesn't have.

        Each tag stands for a random direction of traits, and an item has it if its traits point in this direction.
        """
        has = self.traits @ torch.randn(TASTES, number, generator=generator) > 0
        return torch.arange(1, number + 1) * has

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws `count` samples and returns all fields, (count,) each."""

        def which(number: int) -> Tensor:
            return torch.randint(1, number + 1, (count,), generator=generator)

        fields = {"user": zipf(self.num_users, count, generator), "item": zipf(self.num_items, count, generator)}
        fields |= {"hour": which(HOURS), "device": which(DEVICES)}
        chances = self.chances(fields)
        click, conversion = (
            (torch.rand(count, generator=generator) < chances[name]).float() for name in ("click", "conversion")
        )
        labels = {"click": click, "conversion": conversion.masked_fill(click == 0, torch.nan)}
        return fields | labels | {"purchase": click * conversion}


def _add_history(parts: Mapping[str, dict[str, Tensor]], length: int) -> None:
    """Adds the last items that each user clicked before the impression, as the field `history`: (N, length) int64.

    The log begins with the training split, and validation and test follow.
    """
    latest: dict[int, deque[int]] = {}
    for fields in parts.values():
        rows = []
        log = zip(fields["user"].tolist(), fields["item"].tolist(), fields["click"].tolist(), strict=True)
        for user, item, click in log:
            clicked = latest.setdefault(user, deque(maxlen=length))
            rows.append([*clicked, *[0] * (length - len(clicked))])
            if click:
                clicked.append(item)
        fields["history"] = torch.tensor(rows)


def zipf(number: int, count: int, generator: torch.Generator) -> Tensor:
    """Draws `count` numbers from 1 to `number`, k with a probability proportional to 1/k: (count,) int64."""
    total = (1 / torch.arange(1, number + 1, dtype=torch.float64)).cumsum(0)
    draws = torch.rand(count, generator=generator, dtype=torch.float64) * total[-1]
    return torch.searchsorted(total, draws).clamp(max=number - 1) + 1


def best_auc(chance: Tensor, present: Tensor | None = None) -> float:
    """Returns the expected AUC of the true chances: Σ p_i (1 − p_j) over pairs with p_i > p_j, relative to all pairs.

    Args:
        chance: The chance of a positive label, (N,); ties count half.
        present: The chance that each label is present, (N,). Default: all labels are present.
    """
    chance, order = chance.double().sort()
    weight = torch.ones_like(chance) if present is None else present.double()[order]
    yes, no = weight * chance, weight * (1 - chance)
    below = no.cumsum(0) - no / 2
    return float((yes * below).sum() / (yes.sum() * no.sum()))
