"""DualLoraConfig: defaults of the paper, every bad value named, JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import pydoc

import pytest
from peft import PeftConfig

from duallora import DualLoraConfig


def test_defaults():
    config = DualLoraConfig()
    assert (config.r, config.r1, config.r2, config.alpha) == (16, None, None, 32)
    assert config.ranks() == (16, 16)
    assert (config.warmup, config.warmup_steps, config.ste_clip, config.forward) == ("ramp", "auto", "chain", "auto")
    assert config.ramp_steps == 100
    assert DualLoraConfig(r=5).alpha == 10
    assert DualLoraConfig(r=5, r2=3).ranks() == (5, 3)


def test_every_field_is_described():
    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    own = {f.name: f for f in dataclasses.fields(DualLoraConfig) if f.name not in inherited}
    assert {"r", "r1", "r2", "alpha", "warmup", "ste_clip", "forward", "backend", "init_seed"} <= own.keys()
    assert all(f.metadata.get("help", "").endswith(".") for f in own.values())
    shown = pydoc.render_doc(DualLoraConfig, renderer=pydoc.plaintext)
    for field in dataclasses.fields(DualLoraConfig):
        line = next(line for line in shown.splitlines() if line.startswith(f" |      {field.name}: "))
        assert field.metadata["help"].replace("null", "None").rstrip(".") in line
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert line.endswith(f"efault {default!r}.")
    assert (
        "r: Rank of both groups (paper: 16 for LLaMA, 8 for GLUE). A whole number >= 1 and <= 65536; default 16."
        in shown
    )


AS_LORA = {"init": "lora", "magnitude": "identity", "warmup": "none"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r=0: expected a whole number >= 1"),
        ({"r": 4.5}, "r=4.5"),
        ({"r": True}, "r=True"),
        ({"r1": 0}, "r1=0"),
        ({"r2": "8"}, "r2='8'"),
        ({"alpha": 0}, "alpha=0: expected a finite number > 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": "8"}, "alpha='8'"),
        ({"init_std": 0.0}, "init_std=0.0"),
        ({"direction_init_std": -1}, "direction_init_std=-1"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"duallora_dropout": 1.0}, r"duallora_dropout=1.0: expected a finite number >= 0 and < 1"),
        ({"warmup": "rampe"}, "warmup='rampe': expected one of 'ramp', 'residual', 'none'"),
        ({"magnitude": "gelu"}, "magnitude='gelu'"),
        ({"direction": "sign"}, "direction='sign'"),
        ({"ste_clip": "eq7"}, "ste_clip='eq7'"),
        ({"forward": "merge"}, "forward='merge'"),
        ({"bias": "some"}, "bias='some'"),
        ({"init": "pissa"}, "init='pissa': expected one of 'gaussian', 'lora'"),
        ({"backend": "gpu"}, "backend='gpu': expected one of 'auto', 'reference', 'recompute'"),
        ({"forward": "merged", "duallora_dropout": 0.1}, 'forward = "merged".*duallora_dropout = 0.1'),
        ({"warmup": "residual", "direction": "fixed"}, 'warmup = "residual" is not defined'),
        ({"gradient_tokens": 0}, "gradient_tokens=0: expected a finite number > 0 and <= 1"),
        ({"gradient_tokens": 0.5, "backend": "reference"}, "plain autograd, which cannot sample"),
        ({"init": "lora"}, 'magnitude = "relu" and warmup = "ramp" .* use magnitude = "identity", warmup = "none", or'),
        ({**AS_LORA, "magnitude": "abs"}, 'use magnitude = "identity", or init = "gaussian"'),
        ({**AS_LORA, "direction": "tanh"}, 'use direction = "ste", or'),
        ({**AS_LORA, "warmup": "residual"}, 'use warmup = "none", or'),
        ({**AS_LORA, "init_std": 0.02, "init_weights": False}, "use init_std = null, init_weights = true, or"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
        (
            {"rank_pattern": {"q": [1, 2, 3]}},
            r"rank_pattern\['q'\]=\[1, 2, 3\]: expected a whole number >= 1 and <= 65536 or a list of 2",
        ),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\]=-1"),
        ({"target_modules": "q.*", "layers_to_transform": [0]}, "layers_to_transform needs target_modules as a list"),
        ({"target_modules": "q.*", "layers_pattern": "h"}, "layers_pattern cannot be used"),
        ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_bad_values_name_field_value_and_expectation(values, message):
    with pytest.raises(ValueError, match=message):
        DualLoraConfig(**values)


def test_json_round_trip(tmp_path):
    config = DualLoraConfig(
        r1=3, r2=5, alpha=7.5, target_modules=["a", "b"], rank_pattern={"a": [2, 4]}, alpha_pattern={"b": 3},
        warmup="residual", init_seed=9, task_type="CAUSAL_LM",
    )  # fmt: skip
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DUALLORA"
    again = DualLoraConfig.from_pretrained(str(tmp_path))
    assert again.target_modules == {"a", "b"}
    assert {**again.to_dict(), "target_modules": 0} == {**config.to_dict(), "target_modules": 0}
