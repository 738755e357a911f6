"""``python -m duallora.lm_eval ...``: EleutherAI's lm-eval with Dual LoRA known to PEFT, its own arguments unchanged.

lm-eval loads an adapter by ``--model_args pretrained=BASE,peft=FOLDER``, and PEFT knows Dual LoRA only once duallora is
imported, for which lm-eval has no hook. ``pretrained=builtin:NAME`` names a built-in model.
"""

from __future__ import annotations

import re
import sys

from duallora.errors import ConfigError, DualLoraError


def arguments(given: list[str]) -> list[str]:
    """lm-eval's arguments, with built-in models by their folder."""
    from duallora.store.models import resolve

    return [re.sub(r"(?<=pretrained=)builtin:[\w.-]+", lambda name: str(resolve(name.group())), text) for text in given]


def main() -> None:
    """Runs lm-eval's own command line."""
    try:
        try:
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise ConfigError(f"lm-eval cannot be imported ({error}): pip install 'lm-eval[hf]'") from None
        sys.argv = ["lm_eval", *arguments(sys.argv[1:])]
    except DualLoraError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    cli_evaluate()


if __name__ == "__main__":
    main()
