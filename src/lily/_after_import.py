"""Run a function once PEFT is imported, so that `import lily` need not import it.

PEFT brings transformers and torch, which take seconds; `lily --help` and the checks of a recipe need none of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PEFT = "peft"
# Its models load adapters by a method that imports PEFT only when it runs. PEFT must not be imported before: it imports
# models of transformers, which may be what is being imported.
TRANSFORMERS = "transformers.integrations.peft"


def after_peft(act: Callable[[], None]) -> None:
    """Call `act` when PEFT has been imported, or before transformers loads an adapter; at once if PEFT is there."""
    if _is_imported(PEFT):
        act()
        return
    finder = _Finder(act)
    sys.meta_path.insert(0, finder)
    if _is_imported(TRANSFORMERS):
        finder.done(TRANSFORMERS)


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _Finder(MetaPathFinder):
    """Finds the watched modules where they are, with a loader that tells when one has run."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act
        self.restore: Callable[[], None] | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (PEFT, TRANSFORMERS):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def done(self, name: str) -> None:
        """A watched module has been imported."""
        if self not in sys.meta_path:
            return
        if name == PEFT:
            sys.meta_path.remove(self)
            if self.restore is not None:
                self.restore()
            self.act()
        elif self.restore is None:
            self.restore = _import_peft_first(sys.modules[TRANSFORMERS].PeftAdapterMixin)


def _import_peft_first(mixin: Any) -> Callable[[], None]:
    """Let transformers' `load_adapter` import PEFT before it runs; returns what undoes that."""
    stock = mixin.load_adapter

    @functools.wraps(stock)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(ImportError):  # stock says what is missing
            importlib.import_module(PEFT)
        # PEFT's import has replaced this function, unless it failed
        now = mixin.load_adapter if mixin.load_adapter is not load_adapter else stock
        return now(self, *args, **kwargs)

    def restore() -> None:
        if mixin.load_adapter is load_adapter:
            mixin.load_adapter = stock

    mixin.load_adapter = load_adapter
    return restore


class _Loader(Loader):
    """The module's loader, which tells the finder when the module has run."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.finder.done(module.__name__)
