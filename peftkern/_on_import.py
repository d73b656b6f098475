"""Run something when another module is imported, at once if it has been: integration without the cost of importing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_import(name: str, then: Callable[[], None]) -> None:
    """Call ``then`` after the module ``name`` has been imported, in whichever order things are imported."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watcher(name, then))


class _Watcher(MetaPathFinder):
    """Finds nothing itself: it asks the other finders, once, and puts ``then`` behind the module's execution."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


class _Loader(Loader):
    def __init__(self, genuine: Loader, then: Callable[[], None]) -> None:
        self.genuine, self.then = genuine, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.genuine.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.genuine  # the module never sees that it was watched
        self.genuine.exec_module(module)
        self.then()
