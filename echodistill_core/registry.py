"""Registries: read-only mappings from name to part (backbone, loss term, baseline, ...), extended by `register`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Generic, TypeVar

from .errors import InputError
from .messages import quoted

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping from name to part, in order of registration, to which `register` adds parts.

    kind: noun for a part in error messages, for example "backbone". entries: the initial parts.
    pattern: regular expression that a new name must match as a whole. reserved: names that are refused.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, T] | None = None,
        *,
        pattern: str = ".+",
        reserved: Collection[str] = (),
    ) -> None:
        self.kind = kind
        self._pattern, self._reserved = pattern, frozenset(reserved)
        self._entries: dict[str, T] = dict(entries or {})

    def register(self, name: str, part: T) -> T:
        """Add a part under a name and return it. Raises InputError if the name is taken, reserved or malformed."""
        found = ""
        if name in self._entries:
            found = "is taken"
        elif name in self._reserved:
            found = "is reserved"
        elif not re.fullmatch(self._pattern, name):
            found = f"does not match {self._pattern}"
        if found:
            raise InputError(f"the {self.kind} name {quoted(name)} {found}; register the {self.kind} by another name.")
        self._entries[name] = part
        return part

    def unregister(self, name: str) -> None:
        """Remove a part, so that its name can be registered again. Raises KeyError if no part has this name."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
