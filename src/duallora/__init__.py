"""Dual LoRA (arXiv 2512.03402): dW = alpha/sqrt(r1 r2) * ReLU(B A) . Sign(D C).

``import duallora`` is cheap and registers the PEFT method: at once where PEFT is loaded already, else the moment
it is. The public names below are imported on first use, so that the command line answers without loading torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from duallora.core.equation import dual_delta as dual_delta
    from duallora.core.gate import advance_gate as advance_gate
    from duallora.core.gate import gate as gate
    from duallora.nn import DualLoraLinear as DualLoraLinear
    from duallora.ops import dual_linear as dual_linear
    from duallora.ops.fold import folded as folded
    from duallora.store.sealed import SealedCheckpoints as SealedCheckpoints
    from duallora.store.sealed import latest_verified as latest_verified
    from duallora.tuner import DualLoraConfig as DualLoraConfig
    from duallora.tuner import DualLoraModel as DualLoraModel
    from duallora.tuner import param_groups as param_groups
    from duallora.tuner.conversion import convert as convert
    from duallora.tuner.fast_dora import fast_dora as fast_dora
    from duallora.tuner.fast_peft import fast_peft as fast_peft
    from duallora.tuner.gradient_start import init_from_gradient as init_from_gradient
    from duallora.tuner.hotswap import hotswap as hotswap
    from duallora.tuner.hotswap import prepare_hotswap as prepare_hotswap
    from duallora.tuner.quantized import dequantize as dequantize
    from duallora.tuner.watch import watch as watch

_HOME = {
    "DualLoraConfig": "duallora.tuner",
    "DualLoraLinear": "duallora.nn",
    "DualLoraModel": "duallora.tuner",
    "SealedCheckpoints": "duallora.store.sealed",
    "advance_gate": "duallora.core.gate",
    "convert": "duallora.tuner.conversion",
    "dequantize": "duallora.tuner.quantized",
    "dual_delta": "duallora.core.equation",
    "dual_linear": "duallora.ops",
    "fast_dora": "duallora.tuner.fast_dora",
    "fast_peft": "duallora.tuner.fast_peft",
    "folded": "duallora.ops.fold",
    "gate": "duallora.core.gate",
    "hotswap": "duallora.tuner.hotswap",
    "init_from_gradient": "duallora.tuner.gradient_start",
    "latest_verified": "duallora.store.sealed",
    "param_groups": "duallora.tuner",
    "watch": "duallora.tuner.watch",
    "prepare_hotswap": "duallora.tuner.hotswap",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'duallora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _RegisterWithPeft:
    """Registers the method right after ``peft`` has been imported by somebody, then steps aside.

    A mere look-up of ``peft`` (transformers and accelerate ask whether it is installed) must leave it in place.
    """

    looking = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "peft" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_register(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    for module in ("duallora.tuner.register", "duallora.methods.rule"):
        importlib.import_module(module).register()


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithPeft())  # type: ignore[arg-type]
