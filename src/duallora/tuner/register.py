"""Makes our methods PEFT types. The only file that touches ``PeftType``.

PEFT's enum of types is closed, and its loaders look types up by value, so a real member is added to it; a plain
string instead breaks ``load_adapter`` and ``delete_adapter``. Relies on CPython's enum internals of 3.10 to 3.14,
which the tests of this file pin.
"""

from __future__ import annotations

from typing import Any

NAME = "DUALLORA"


def _ensure_member(name: str) -> None:
    from peft.utils.peft_types import PeftType

    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)


def add_type(name: str, config_cls: type, model_cls: Any) -> None:
    """Register a PEFT type ``name`` with its config and tuner class; again for the same config changes nothing.

    ``model_cls.prefix`` must be the name in lower case plus "_": transformers derives it so.

    Raises:
        RuntimeError: another package has registered a method of this name.
    """
    _ensure_member(name)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(name))
    if known is config_cls:
        return
    if known is not None:
        raise RuntimeError(
            f"PEFT type {name} already belongs to {known.__module__}.{known.__qualname__}: uninstall one of the two."
        )
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)


def register() -> None:
    """Register DualLoraConfig and DualLoraModel with PEFT. Calling it again changes nothing.

    Raises:
        RuntimeError: another package has registered a method of this name.
    """
    _ensure_member(NAME)  # the configuration below names it
    from duallora.tuner.config import DualLoraConfig
    from duallora.tuner.model import DualLoraModel

    add_type(NAME, DualLoraConfig, DualLoraModel)
