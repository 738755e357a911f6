"""Weights that several modules of a model share, where a merge gives some of them a weight of their own.

A checkpoint of transformers holds a shared weight once. Which names share one is settled anew at loading, by the class
and by ``tie_word_embeddings`` in the config, for all shared weights of the model at once. So a merged model is saved as
it is only if the names that still share a weight are those that loading would tie. :func:`plan` finds out how to get
there before anything is merged, on empty models made from the config; :meth:`Untying.apply` does it.
"""

from __future__ import annotations

import copy
import inspect
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from duallora.errors import ConfigError

Group = tuple[str, ...]  # names of two or more parameters and buffers that are one tensor
Identities = Mapping[str, Hashable]  # by name; names with the same one are one tensor


def slots(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """(dict, key, tensor) of each parameter and saved buffer that ``module`` itself holds."""
    for held in (module._parameters, module._buffers):
        for key, tensor in held.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield held, key, tensor  # type: ignore[misc]


def put_in_containers(model: nn.Module, news: Mapping[Any, nn.Module]) -> None:
    """Put ``news[layer]`` in the place of each layer in the lists, tuples and dicts that modules of ``model`` hold.

    They are no children, yet a parent may call its layers from them (MaskFormer does).
    """
    for module in list(model.modules()):
        for name, held in list(vars(module).items()):
            if not isinstance(held, (list, tuple, dict)) or name in _TORCHS_OWN:
                continue
            items = held.values() if isinstance(held, dict) else held
            if not any(isinstance(item, nn.Module) and item in news for item in items):
                continue
            put: list[Any] = [news.get(item, item) if isinstance(item, nn.Module) else item for item in items]
            if isinstance(held, list):
                held[:] = put
            elif isinstance(held, dict):
                held.update(zip(held, put, strict=True))
            else:
                make: Any = getattr(type(held), "_make", tuple)  # a named tuple's own
                setattr(module, name, make(put))


_TORCHS_OWN = frozenset(vars(nn.Module()))  # its children, parameters and hooks among them


def _named_slots(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """As :func:`slots`, of all modules, under each name that ``model.state_dict()`` has for it."""
    for name, module in model.named_modules(remove_duplicate=False):
        for held, key, tensor in slots(module):
            yield f"{name}.{key}" if name else key, held, key, tensor


def _shared(identities: Identities) -> list[Group]:
    names: dict[Hashable, list[str]] = defaultdict(list)
    for name, identity in identities.items():
        names[identity].append(name)
    return [tuple(found) for found in names.values() if len(found) > 1]


def _broken(groups: list[Group], identities: Identities) -> list[Group]:
    """Those whose names are several tensors."""
    return [g for g in groups if len({identities[name] for name in g if name in identities}) > 1]


@dataclass
class Untying:
    """What is left to do for a merged model, so that it is saved as it is."""

    apart: list[Group]  # were one tensor before the merge and are no longer
    parts: list[_Part]

    def apply(self, merged: nn.Module, stacklevel: int) -> None:
        """Do it, in place, and warn of what came apart. ``stacklevel``: as if the caller warned."""
        for part in self.parts:
            part.apply(merged)
        if not self.apart:
            return
        more = f" (and {len(self.apart) - 1} more sets of modules)" if len(self.apart) > 1 else ""
        remedies = dict.fromkeys(part.remedy for part in self.parts) or {
            "load its state dict only into a model that does not tie them": None
        }
        warnings.warn(
            f"{_modules(self.apart[0])} shared one weight{more}; with an adapter merged into it each has its own: "
            + ", ".join(filter(None, remedies)),
            stacklevel=stacklevel + 1,
        )


@dataclass
class _Part:
    """A model of transformers in the merged one."""

    name: str
    flags: set[str]  # of its configs, to be switched off
    together: list[Group]  # what loading will tie
    remedy: str = "loading does not tie them"

    def apply(self, merged: nn.Module) -> None:
        root = merged.get_submodule(self.name)
        for config in _configs(root):
            for flag in _flags(config) & self.flags:
                setattr(config, flag, False)
        group_of = {name: group for group in self.together for name in group}
        seen: set[tuple[int, str]] = set()  # a module that stands in two places holds one weight
        copies: dict[int, dict[Hashable, Tensor]] = defaultdict(dict)
        for name, held, key, tensor in list(_named_slots(root)):
            if (id(held), key) in seen:
                continue
            seen.add((id(held), key))
            mine, group = copies[id(tensor)], group_of.get(name, name)
            if group not in mine:
                mine[group] = copy.deepcopy(tensor) if mine else tensor
            held[key] = mine[group]


def _modules(group: Group) -> str:
    return " and ".join(dict.fromkeys(name.rpartition(".")[0] for name in group))


def plan(model: nn.Module, before: Identities, after: Identities) -> Untying | None:
    """How to untie ``model`` once it is merged; None where nothing needs to be.

    Args:
        model: with its adapters, not yet merged.
        before, after: its tensors without the adapters, and with them merged, by their names in the merged model.

    Raises:
        ConfigError: a saved copy of the merged model would be another model; nothing was changed.
    """
    apart = _broken(_shared(before), after)
    parts = []
    for name, root in _roots(model):
        prefix = f"{name}." if name else ""
        inside = {n.removeprefix(prefix): identity for n, identity in after.items() if n.startswith(prefix)}
        own = [group for group in apart if any(n.startswith(prefix) for n in group)]
        if inside and (own or _ends_differ(root)):
            parts.append(_plan(name, root, inside, own))
    return Untying(apart, parts) if apart or parts else None


def _roots(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost models of transformers in ``model``."""
    library = sys.modules.get("transformers.modeling_utils")  # a model of transformers has imported it
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        is_inner = any(outer == "" or name.startswith(f"{outer}.") for outer, _ in found)
        if library and isinstance(module, library.PreTrainedModel) and not is_inner:
            found.append((name, module))
    return found


def _ends_differ(root: Any) -> bool:
    """Whether the config ties the input and output embeddings, which are two weights already."""
    if not any("tie_word_embeddings" in _flags(config) for config in _configs(root)):
        return False
    try:
        ends = [root.get_input_embeddings(), root.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return False
    weights = [None if end is None else getattr(end, "base_layer", end)._parameters.get("weight") for end in ends]
    return None not in weights and weights[0] is not weights[1]


def _plan(name: str, root: Any, after: Identities, apart: list[Group]) -> _Part:
    flags = set().union(*(_flags(config) for config in _configs(root)))
    try:
        as_is = _Loaded(root, set())
        tied = _broken(as_is.tied, after)
        if not tied:
            return _Part(name, set(), as_is.tied)
        off = _Loaded(root, flags)
    except Exception as error:
        why = f"no empty model can be made of its config, to see what loading would tie ({error})"
        raise _refusal(root, apart or [()], why) from error
    never_saved = sorted(set(root._keys_to_ignore_on_save or ()).intersection(*map(set, tied)))
    if never_saved:
        raise _refusal(root, tied, f"{never_saved[0]} is never saved")
    switched_off = " and ".join(f"{flag} = False" for flag in sorted(flags))
    why_not = _side_effect(root, as_is, off, flags)
    if not why_not and not _broken(off.tied, after):
        return _Part(name, flags, off.tied, f"its config now has {switched_off}")
    why_not = f"{switched_off} in its config {why_not}" if why_not else "no setting of its config unties them"
    if _broken(as_is.tied_though_saved, after):
        raise _refusal(root, _broken(off.tied, after) or tied, why_not)
    remedy = (
        f"all are saved, and transformers 5 does not tie them though its config still says so ({why_not}); earlier "
        "releases and other programs may"
    )
    return _Part(name, set(), [group for group in as_is.tied if group not in tied], remedy)


def _refusal(root: nn.Module, groups: list[Group], why: str) -> ConfigError:
    return ConfigError(
        f"{_modules(groups[0])} share one weight in {type(root).__name__}. Merged they would not, but a saved model would "
        f"be loaded as if they did: {why}. Nothing was merged. Keep the adapter apart from the model (save_pretrained "
        "before merging), or train one without these modules in target_modules and modules_to_save."
    )


class _Loaded:
    """What loading a model with the config of ``root``, ``flags`` switched off, would tie.

    ``tied``: where the file holds one of them; ``tied_though_saved``: also where it holds each, so that one would
    overwrite the others.
    """

    def __init__(self, root: Any, flags: set[str]) -> None:
        config = copy.deepcopy(root.config)
        for part in _configs_in(config):
            for flag in _flags(part) & flags:
                setattr(part, flag, False)
        with tempfile.TemporaryDirectory() as folder:  # some configs change what they read
            config.save_pretrained(folder)
            self.config = type(config).from_pretrained(folder)
        model = _empty(type(root), self.config)
        named = list(_named_slots(model))
        self.shapes = {name: tensor.shape for name, _, _, tensor in named}
        self.tied = _shared({name: id(tensor) for name, _, _, tensor in named})
        for _, held, key, tensor in named:
            held[key] = copy.deepcopy(tensor)  # as loading puts each tensor of the file in its place
        model.tie_weights(**_ALL_SAVED if _unties(model) else {})
        self.tied_though_saved = _shared({name: id(tensor) for name, _, _, tensor in _named_slots(model)})


_ALL_SAVED: dict[str, Any] = {"missing_keys": set(), "recompute_mapping": False}


def _unties(model: Any) -> bool:
    """Whether this release of transformers leaves apart what a file holds apart (5 and later)."""
    return hasattr(model, "get_expanded_tied_weights_keys")


def _empty(model_class: Any, config: Any) -> Any:
    """A model on the meta device, made and tied as ``from_pretrained`` makes it."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            from transformers.initialization import meta_device_safe_creation_ops
        except ImportError:  # transformers 4
            from transformers.integrations.accelerate import init_empty_weights  # type: ignore[attr-defined]
            from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined]

            stack.enter_context(no_init_weights())
            stack.enter_context(init_empty_weights())
        else:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(meta_device_safe_creation_ops())
        model = model_class(config)
    model.tie_weights()
    return model


def _side_effect(root: nn.Module, as_is: _Loaded, off: _Loaded, flags: set[str]) -> str:
    """What switching ``flags`` off does besides untying; "" for nothing."""
    for module in root.modules():
        forward = inspect.unwrap(type(module).forward)
        if flags & _read_by(getattr(forward, "__code__", None)):
            return f"changes what {type(module).__name__} computes"
    if as_is.shapes != off.shapes:
        return "changes which weights it has"
    configs = [_compared(loaded.config.to_dict(), flags) for loaded in (as_is, off)]
    return "" if configs[0] == configs[1] else "changes more of it"


def _read_by(code: object) -> set[str]:
    """The names and strings in the code of a function and of those it defines; none where it is not Python's."""
    if not isinstance(code, CodeType):
        return {code} if isinstance(code, str) else set()
    return set(code.co_names).union(*map(_read_by, code.co_consts))


def _compared(config: Any, flags: set[str]) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _compared(value, flags) for key, value in config.items() if key not in (*flags, "_name_or_path")}


def _configs(root: nn.Module) -> list[Any]:
    """The configs of a model and of those in it, parts and all."""
    held = [module.config for module in root.modules() if hasattr(module, "config")]
    return list({id(part): part for config in held for part in _configs_in(config)}.values())


def _configs_in(config: Any) -> Iterator[Any]:
    if hasattr(config, "to_diff_dict"):
        yield config
        for part in vars(config).values():
            yield from _configs_in(part)


def _flags(config: Any) -> set[str]:
    """What of ``config`` ties something: ``tie_word_embeddings`` and its like."""
    return {name for name in dir(config) if name.startswith("tie_") and getattr(config, name) is True}


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Leaves the flags that tie weights as they were, whatever was made of them inside."""
    before = [(config, _flags(config)) for _, root in _roots(model) for config in _configs(root)]
    yield
    for config, flags in before:
        for flag in flags:
            setattr(config, flag, True)
