"""The ``duallora`` program, also ``python -m duallora``; without the packages of duallora[train] it says what to install."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line (:func:`duallora.cli.main`)."""
    try:
        from duallora import cli
    except ModuleNotFoundError as error:
        from duallora.errors import lacking

        if not (message := lacking(error)):
            raise
        print(message, file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
