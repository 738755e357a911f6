"""Dual LoRA as a PEFT method: ``peft.get_peft_model(model, DualLoraConfig(...))``."""

import peft  # noqa: F401  (first: importing PEFT may register the method, which imports the modules below)

from duallora.tuner.config import DualLoraConfig
from duallora.tuner.conv import Conv
from duallora.tuner.embedding import Embedding
from duallora.tuner.layer import DualLoraLayer
from duallora.tuner.linear import Linear
from duallora.tuner.model import DualLoraModel, param_groups
from duallora.tuner.register import register

__all__ = ["Conv", "DualLoraConfig", "DualLoraLayer", "DualLoraModel", "Embedding", "Linear", "param_groups"]

register()
