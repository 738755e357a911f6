"""Data: examples, tasks with their protocols and metrics, and the encoding into tokens."""

from duallora.tasks.encode import IGNORE, Collator, Counts, Encoded, encode, encode_prompt, encode_split, encode_texts
from duallora.tasks.example import Example
from duallora.tasks.files import load_data
from duallora.tasks.task import LazySplits, Task

__all__ = [
    "IGNORE",
    "Collator",
    "Counts",
    "Encoded",
    "Example",
    "LazySplits",
    "Task",
    "encode",
    "encode_prompt",
    "encode_split",
    "encode_texts",
    "load_data",
]
