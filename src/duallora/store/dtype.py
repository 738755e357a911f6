"""The type of a base model's weights, as recipes, the command line and loading take it; "auto" is the checkpoint's own."""

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
