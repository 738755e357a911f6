"""Makes "DUALLORA" a PEFT type. The only file that touches ``PeftType``.

PEFT's enum of types is closed, and its loaders look types up by value, so a real member is added to it; a plain
string instead breaks ``load_adapter`` and ``delete_adapter``. Relies on CPython's enum internals of 3.10 to 3.14,
which the tests of this file pin.
"""

from __future__ import annotations

NAME = "DUALLORA"


def _ensure_member() -> None:
    from peft.utils.peft_types import PeftType

    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)


def register() -> None:
    """Register DualLoraConfig and DualLoraModel with PEFT. Calling it again changes nothing.

    Raises:
        RuntimeError: another package has registered a method of this name.
    """
    _ensure_member()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    from duallora.tuner.config import DualLoraConfig
    from duallora.tuner.model import DualLoraModel

    peft_type = PeftType(NAME)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is DualLoraConfig:
        return
    if known is not None:
        raise RuntimeError(
            f"PEFT type {NAME} already belongs to {known.__module__}.{known.__qualname__}: uninstall one of the two."
        )
    register_peft_method(
        name=NAME.lower(), config_cls=DualLoraConfig, model_cls=DualLoraModel, prefix=DualLoraModel.prefix
    )
