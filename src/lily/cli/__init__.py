"""The command line: `lily` and `python -m lily`, one module for each verb."""

from lily.cli.main import app, main

__all__ = ["app", "main"]
