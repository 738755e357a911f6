"""What a model reads of its layers without calling them: weights, which an adapter cannot reach, and sizes."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from typing import Any, NamedTuple

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


class _Method(NamedTuple):
    """What a method does with the attributes of ``self``."""

    names: set[str]  # all that it names
    weights: set[str]  # children whose weight it takes
    uses: set[str]  # children that it names for anything but their facts: calls, passes on, lists


def only_read(parent: nn.Module) -> frozenset[str]:
    """Names of the children of ``parent`` whose weight its forward takes into its own hands, and that it never calls.

    An adapter that stands in for such a child never sees an input: it is not trained, and merging it changes what the
    model computes. Found in the source of the class, so what it does with names it makes up or lists is not seen; a
    child that is called anywhere in the class is not among them.
    """
    return _only_read(type(parent))


@functools.cache
def _only_read(cls: type) -> frozenset[str]:
    methods: dict[str, _Method] = {}
    for ancestor in cls.__mro__:
        if ancestor is nn.Module:
            break
        if "forward" in methods and ancestor.__module__ != cls.__module__:  # a library's base class of all models
            continue
        for name, method in _classes(ancestor.__module__).get(ancestor.__qualname__, {}).items():
            methods.setdefault(name, method)
    reached, left = set(), ["forward"]
    while left:
        name = left.pop()
        if name in methods and name not in reached:
            reached.add(name)
            left += methods[name].names
    read = {child for name in reached for child in methods[name].weights}
    used = {child for name in methods.keys() - _NOT_USES for child in methods[name].uses}
    return frozenset(read - used)


@functools.cache
def _classes(module: str) -> dict[str, dict[str, _Method]]:
    """The methods of each class of a module, by its qualified name; none where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):  # typed into a console, or made by code
        return {}
    found: dict[str, dict[str, _Method]] = {}
    left: list[tuple[ast.AST, str]] = [(tree, "")]
    while left:
        node, prefix = left.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                name = prefix + child.name
                functions = [m for m in child.body if isinstance(m, ast.FunctionDef)]
                found[name] = {m.name: _method(m) for m in functions}
                left.append((child, f"{name}."))
            elif isinstance(child, ast.FunctionDef):
                left.append((child, f"{prefix}{child.name}.<locals>."))
            elif isinstance(child, ast.stmt):
                left.append((child, prefix))
    return found


def _method(method: ast.FunctionDef) -> _Method:
    attributes = [node for node in ast.walk(method) if isinstance(node, ast.Attribute)]
    of_self = [node for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "self"]
    children = {id(node): node.attr for node in of_self}
    facts = {id(node.value) for node in attributes if node.attr in _FACTS}
    of_weights = {id(node.value) for node in attributes if node.attr in _OF_A_TENSOR}
    weights = [node for node in attributes if node.attr == "weight" and id(node) not in of_weights]
    return _Method(
        set(children.values()),
        {children[id(node.value)] for node in weights if id(node.value) in children},
        {node.attr for node in of_self if id(node) not in facts},
    )


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
