"""The recipe of a run: its settings, where they come from, and its YAML."""

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of a base model's weights; "auto" is the checkpoint's own
