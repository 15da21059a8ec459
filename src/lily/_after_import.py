"""Run a function once PEFT is imported, so that `import lily` need not import it.

PEFT brings transformers and torch, which take seconds; `lily --help` and the checks of a recipe need none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# transformers' models load adapters by functions that are replaced too, and import PEFT only inside of them.
WATCHED = ("peft", "transformers.modeling_utils")


def after_peft(act: Callable[[], None]) -> None:
    """Call `act` when PEFT, or transformers' models, have been imported; at once if they have been already."""
    if any(_is_imported(name) for name in WATCHED):
        act()
    else:
        sys.meta_path.insert(0, _Finder(act))


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _Finder(MetaPathFinder):
    """Finds the watched modules where they are, with a loader that calls `act` after the first of them has run."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def done(self) -> None:
        """Act once. While PEFT imports transformers, PEFT is not complete, and its own turn comes at its end."""
        peft = sys.modules.get("peft")
        if self in sys.meta_path and (peft is None or hasattr(peft, "PeftModel")):
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
