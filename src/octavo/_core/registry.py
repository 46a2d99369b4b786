"""Name -> object tables filled by one decorator, so that a new algorithm, kernel or format is one new file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

from octavo._core.errors import UsageError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named objects of one kind, filled by importing the modules of ``package``.

    The modules are imported at the first look-up, so that ``import octavo`` stays cheap.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._table: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the object under ``name``; a name may be taken once."""

        def add(obj: T) -> T:
            if name in self._table:
                raise ValueError(f"octavo bug: {self.kind} {name!r} is registered twice")
            self._table[name] = obj
            return obj

        return add

    def _load(self) -> None:
        if not self._loaded:
            for module in iter_modules(import_module(self._package).__path__):
                if not module.name.startswith("_"):
                    import_module(f"{self._package}.{module.name}")
            self._loaded = True

    def get(self, name: str) -> T:
        """Return the object called ``name``.

        Raises:
            UsageError: nothing of that name is registered; the message lists what is.
        """
        self._load()
        if name not in self._table:
            raise UsageError(
                f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._table))}."
                + did_you_mean(name, self._table)
            )
        return self._table[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._table)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
