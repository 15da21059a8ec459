"""Progress of a command: one bar over the whole of it, quiet libraries, and `--verbose`."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Annotated

from typer import Option

from lily.progress.display import Silent, standard
from lily.progress.libraries import kept
from lily.progress.progress import Progress

Verbose = Annotated[bool, Option("--verbose", help="Show what other libraries say, too; it is in the log anyway.")]
HEAVY = ("torch", "peft", "transformers")


@contextlib.contextmanager
def progress(
    *imports: str, verbose: bool = False, quiet: bool = False, display: Silent | None = None
) -> Iterator[Progress]:
    """Within: the command's progress, which is also the current one; other libraries are imported and silent.

    Args:
        imports: modules besides torch, peft and transformers that the command imports later, and that speak then.
        verbose: let libraries speak.
        quiet: show warnings and errors alone.
        display: where progress is shown; default: a bar in a terminal, lines elsewhere.
    """
    shown = standard(quiet or int(os.environ.get("RANK", "0")) > 0, verbose) if display is None else display
    own = Progress(shown, verbose=verbose)
    with own as told, told.active(), contextlib.ExitStack() as stack:
        with told.stage("", "importing"):
            stack.enter_context(kept(told, (*HEAVY, *imports)))
            quieten(verbose)
        yield told


def quieten(verbose: bool = False) -> None:
    """Silence warnings and progress bars that libraries address to their own developers."""
    import transformers

    if verbose:
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    if hasattr(transformers.logging, "disable_progress_bar"):
        transformers.logging.disable_progress_bar()
