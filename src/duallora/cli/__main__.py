"""``python -m duallora.cli``: the program, for processes that are started from Python."""

from duallora.cli import main

main()
