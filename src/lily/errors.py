"""Exceptions that Lily raises."""

from __future__ import annotations


class LilyError(ValueError):
    """Bad input: the message names what is wrong, what was expected and how to fix it.

    A ``ValueError``, so code written for PEFT (which raises ``ValueError`` for bad configs) catches it unchanged.
    The command line prints the message alone and exits with code 2.
    """


class DivergedError(LilyError):
    """Loss, gradient or weights are not finite: usually the learning rate or scaling is too large."""


class ElsewhereError(LilyError):
    """Raised in the other processes when one process of a run fails; that one prints the error."""
