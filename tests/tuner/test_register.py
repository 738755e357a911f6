"""DUALLORA is a genuine member of PEFT's closed enum, whoever is imported first."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import duallora
from duallora.tuner import DualLoraConfig, DualLoraModel
from duallora.tuner.register import register


def test_the_member_behaves_as_any_other():
    member = PeftType("DUALLORA")
    assert member is PeftType.DUALLORA is PeftType["DUALLORA"]
    assert isinstance(member, PeftType)
    assert member in list(PeftType)
    assert (member.name, member.value) == ("DUALLORA", "DUALLORA")
    assert pickle.loads(pickle.dumps(member)) is member  # noqa: S301
    assert copy.deepcopy(member) is member
    assert json.dumps(member) == '"DUALLORA"'
    assert {member: 1}["DUALLORA"] == 1
    with pytest.raises(ValueError, match="DUALLORB"):
        PeftType("DUALLORB")


def test_tables_and_prefix():
    """transformers recomputes the prefix from the type's name, so it cannot be anything else."""
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DUALLORA] is DualLoraConfig is duallora.DualLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.DUALLORA] is DualLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.DUALLORA] == PeftType.DUALLORA.value.lower() + "_" == "duallora_"


def test_registering_twice_is_harmless_and_a_rival_is_refused(monkeypatch):
    count = len(PeftType)
    register()
    assert len(PeftType) == count
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.DUALLORA, dict)
    with pytest.raises(RuntimeError, match=r"already belongs to builtins\.dict"):
        register()


@pytest.mark.parametrize(
    "code",
    [
        "import duallora, importlib.util; importlib.util.find_spec('peft'); from peft.tuners.lora import LoraConfig; import peft",
        "import peft, duallora.methods.rule",
    ],
)
def test_every_order_of_imports_registers(code):
    check = "".join(
        f"; assert peft.PeftType({name!r}) in peft.PEFT_TYPE_TO_CONFIG_MAPPING"
        for name in ("DUALLORA", "DUALLORA_RULE")
    )
    subprocess.run([sys.executable, "-c", code + check], check=True)
