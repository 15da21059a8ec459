"""The one exception that Lily raises for bad input."""

from __future__ import annotations


class LilyError(ValueError):
    """Bad input: the message names what is wrong, what was expected and how to fix it.

    A ``ValueError``, so code written for PEFT (which raises ``ValueError`` for bad configs) catches it unchanged.
    The command line prints the message alone and exits with code 2.
    """


class DivergedError(LilyError):
    """Training has left the finite numbers: the input is well-formed, but a learning rate or scaling is too large."""


class ElsewhereError(LilyError):
    """Another process of the same run has found an error and tells it. The command line says nothing more."""
