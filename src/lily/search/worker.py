"""One run of a search or a comparison, in a separate process.

python -m lily.search.worker RECIPE FOLDER PARENT EVENTS [trial] [until=STEPS]
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # Linux: choose the signal that this process receives when its parent ends


def end_with(parent: int) -> None:
    """Stop as after SIGTERM, with a checkpoint, when the parent process is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it had ended before
            sys.exit(128 + signal.SIGTERM)


def main(recipe: str, folder: str, parent: int, events: str, *options: str) -> None:
    """Train a recipe into a folder, or resume it there, with `events` for its progress. A trial reads no test rows."""
    end_with(parent)
    from lily.errors import LilyError
    from lily.progress.display import Events
    from lily.progress.progress import Progress
    from lily.recipes import loader

    try:
        chosen = loader.load_recipe(recipe, [loader.change_of("output", loader.without_placeholders(folder))])
        from lily.recipes.train import train  # takes seconds

        begun = (Path(folder) / "recipe.yaml").is_file()
        until = next((int(text.partition("=")[2]) for text in options if text.startswith("until=")), None)
        with Progress(Events(Path(events))) as told, told.active():
            train(
                chosen,
                resume=begun,
                overwrite=not begun,
                watch=None if until is None else lambda history: history[-1]["step"] >= until,
                validation_only="trial" in options,
                told=told,
            )
    except LilyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
