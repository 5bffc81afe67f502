"""A table of named parts that other modules may add to: backbones, loss terms, baselines, suites, families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from .errors import InputError
from .messages import quoted

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping from name to part that grows by `register` alone.

    kind: the parts' noun in error messages, for example "backbone". entries: the parts that the package ships.
    """

    def __init__(self, kind: str, entries: Mapping[str, T] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T] = dict(entries or {})

    def register(self, name: str, part: T) -> T:
        """Add a part and return it. Raises InputError where the name is taken or empty."""
        if not name or name in self._entries:
            found = "is taken" if name else "is empty"
            raise InputError(f"the {self.kind} name {quoted(name)} {found}; register the {self.kind} by another name.")
        self._entries[name] = part
        return part

    def unregister(self, name: str) -> None:
        """Remove a part that `register` added. Raises KeyError where no part has the name."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
