"""A command line as flags with their values, which can be read and changed without the script's parser."""

from collections.abc import Iterable, Sequence


class Words:
    """Flags in their original order, each with its values; the last of several with the same name counts.

    Args:
        words: the command line after the script; "--flag=value" is split.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._items: list[tuple[str, list[str]]] = [("", [])]  # the first item holds the words before any flag
        for word in words:
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                self._items.append((flag, [value] if equals else []))
            else:
                self._items[-1][1].append(word)

    def __contains__(self, flag: str) -> bool:
        return any(name == flag for name, _ in self._items)

    def flags(self) -> list[str]:
        return [name for name, _ in self._items if name]

    def values(self, flag: str) -> list[str] | None:
        """The values of a flag, an empty list for a switch, None if it is not given."""
        found = [values for name, values in self._items if name == flag]
        return found[-1] if found else None

    def text(self, flag: str, default: str = "") -> str:
        values = self.values(flag)
        return " ".join(values) if values else default

    def number(self, flag: str, default: int) -> int:
        """The value of a flag as an int; raises ValueError if it is not a whole number."""
        value = self.text(flag)
        if not value:
            return default
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{flag} {value} is not a whole number; correct the command.") from None

    def set(self, flag: str, *values: object) -> None:
        """Set a flag to these values, in its last place or at the end."""
        item = (flag, [str(value) for value in values])
        places = [place for place, (name, _) in enumerate(self._items) if name == flag]
        if places:
            self._items[places[-1]] = item
            self._items = [each for place, each in enumerate(self._items) if place not in places[:-1]]
        else:
            self._items.append(item)

    def replace(self, flag: str, *values: object) -> None:
        """Set a flag that is given to these values."""
        if flag in self:
            self.set(flag, *values)

    def drop(self, flags: Iterable[str]) -> list[str]:
        """Remove these flags; returns those that were given."""
        unwanted = set(flags)
        found = [name for name in dict.fromkeys(self.flags()) if name in unwanted]
        self._items = [(name, values) for name, values in self._items if name not in unwanted]
        return found

    def copy(self) -> "Words":
        return Words(self.line())

    def line(self) -> list[str]:
        return [word for name, values in self._items for word in ([name] if name else []) + values]
