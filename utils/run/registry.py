"""Names in the experiment file -> classes or functions. A new method is one new file with one decorator."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import reprlib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from utils.run.errors import ConfigError

T = TypeVar("T")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
shown = _REPR.repr  # of any value, cut to a length that a message can hold


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint such as `; did you mean 'icarl'?`, or an empty string if nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """Things of one kind by name; the modules of a package are imported when a name is first asked for.

    Args:
        kind: what is registered, for error messages: "learner", "source", ...
        key: of the experiment file, whose value is such a name.
        package: the package whose modules register things, by its import name.
    """

    def __init__(self, kind: str, key: str, package: str):
        self.kind, self.key, self.package, self._is_loaded = kind, key, package, False
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Make the decorated class or function known under this name. A name taken twice is our own mistake."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        """List all registered names, sorted."""
        return sorted(self._load())

    def __contains__(self, name: str) -> bool:
        return name in self._load()

    def __getitem__(self, name: str) -> T:
        """Return the entry of this name.

        Raises:
            ConfigError: if nothing has this name; the message holds the nearest name and all of them.
        """
        entries = self._load()
        if name not in entries:
            hint, known = nearest(name, entries) or ".", ", ".join(sorted(entries))
            raise ConfigError(f"{self.key}: unknown {self.kind} {shown(name)}{hint} Known: {known}")
        return entries[name]

    def _load(self) -> dict[str, T]:
        if not self._is_loaded:  # to look again takes half a millisecond, and names are asked for by the hundred
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._is_loaded = True
        return self._entries
