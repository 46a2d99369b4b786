"""The command line: one file per command. ``main`` is the entry point of the program ``octavo``."""

from octavo.cli.app import main

__all__ = ["main"]
