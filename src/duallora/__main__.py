"""The ``duallora`` program, also ``python -m duallora``; without the packages of duallora[train] it says what to install."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line (:func:`duallora.cli.main`)."""
    try:
        from duallora import cli
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "duallora":
            raise
        print(
            f"the command line needs the package {error.name}, which is not installed: pip install 'duallora[train]'. "
            "The method itself (import duallora) works without it.",
            file=sys.stderr,
        )
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
