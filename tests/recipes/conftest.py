"""Fixtures shared by the tests of recipes; what they are made of is in recipes_helpers.py."""

from recipes_helpers import chat_model, chat_table, encoder, table

__all__ = ["chat_model", "chat_table", "encoder", "table"]
