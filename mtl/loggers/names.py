"""Maps tags to unique names that a logger's backend accepts."""

from collections.abc import Callable, Collection, Mapping


class Names:
    """Gives each tag a unique name.

    Tags that would have the same name get a number, in order of first use.

    Args:
        clean: A function from a tag to a name that the backend accepts.
        longest: The maximal length of a name.
        taken: Names that the logger itself uses.
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
        """Returns the names that differ from their tags."""
        return {tag: name for tag, name in self._names.items() if tag != name}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Restores the names in the state."""
        self._names = dict(state)
        self._taken |= set(state.values())
