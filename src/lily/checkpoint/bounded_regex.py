"""Run regular expressions from untrusted adapter files in a subprocess with a time limit (ReDoS guard).

A short expression can keep Python's `re` busy forever, and `re` has no timeout. So each expression of a file is first
matched with the model's module names in a subprocess that is killed after `SECONDS`. The `regex` package has a timeout
but is another engine: what is slow in one can be fast in the other, and PEFT will apply the expression with `re`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

from lily.errors import LilyError
from lily.io.untrusted import one_line
from lily.plan.config import LilyConfig
from lily.plan.options import PATTERNS

SECONDS = 10.0
MAX_LENGTH = 20_000  # of one expression
MAX_NAMES = 1_000  # entries of a list, unless the model has more modules

# The calls with which PEFT applies a configuration's expressions.
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    compiled = re.compile(pattern)
    for name in names:
        compiled.fullmatch(name)
        compiled.match(name)
"""


def check_patterns(config: LilyConfig, names: Sequence[str]) -> None:
    """Refuse a configuration whose expressions or lists would take too long on a model.

    Args:
        config: a configuration that was read from a file.
        names: names of the model's modules.

    Raises:
        LilyError: if an expression is too long, cannot be compiled or exceeds the time limit; or if a list is longer
            than a model of this size needs.
    """
    keys = ("target_modules", "target_parameters", "exclude_modules", *PATTERNS, "modules_to_save",
            "layers_to_transform")  # fmt: skip
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, (set, list, tuple, dict)) and len(value) > max(MAX_NAMES, len(names)):
            raise LilyError(f"{key} has {len(value)} entries, but this model has {len(names)} modules")
    wanted = {}
    for key, pattern, used in _patterns(config):
        if len(pattern) > MAX_LENGTH:
            raise LilyError(
                f"{key} is a regular expression of {len(pattern)} characters; at most {MAX_LENGTH} are accepted"
            )
        if re.escape(pattern) != pattern.replace(".", r"\."):  # a plain dotted name is fast
            wanted[used] = f"{key}={pattern!r}"
    if wanted:
        _try(wanted, names)


def _patterns(config: LilyConfig) -> Iterator[tuple[str, str, str]]:
    """(key, expression as written, expression as PEFT uses it)."""
    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key)
        if isinstance(value, str) and value != "all-linear":
            yield key, value, value
    for key in PATTERNS:
        for name in getattr(config, key) or ():
            yield key, name, rf"(.*\.)?({name})$"
    for name in config.modules_to_save or ():
        yield "modules_to_save", name, rf"(^|.*\.){name}($|\..*)"
    for name in [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ():
        yield "layers_pattern", name, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\."


def _try(wanted: dict[str, str], names: Iterable[str]) -> None:
    shown = ", ".join(wanted.values())
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY],
            input=json.dumps([list(wanted), list(names)]).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LilyError(
            one_line(f"matching this model's names takes longer than {SECONDS:g} seconds: {shown}; name the modules")
        ) from None
    if run.returncode:
        why = (run.stderr.decode("utf-8", "replace").splitlines() or ["the subprocess failed"])[-1]
        raise LilyError(one_line(f"not a usable regular expression ({why}): {shown}; name the modules"))
