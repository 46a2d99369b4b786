"""Run a callback right after a module of another package has been imported, without importing it ourselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_import(name: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` when ``name`` has been imported: now if it is, else when somebody does."""
    module = sys.modules.get(name)
    # A module that is still executing is in sys.modules too; its spec says so.
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback()
    else:
        sys.meta_path.insert(0, _Finder(name, callback))


class _Finder(MetaPathFinder):
    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self._name, self._callback = name, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for f in others if (found := f.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._done)
        return spec

    def _done(self) -> None:
        # Not before the module has run: finding is not importing, and a failed import may be tried again.
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._callback()


class _Loader(Loader):
    def __init__(self, inner: Loader, callback: Callable[[], None]) -> None:
        self._inner, self._callback = inner, callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must look as if we had not been there (inspect and pickling of classes read __loader__).
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        self._callback()
