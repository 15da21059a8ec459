"""`python -m lily`."""

from lily.cli.main import main

main()
