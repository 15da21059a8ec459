"""The provenance of exports: writing and reading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lily._version import __version__
from lily.io.atomic import write_text
from lily.io.untrusted import blame, parse_text, read_header, read_json
from lily.tuner.adapter import Adapted

PROVENANCE = "lily_provenance.json"


def origin(adapted: Adapted, kind: str, further: Mapping[str, Any] | None) -> dict[str, Any]:
    """The provenance of an export: its adapter, plan, and what was done to it."""
    config = adapted.config
    return {
        "format": f"lily {kind}", "lily": __version__, "base_model": config.base_model_name_or_path,
        "routing": config.routing, "plan": str(adapted.plan).splitlines(),
        **(config.provenance or {}), **(further or {}),
    }  # fmt: skip


def header(facts: Mapping[str, Any]) -> dict[str, str]:
    """The provenance as metadata of a safetensors file, for when it is separated from its folder."""
    return {"format": "pt", "lily": json.dumps(facts, ensure_ascii=False)}


def write_provenance(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the provenance as a separate, readable file."""
    write_text(folder / PROVENANCE, json.dumps(facts, indent=2, ensure_ascii=False))


def provenance(folder: str | Path) -> dict[str, Any] | None:
    """The provenance of an exported folder; None if this package did not write it.

    Raises:
        LilyError: if the provenance cannot be read.
    """
    folder = Path(folder)
    if (folder / PROVENANCE).is_file():
        return _facts(folder / PROVENANCE, read_json(folder / PROVENANCE))
    for file in sorted(folder.glob("*.safetensors")):
        text = read_header(file).metadata.get("lily")
        if text:
            return _facts(file, parse_text(file, text.encode("utf-8", "surrogatepass")).value)
    return None


def _facts(file: Path, facts: Any) -> dict[str, Any]:
    if not isinstance(facts, dict):
        raise blame(file, "its provenance is not a JSON object")
    return facts
