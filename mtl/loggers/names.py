"""Tags under the names that a logger's store takes."""

from collections.abc import Callable, Collection, Mapping


class Names:
    """Gives each tag a name of its own.

    Two tags that would have the same one are told apart by a number, in the order in which they come.

    Args:
        clean: gives for a tag the name that the store takes.
        longest: letters of a name.
        taken: names that the logger uses itself.
    """

    def __init__(self, clean: Callable[[str], str], *, longest: int, taken: Collection[str] = ()) -> None:
        self._clean = clean
        self._longest = longest
        self._taken = set(taken)
        self._names: dict[str, str] = {}

    def __getitem__(self, tag: str) -> str:
        if tag not in self._names:
            plain = name = self._clean(tag)
            if len(plain) > self._longest:
                plain = name = plain[: self._longest].rstrip("/.")
            number = 1
            while name in self._taken:
                number += 1
                name = f"{plain[: self._longest - len(f'-{number}')]}-{number}"
            self._names[tag] = name
            self._taken.add(name)
        return self._names[tag]

    def state_dict(self) -> dict[str, str]:
        """The names that differ from their tags."""
        return {tag: name for tag, name in self._names.items() if tag != name}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Goes on with the names of that state."""
        self._names = dict(state)
        self._taken |= set(state.values())
