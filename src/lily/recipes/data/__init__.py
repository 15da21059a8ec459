"""From files to examples: tables, images and chats are read, checked and split."""

from lily.recipes.data.rows import (
    Splits,
    check_labels,
    completion_of,
    drawn,
    inputs_of,
    load_splits,
    prompt_of,
    rows_of,
    texts_of,
)

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
