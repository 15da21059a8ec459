"""Register this package with PEFT for Lily, and unregister it."""

from __future__ import annotations

import peft
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lily import LilyModel as StockModel
from peft.utils import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from lily import _after_import
from lily.plan.config import EXTENDED_TYPE, LilyConfig
from lily.tuner.model import LilyModel
from lily.tuner.replacements import REPLACEMENTS


def register() -> None:
    """Make PEFT use this package for `PeftType.LILY`. `import lily` does this; calling it again is harmless.

    `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and their callers then work with
    `lily.LilyConfig`, and a plain `peft.LilyConfig` keeps its meaning (batch routing). `peft.convert_to_lora` works
    for static adapters, and `create_loraplus_optimizer` for all. `lily.tuner.replacements` lists what is replaced.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LILY] = LilyConfig
    PEFT_TYPE_TO_CONFIG_MAPPING[EXTENDED_TYPE] = LilyConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LILY] = LilyModel
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType.LILY] = LilyModel
    CONFIG_KEYS_TO_CHECK[PeftType.LILY] = []  # the swap itself checks what must agree
    for replacement in REPLACEMENTS:
        for owner in replacement.owners:
            setattr(owner, replacement.name, replacement.value)
    _after_import.replace()


def unregister() -> None:
    """Restore stock PEFT's `PeftType.LILY`, and all that was replaced in PEFT, transformers, diffusers and TRL.

    Models that already carry our adapters keep working.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LILY] = peft.LilyConfig
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(EXTENDED_TYPE, None)
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LILY] = StockModel
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING.pop(PeftType.LILY, None)
    CONFIG_KEYS_TO_CHECK.pop(PeftType.LILY, None)
    for replacement in REPLACEMENTS:
        for owner in replacement.owners:
            setattr(owner, replacement.name, replacement.stock)
    _after_import.restore()
