"""What a model reads of its layers without calling them: weights, which an adapter cannot reach, and sizes."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

_NOT_USES = frozenset(
    [
        "__init__",
        "_init_weights",
        "init_weights",
        "reset_parameters",
        "_reset_parameters",
        "tie_weights",
        "get_input_embeddings",
        "set_input_embeddings",
        "get_output_embeddings",
        "set_output_embeddings",
        "extra_repr",
    ]
)
# `self.child.dtype` is no use of the layer, and `self.child.weight.dtype` no use of its weight.
_FACTS = frozenset(
    [
        "weight",
        "bias",
        "in_features",
        "out_features",
        "num_embeddings",
        "embedding_dim",
        "stride",
        "padding",
        "kernel_size",
    ]
)
_OF_A_TENSOR = frozenset(
    ["dtype", "device", "shape", "size", "dim", "ndim", "requires_grad", "is_meta", "data_ptr", "numel", "element_size"]
)


def only_read(parent: nn.Module) -> frozenset[str]:
    """Names of the children of ``parent`` whose weight its forward takes into its own hands, and that it never calls.

    An adapter that stands in for such a child never sees an input: it is not trained, and merging it changes what the
    model computes. Found in the source of the class, so what it does with names it makes up or lists is not seen; a
    child that is called anywhere in the class is not among them.
    """
    return _only_read(type(parent))


@functools.cache
def _only_read(cls: type) -> frozenset[str]:
    methods: dict[str, ast.FunctionDef] = {}
    for ancestor in reversed(cls.__mro__):
        if ancestor in (object, nn.Module):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(ancestor)))
        except (OSError, TypeError, SyntaxError):  # typed into a console, or made by code
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        methods |= {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    reached, left = set(), ["forward"]
    while left:
        name = left.pop()
        if name in methods and name not in reached:
            reached.add(name)
            left += [node.attr for node in ast.walk(methods[name]) if _is_of_self(node)]
    read = {child for name in reached for child in _weights(methods[name])}
    used = {child for name in methods.keys() - _NOT_USES for child in _uses(methods[name])}
    return frozenset(read - used)


def _is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _weights(method: ast.FunctionDef) -> set[str]:
    """Children whose weight is taken here."""
    facts = {id(n.value) for n in ast.walk(method) if isinstance(n, ast.Attribute) and n.attr in _OF_A_TENSOR}
    return {
        n.value.attr  # type: ignore[attr-defined]
        for n in ast.walk(method)
        if isinstance(n, ast.Attribute) and n.attr == "weight" and _is_of_self(n.value) and id(n) not in facts
    }


def _uses(method: ast.FunctionDef) -> set[str]:
    """Children that are named here for anything but their facts: called, passed on, listed."""
    facts = {id(n.value) for n in ast.walk(method) if isinstance(n, ast.Attribute) and n.attr in _FACTS}
    return {n.attr for n in ast.walk(method) if _is_of_self(n) and id(n) not in facts}  # type: ignore[attr-defined]


class ReadsThrough:
    """Mixin of an adapter layer: what a model reads of the base layer (``stride``, ``num_embeddings``) is read there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            base = vars(self).get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_") or (name not in vars(base) and not isinstance(base, ReadsThrough)):
                raise
            return getattr(base, name)
