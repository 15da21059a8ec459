"""The command line: `lily` and `python -m lily`, one module for each verb."""
