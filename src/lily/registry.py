"""Making PEFT use this package for Lily, and undoing it."""

from __future__ import annotations

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lily import LilyModel as StockModel
from peft.utils import PeftType

from lily.config import EXTENDED_TYPE, LilyConfig
from lily.model import LilyModel


def register() -> None:
    """Make PEFT use this package wherever it meets `PeftType.LILY`. `import lily` does; calling it again is harmless.

    `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and what builds on them then work with
    `lily.LilyConfig`, and a plain `peft.LilyConfig` keeps its meaning (batch routing).
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LILY] = LilyConfig
    PEFT_TYPE_TO_CONFIG_MAPPING[EXTENDED_TYPE] = LilyConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LILY] = LilyModel


def unregister() -> None:
    """Give `PeftType.LILY` back to stock PEFT. Models that already carry our adapters keep working."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LILY] = peft.LilyConfig
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(EXTENDED_TYPE, None)
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LILY] = StockModel
