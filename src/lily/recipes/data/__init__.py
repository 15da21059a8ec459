"""From files to examples: tables, images and chats are read, checked and split."""

from lily.recipes.data.rows import (
    Splits,
    check_labels,
    drawn,
    inputs_of,
    load_splits,
    rows_of,
    texts_of,
)
from lily.recipes.data.sft import completion_of, prompt_of

__all__ = [
    "Splits",
    "check_labels",
    "completion_of",
    "drawn",
    "inputs_of",
    "load_splits",
    "prompt_of",
    "rows_of",
    "texts_of",
]
