"""Loading an adapter: every check before the model is touched.

All ways of loading an adapter use these checks (see `lily.tuner.replacements`). The file's header is compared with the
plan, the tensors are read and checked, and only then PEFT injects layers and copies tensors. An error before that
leaves the model unchanged.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from huggingface_hub import hf_hub_download
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from torch import Tensor, nn

from lily.checkpoint import format
from lily.checkpoint.beside import Beside
from lily.checkpoint.bounded_regex import MAX_LENGTH, check_patterns
from lily.checkpoint.heads import labels_beside
from lily.errors import LilyError
from lily.io import untrusted
from lily.io.untrusted import blame
from lily.layers.bank import LilyBank
from lily.plan.config import EXTENDED_TYPE, LilyConfig
from lily.plan.options import PATTERNS
from lily.plan.sharing_plan import SharingPlan

LILY_TYPES = (PeftType.LILY.value, EXTENDED_TYPE)

DOWNLOAD = frozenset(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename"}

MAX_PATTERNS = 1_000  # entries of one pattern option, each of which is compiled


def config_values(path: Path, ours: bool = False) -> dict[str, Any] | None:
    """The values of an `adapter_config.json`, checked by building the configuration once.

    Args:
        path: the file.
        ours: require a Lily configuration; if False, another method's is left to PEFT.

    Returns:
        The values; None for another method's configuration, and for a file that nothing connects with Lily: PEFT
        then says what is wrong with it.

    Raises:
        LilyError: if the file of a Lily adapter is not a configuration, or its values are not valid.
    """
    try:
        return _config_values(path, ours)
    except LilyError:
        if ours or _names_lily(path) or _holds_lily(path.with_name(SAFETENSORS_WEIGHTS_NAME)):
            raise
        return None


def _names_lily(path: Path) -> bool:
    """Whether the bytes of a file that may be no JSON name the method."""
    if not path.is_file():  # a pipe would block
        return True
    try:
        with path.open("rb") as file:
            return re.search(rb'"peft_type"\s*:\s*"LILY', file.read(untrusted.MAX_JSON + 1)) is not None
    except OSError:
        return True  # it may; whoever reads it says why it cannot be read


def _config_values(path: Path, ours: bool) -> dict[str, Any] | None:
    parsed = untrusted.parse_json(path)
    values = parsed.value
    if not isinstance(values, dict):
        raise blame(path, f"expected a JSON object, got {type(values).__name__}")
    kind = values.get("peft_type", LILY_TYPES[0] if ours else None)
    if not isinstance(kind, str) or (kind not in LILY_TYPES and kind not in PEFT_TYPE_TO_CONFIG_MAPPING):
        raise blame(path, f"peft_type is {kind!r}, which is not a method of PEFT or Lily; is it an adapter?")
    if kind not in LILY_TYPES:
        if ours or _holds_lily(path.with_name(SAFETENSORS_WEIGHTS_NAME)):
            why = "a Lily configuration is required" if ours else "the folder holds a Lily adapter's tensors"
            raise blame(path, f"peft_type is {kind!r}, but {why}; use that adapter's configuration")
        return None
    values.pop("runtime_config", None)  # PEFT drops it too: valid at run time only
    untrusted.check_inside(path)
    if parsed.oddities:
        raise blame(path, parsed.oddities[0])
    hints = get_type_hints(LilyConfig)
    for key, value in values.items():
        if key in hints and not _fits(value, hints[key]):
            raise blame(path, f"{key}={value!r} has the wrong type; expected {_name(hints[key])}")
        if isinstance(value, str) and len(value) > MAX_LENGTH:
            raise blame(path, f"{key} has {len(value)} characters; at most {MAX_LENGTH} are accepted")
    for key in PATTERNS:
        patterns = values.get(key) or {}
        if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_LENGTH for pattern in patterns):
            raise blame(
                path,
                f"{key} has {len(patterns)} entries; at most {MAX_PATTERNS} of {MAX_LENGTH} characters are accepted",
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unknown keys; PEFT warns when it builds the configuration itself
            LilyConfig.from_peft_type(**copy.deepcopy(values))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise blame(path, error) from None
    return values


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is valid for the declared type of a field."""
    arguments, origin = get_args(hint), get_origin(hint) or hint
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Any or origin is Literal:
        return origin is Any or value in arguments
    if origin in (list, set, tuple):
        return isinstance(value, list) and all(_fits(v, arguments[0]) for v in value if arguments)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values() if arguments)
    if origin is float:
        return type(value) in (int, float)
    if isinstance(origin, type) and issubclass(origin, str):  # PEFT's enumerations too
        return isinstance(value, str)
    return type(value) is origin


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _holds_lily(path: Path) -> bool:
    """Whether a file's header lists Lily tensors; they are not checked."""
    try:
        return any(format.KEY.match(name) for name in untrusted.read_header(path).entries)
    except LilyError:
        return False


class Opened:
    """An opened adapter file: names and shapes first; the tensors are read on demand.

    Args:
        shapes: name -> a tensor of that shape, on the meta device if the file has not been read.
        header: the file's header; None: `shapes` are the tensors themselves.
        key_mapping: as in PEFT: expression -> replacement, for names of older transformers models.
        loose_sizes: PEFT's `ignore_mismatched_sizes`: skip saved modules of another size.
    """

    def __init__(
        self,
        shapes: Mapping[str, Tensor],
        header: untrusted.Header | None = None,
        key_mapping: Mapping[str, str] | None = None,
        loose_sizes: bool = False,
    ) -> None:
        self.header, self.key_mapping, self.loose_sizes = header, key_mapping, loose_sizes
        self.shapes = _mapped(shapes, key_mapping)
        self.fits = False
        self._state: dict[str, Tensor] | None = None if header else dict(shapes)

    @classmethod
    def folder(cls, folder: Path, key_mapping: Mapping[str, str] | None = None, loose_sizes: bool = False) -> Opened:
        """Open the tensor file of a local folder.

        Raises:
            LilyError: if there is no well-formed safetensors file.
        """
        file = folder / SAFETENSORS_WEIGHTS_NAME
        if not file.exists() and not file.is_symlink():
            pickle = (folder / "adapter_model.bin").exists()
            why = "adapter_model.bin is a pickle, which can run code and is never read" if pickle else "it is missing"
            raise blame(file, f"{why}; save the adapter again with safetensors")
        untrusted.check_inside(file)
        header = untrusted.read_header(file)
        return cls({name: entry.meta for name, entry in header.entries.items()}, header, key_mapping, loose_sizes)

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors, under the names that PEFT's `load_peft_weights` gives them.

        Raises:
            LilyError: if the file cannot be read or holds NaN or an infinity.
        """
        if self._state is None:
            assert self.header is not None
            self._state = _mapped(untrusted.read_tensors(self.header), self.key_mapping)
        return self._state

    def check(self, plan: SharingPlan, config: LilyConfig, model: nn.Module, adapter: str | None = None) -> None:
        """Refuse a file that does not fit the plan and the model.

        Args:
            plan: the adapter's plan.
            config: the adapter's configuration.
            model: the model with the adapter, or without it before injection.
            adapter: name of the adapter, if the model has it.

        Raises:
            LilyError: see `check_fit` and `lily.checkpoint.format.resolve`.
        """
        with naming(self.header.path if self.header else None):
            check_fit(self.shapes, plan, config, model, adapter, self.loose_sizes)
            format.resolve(self.state, plan, config.settled)
        self.fits = True


# The file that is being loaded: PEFT does not pass it from one step of loading to the next.
_current: ContextVar[Opened | None] = ContextVar("lily_current", default=None)


def current() -> Opened | None:
    """The file that is being loaded; None: no load is in progress."""
    return _current.get()


@contextlib.contextmanager
def in_progress(opened: Opened) -> Iterator[Opened]:
    """Context: `current()` is `opened`, and errors before its check has passed name the configuration file."""
    token = _current.set(opened)
    config_file = opened.header.path.with_name(CONFIG_NAME) if opened.header else None
    try:
        yield opened
    except ValueError as error:
        if opened.fits and not isinstance(error, LilyError):
            raise  # the file fits, so the error is about the model or device
        with naming(config_file):
            raise
    finally:
        _current.reset(token)


@contextlib.contextmanager
def naming(file: Path | None) -> Iterator[None]:
    """Context: errors about bad input name `file`, unless they name a file of its folder; None: unchanged."""
    try:
        yield
    except ValueError as error:
        if file is None or str(error).startswith(str(file.parent)):
            raise
        kind = type(error) if isinstance(error, LilyError) else LilyError
        raise kind(str(blame(file, str(error).strip()))) from None


def download_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a loading function's options that are options of `hf_hub_download`."""
    return {key: value for key, value in options.items() if key in DOWNLOAD and value is not None}


def find(model_id: Any, hub: Mapping[str, Any], configured: bool = False) -> Path | None:
    """The local folder with a Lily adapter's checked configuration and its tensors, downloaded if necessary.

    Args:
        model_id: a folder or a hub id.
        hub: options of `hf_hub_download`.
        configured: a Lily configuration is already loaded, so only the tensors are needed.

    Returns:
        The folder; None if it is not a Lily adapter or does not exist, which PEFT then handles.

    Raises:
        LilyError: if it is a Lily adapter with an invalid configuration, or its tensors cannot be downloaded.
    """
    folder = Path(model_id, hub.get("subfolder") or "")
    if folder.is_dir():
        config = folder / CONFIG_NAME
        if configured:
            return folder
        if config.exists() or config.is_symlink():
            return None if config_values(config) is None else folder
        if _holds_lily(folder / SAFETENSORS_WEIGHTS_NAME):
            raise blame(config, "is missing, but the folder holds a Lily adapter's tensors; save the adapter again")
        return None
    if not configured:
        try:
            config = Path(hf_hub_download(str(model_id), CONFIG_NAME, **hub))
        except Exception:  # PEFT raises its own error
            return None
        if config_values(config) is None:
            return None
    try:
        return Path(hf_hub_download(str(model_id), SAFETENSORS_WEIGHTS_NAME, **hub)).parent
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise blame(
            f"{model_id}/{SAFETENSORS_WEIGHTS_NAME}",
            f"could not be downloaded ({why}); only safetensors files are supported",
        ) from None


def check_config(config: LilyConfig, model: nn.Module) -> None:
    """Refuse a file's configuration whose expressions take too long on this model's names.

    Raises:
        LilyError: see `lily.checkpoint.bounded_regex.check_patterns`.
    """
    check_patterns(config, [name for name, _ in model.named_modules()])


def check_fit(
    state: Mapping[str, Tensor],
    plan: SharingPlan,
    config: LilyConfig,
    model: nn.Module,
    adapter: str | None,
    loose_sizes: bool = False,
) -> None:
    """Check names, shapes and dtypes of Lily's tensors against the plan, and of all others against the model.

    Args:
        state: name -> tensor, which may be on the meta device.
        plan: the adapter's plan.
        config: the adapter's configuration.
        model: the model, with or without its adapters.
        adapter: name of the adapter, if the model has it.
        loose_sizes: PEFT's `ignore_mismatched_sizes`: skip saved modules of another size.

    Raises:
        LilyError: if a tensor is missing, does not belong to the adapter, or has the wrong shape or dtype.
    """
    format.check_base(plan, config.adapted_layers, config.base_model_name_or_path)
    other = format.check_names(state, plan, config.settled)
    for name, tensor in state.items():
        if name not in other and tensor.dtype not in untrusted.FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise LilyError(f"{name!r} has dtype {kind}, expected float64, float32, float16 or bfloat16")
    opened = current()
    labels = None if opened is None or opened.header is None else labels_beside(opened.header.path.parent)
    Beside(model, config, plan, adapter).check(other, loose_sizes or _sharded(model), labels)


def _sharded(model: nn.Module) -> bool:
    """Whether FSDP1 has flattened the parameters, so that their shapes cannot be compared."""
    return any("_fsdp_wrapped_module" in name for name, _ in model.named_modules())


def _mapped(state: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Rename as PEFT's `load_peft_weights` does: apply the first expression that matches."""
    out = {}
    for key, tensor in state.items():
        prefix = format.PREFIX if key.startswith(format.PREFIX) else ""
        name = key.removeprefix(prefix)
        for pattern, replacement in (key_mapping or {}).items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        out[prefix + name] = tensor
    return out


def plan_of(model: nn.Module, adapter: str) -> SharingPlan | None:
    """The plan of the model's adapter of that name; None: there is none."""
    banks = (m for m in model.modules() if isinstance(m, LilyBank))
    return next((bank.plans[adapter] for bank in banks if adapter in bank.plans), None)
