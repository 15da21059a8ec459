"""Act once a library is imported, so that `import lily` need not import it.

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

# Functions of diffusers that remove adapters from the model which is their first argument.
REMOVING = ("recurse_remove_peft_layers", "delete_adapter_layers")
# Called with that model afterwards; `lily.tuner.removal` is there once a model can have a Lily adapter.
after_removal: list[Callable[[Any], None]] = []


def after_import(name: str, act: Callable[[], None]) -> None:
    """Call `act` when the module has been imported; at once if it has been already."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        act()
    else:
        sys.meta_path.insert(0, _Finder(name, act))


def watch(register: Callable[[], None]) -> None:
    """Call `register` after PEFT's import, and let transformers and diffusers find Lily without importing it here."""
    after_import("peft", register)
    after_import("transformers.integrations.peft", _import_peft_before_loading)
    after_import("diffusers.utils.peft_utils", _remove_after_diffusers)


def _import_peft_before_loading() -> None:
    """Let transformers' `load_adapter` import PEFT before it runs, so that it is replaced.

    PEFT must not be imported earlier: it imports models of transformers, which may be what is being imported now.
    """
    mixin = sys.modules["transformers.integrations.peft"].PeftAdapterMixin
    stock = mixin.load_adapter

    @functools.wraps(stock)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(ImportError):  # stock says what is missing
            importlib.import_module("peft")
        now = mixin.load_adapter if mixin.load_adapter is not load_adapter else stock
        return now(self, *args, **kwargs)

    if not hasattr(stock, "lily_stock"):
        load_adapter.lily_stock = stock  # type: ignore[attr-defined]
        mixin.load_adapter = load_adapter


def _remove_after_diffusers() -> None:
    """After diffusers has taken adapters out of a model, take out what it does not know."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "diffusers"]
    for name in REMOVING:
        stock = getattr(sys.modules["diffusers.utils.peft_utils"], name)
        if not hasattr(stock, "lily_stock"):
            ours = _removing(stock)
            for module in modules:  # they import it from one another
                if vars(module).get(name) is stock:
                    setattr(module, name, ours)


def _removing(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def removing(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(model, *args, **kwargs)
        for act in after_removal:
            act(model)
        return result

    removing.lily_stock = stock  # type: ignore[attr-defined]
    return removing


class _Finder(MetaPathFinder):
    """Finds one module where it is, with a loader that calls `act` after it has run."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def done(self) -> None:
        """Act once."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self.act()


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
        self.finder.done()
