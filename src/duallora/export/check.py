"""Is this adapter whole, does it fit its base model, does it do anything, and which serving engine takes it?

Files and configuration are judged before any model is loaded, so that a hostile adapter costs nothing; every finding is
collected, and the exit code is that of the first failure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.markup import escape
from safetensors import safe_open
from torch import Tensor

from duallora.core.gate import AUTO_STEPS, closed_gate_message
from duallora.errors import DualLoraError, IntegrityError, NonFiniteError
from duallora.export import merge
from duallora.store import adapters, models, untrusted
from duallora.terminal import quiet_libraries, shown

Target = Literal["vllm", "sglang", "llamacpp"]
Shapes = Mapping[str, tuple[int, ...]]

# vllm/config/lora.py, MaxLoRARanks; the default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
# Initializations that leave the base weights as they are (vllm/lora/peft_helper.py); PEFT changes them by the others.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_COLORS = {"ok": "green", "note": "yellow", "failed": "red"}


class Finding(NamedTuple):
    """One thing that was looked at; ``exit_code`` is 0 unless it ``failed``."""

    name: str
    status: str  # ok, note or failed
    message: str
    exit_code: int = 0


class Verdict(NamedTuple):
    """Whether an engine takes the files; ``reasons`` against it, and the ``flags`` to start it with."""

    reasons: list[str]
    flags: str

    @property
    def accepted(self) -> bool:
        return not self.reasons


def check(
    adapter: str | Path,
    *,
    base: str | None = None,
    target: Target | None = None,
    files_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Examines ``adapter`` and returns ``{"ok", "exit_code", "findings", "targets", "effect", ...}``; raises no verdict.

    ``base`` stands in for the base model's name, ``files_only`` loads no model, and ``target`` makes it a failure if
    that engine does not take the adapter.

    Raises ConfigError only where ``adapter`` is no adapter at all.
    """
    console = console or Console()
    folder = adapters.find_adapter(adapter, "there is nothing to check")
    report = _Report(console)
    with quiet_libraries():
        config, shapes = _files(report, folder)
        if shapes and config:
            named = {"base_model_name_or_path": base} if base else {}
            _targets(report, {**config, **named}, shapes, target)
            if not report.errors and not files_only:
                _model(report, adapter, base, config)
    first = next((finding.exit_code for finding in report.findings if finding.exit_code), 0)
    outcome = "[red]the adapter is not to be used as it is[/]" if first else "[green]the adapter is sound[/]"
    console.print(f"{shown(folder)}: {outcome}", soft_wrap=True)
    targets = {name: {"accepted": found.accepted, **found._asdict()} for name, found in report.targets.items()}
    return {
        "ok": not first,
        "exit_code": first,
        "adapter": str(adapter),
        "method": str((config or {}).get("peft_type")),
        "base": base or (config or {}).get("base_model_name_or_path"),
        "findings": [finding._asdict() for finding in report.findings],
        "targets": targets,
        "effect": report.effect,
    }


def require_sound(folder: Path) -> list[str]:
    """Looks at the files of an adapter, or of a model that has their hashes, as `check` does; returns the notes.

    Raises the first failure: ConfigError, IntegrityError, NonFiniteError.
    """
    report = _Report(Console(quiet=True))
    if adapters.is_adapter(folder):
        _files(report, folder)
    else:
        adapters.compare_with_recorded(folder, adapters.read_sidecar(folder))
    for error in report.errors:
        raise error
    return [finding.message for finding in report.findings if finding.status == "note"]


class _Report:
    """Collects the findings and shows each as it comes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.findings: list[Finding] = []
        self.targets: dict[str, Verdict] = {}
        self.effect: dict[str, float] | None = None
        self.errors: list[DualLoraError] = []  # what makes loading it pointless; a target's refusal does not

    def add(self, name: str, status: str, message: str, exit_code: int = 0) -> None:
        finding = Finding(name, status, message, exit_code)
        self.findings.append(finding)
        self.console.print(f"{name:<9}[{_COLORS[status]}]{status:<6}[/] {message}", soft_wrap=True)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """What is said inside is an ``ok``, an error of this package a failure with its exit code."""
        try:
            yield lambda message: self.add(name, "ok", message)
        except DualLoraError as error:
            self.errors.append(error)
            self.add(name, "failed", escape(str(error)), error.exit_code)


def _files(report: _Report, folder: Path) -> tuple[dict[str, Any] | None, dict[str, tuple[int, ...]] | None]:
    """What can be told from the files alone: hashes, settings, values, the gate."""
    config = shapes = None
    with report.step("files") as say:
        sidecar = adapters.read_sidecar(folder)
        shapes = adapters.check_files(folder, sidecar)
        known = len(sidecar.get("files", ()))
        say(f"{known} files with the recorded hashes" if known else f"no {adapters.SIDECAR}, so no recorded hashes")
    if shapes is None:
        return None, None
    with report.step("config") as say:
        where = folder / "adapter_config.json"
        config = untrusted.read(folder)
        untrusted.check(config, shapes, where)
        untrusted.check_patterns(config, {_module(name) for name in shapes}, where)
        settings = adapters.read_config(folder)
        say(escape(f"{config.get('peft_type')} on {settings.base_model_name_or_path}, {len(shapes)} tensors"))
    if report.errors:
        return None, None
    with report.step("values") as say:
        dtypes, gates = _values(folder / adapters.WEIGHTS)
        say(f"finite, {', '.join(sorted(dtypes))}")
        if gates and config is not None:
            warmup = config.get("warmup_steps", 0) if config.get("warmup") == "ramp" else 0
            warmup = AUTO_STEPS if warmup == "auto" else warmup  # of one that no step has trained yet
            closed = closed_gate_message(min(gates), warmup)
            report.add(
                "gate", "note" if closed else "ok", closed or f"open ({min(gates)} steps, the ramp has {warmup})"
            )
    return config, shapes


def _targets(report: _Report, config: Mapping[str, Any], shapes: Shapes, target: Target | None) -> None:
    """Every engine's verdict; a refusal by the one asked for is a failure."""
    report.targets = {name: judge(config, shapes) for name, judge in TARGETS.items()}
    for name, verdict in report.targets.items():
        asked = name == target
        if verdict.accepted:
            report.add(name, "ok", escape(verdict.flags))
        elif asked or config.get("peft_type") == "LORA":
            status, code = ("failed", 2) if asked else ("note", 0)
            report.add(name, status, escape("not accepted: " + "; ".join(verdict.reasons)), code)
    if config.get("peft_type") != "LORA" and target is None:
        report.add("serving", "note", escape(str(_not_a_lora(config))))


def _values(weights: Path) -> tuple[set[str], set[int]]:
    """The dtypes of the stored tensors and the counters of the gate; one tensor is in memory at a time."""
    dtypes: set[str] = set()
    gates: set[int] = set()
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no iterator)
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{weights}: {name} holds NaN or infinite values; train again with a lower rate")
            if name.endswith("duallora_step"):
                gates.add(int(tensor))
            elif tensor.is_floating_point():
                dtypes.add(str(tensor.dtype).removeprefix("torch."))
    return dtypes, gates


def _model(report: _Report, adapter: str | Path, base: str | None, config: Mapping[str, Any]) -> None:
    """What needs the base model: whether the adapter fits it, and what it changes."""
    with report.step("base") as say:
        model, tokenizer = adapters.load_adapter(adapter, adapters.adapter_kind(adapter), base=base)
        recorded = adapters.read_sidecar(adapters.find(adapter) or Path()).get("base", {}).get("fingerprint")
        known = f"the weights it was trained on ({recorded[:16]}...)" if recorded else "no recorded weights to compare"
        say(f"every tensor fits; {known}")
    if report.errors:
        return
    with report.step("layers") as say:
        dead, total = _dead_layers(model)
        if dead and len(dead) == total and not config.get("modules_to_save") and config.get("bias", "none") == "none":
            raise IntegrityError(f"the adapter has no effect: dW = 0 in all {total} layers")
        if dead:
            report.add("layers", "note", escape(f"dW = 0 in {len(dead)} of {total} layers (first: {dead[0]})"))
        else:
            say(f"dW is not zero in any of the {total} layers" if total else "no dW to look at")
    if report.errors:
        return
    with report.step("effect") as say:
        after = merge.probe(model, tokenizer)
        with model.disable_adapter():
            before = merge.probe(model, tokenizer)
        # A learned prompt's positions stand before the text's.
        after = [new[-old.shape[0] :] for new, old in zip(after, before, strict=True)]
        report.effect = effect = compare(before, after)
        if effect["max"] == 0:
            raise IntegrityError("the adapter has no effect: the logits on the probe prompts are the base model's")
        say(
            f"logits change by {effect['mean']:.3g} on average, {effect['max']:.3g} at most; KL from the base model "
            f"{effect['kl']:.3g} nats per position; another first choice at {effect['changed']:.0%} of them"
        )


def _dead_layers(model: PeftModel) -> tuple[list[str], int]:
    """Names of the layers whose dW is zero everywhere, and how many were looked at; BOFT's are no matrices."""
    dead, total = [], 0
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            with torch.no_grad():
                dW = module.get_delta_weight("default")
            if isinstance(dW, Tensor):
                total += 1
                dead += [] if bool(dW.any()) else [name]
    return dead, total


def compare(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    """How far the logits ``after`` are from ``before``, both [positions, vocabulary] or [classes] per text.

    ``mean`` and ``max`` of |difference|; ``kl``, the mean over positions of KL(after || before) in nats; ``changed``, the
    share of positions whose likeliest token is another.
    """
    old = torch.cat([torch.atleast_2d(logits) for logits in before]).double()
    new = torch.cat([torch.atleast_2d(logits) for logits in after]).double()
    difference = (new - old).abs()
    p, q = new.log_softmax(-1), old.log_softmax(-1)
    return {
        "mean": float(difference.mean()),
        "max": float(difference.max()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0)),
        "changed": float((new.argmax(-1) != old.argmax(-1)).double().mean()),
    }


# -- serving engines ---------------------------------------------------------------------------------------------------
# What follows is each engine's own source, read; `make engines` holds vLLM and llama.cpp to it.


def vllm(config: Mapping[str, Any], shapes: Shapes) -> Verdict:
    """vLLM 0.32: vllm/lora/peft_helper.py, lora_model.py, config/lora.py."""
    reasons = []
    for key in ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"):
        if config.get(key):
            reasons.append(f"{key}={config[key]!r} is refused")
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r}: trained biases are refused")
    others = [name for name in config.get("modules_to_save") or () if name not in ("classifier", "score")]
    if others:
        reasons.append(f"modules_to_save={others}: only classifier and score are taken")
    flag = vllm_rank(config)
    if flag == 0:
        reasons.append(f"rank {_largest_rank(config)} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank")
    size = f" --max-lora-rank {flag}" if flag > VLLM_DEFAULT_RANK else ""
    start = f"vllm serve BASE --enable-lora{size} --lora-modules NAME=FOLDER"
    return _verdict(config, shapes, ("r", "lora_alpha", "target_modules"), reasons, start)


def sglang(config: Mapping[str, Any], shapes: Shapes) -> Verdict:
    """SGLang main, August 2026: python/sglang/srt/lora/lora_config.py, lora.py."""
    reasons = []
    if config.get("use_dora"):
        reasons.append("use_dora=True: DoRA's lengths are not applied")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        reasons.append("trained biases are not applied")
    if config.get("use_rslora"):
        reasons.append("use_rslora=True: the scale is taken as lora_alpha / r")
    for key, own in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if {*(config.get(key) or {}).values()} - {config.get(own)}:
            reasons.append(f"{key}: every layer is taken to have {own}={config.get(own)}")
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all-linear", "all"):
        reasons.append(f"target_modules is the pattern {targets[:40]!r}; a list of names is expected")
    if config.get("modules_to_save"):
        reasons.append(f"modules_to_save={list(config['modules_to_save'])}: modules trained in full are not applied")
    modules = {_module(name) for name in shapes}
    # q, k and v are stacked into one matrix, gate and up into another: a k may be missing, and an up.
    for needs, needed in (("q_proj", "v_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        alone = [m for m in modules if m.endswith(needs) and m.removesuffix(needs) + needed not in modules]
        if alone:
            reasons.append(f"{needs} is adapted without {needed} in {len(alone)} layers, and they are stacked")
    start = "python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths NAME=FOLDER"
    return _verdict(config, shapes, ("r", "lora_alpha", "target_modules"), reasons, start)


def llamacpp(config: Mapping[str, Any], shapes: Shapes) -> Verdict:
    """llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.h (scale = lora_alpha / rank of the tensor)."""
    reasons = []
    for key in ("alora_invocation_tokens", "layer_replication"):
        if config.get(key):
            reasons.append(f"{key}={config[key]!r} is not applied")
    if any("lora_embedding" in name for name in shapes):
        reasons.append("embeddings are adapted, and PEFT's layout of them is not the one its converter expects")
    if any("_layernorm" in name or ".norm" in name for name in shapes):
        reasons.append("norms are trained, which the converter writes and llama.cpp leaves out")
    if any(_module(name).endswith("lm_head") for name in shapes) and _is_tied(config):
        reasons.append("lm_head is adapted, and where it is tied to the embeddings a GGUF file has no such tensor")
    known = r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$|\.base_layer\.weight$|_layernorm|\.norm"
    if strange := [name for name in shapes if not re.search(known, name)]:
        reasons.append(f"{len(strange)} tensors are no lora_A or lora_B (first: {strange[0]}), so the converter exits")
    if config.get("lora_alpha") is not None and not reasons:
        ranks = {_module(name): shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight")}
        reasons += [wrong for module, rank in ranks.items() if (wrong := _other_scale(config, module, rank))][:1]
    start = "python convert_lora_to_gguf.py --base BASE_FOLDER FOLDER; llama-server -m BASE.gguf --lora FOLDER.gguf"
    return _verdict(config, shapes, ("lora_alpha",), reasons, start)


def _verdict(
    config: Mapping[str, Any], shapes: Shapes, needed: tuple[str, ...], reasons: list[str], start: str
) -> Verdict:
    """What holds for every engine before its own ``reasons``; ``start`` where there are none."""
    if refusal := _not_a_lora(config):
        return Verdict([refusal], "")
    missing = [key for key in needed if config.get(key) is None]
    convolutions = [_module(name) for name, shape in shapes.items() if "lora_" in name and len(shape) > 2]
    every = [f"adapter_config.json lacks {', '.join(missing)}"] if missing else []
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        every.append(f"init_lora_weights={init!r} changes the base weights, so it is refused")
    if experts := config.get("target_parameters"):
        every.append(
            f"target_parameters={experts}: LoRA on fused experts was not tried in an engine; serve the merged model"
        )
    if tokens := config.get("trainable_token_indices"):
        every.append(
            f"trainable_token_indices={str(tokens)[:40]}: a LoRA has no embeddings of single tokens; serve the merged model"
        )
    every += reasons + ([f"convolutions are adapted ({convolutions[0]})"] if convolutions else [])
    return Verdict(every, "" if every else start)


TARGETS: dict[str, Callable[[Mapping[str, Any], Shapes], Verdict]] = {
    "vllm": vllm,
    "sglang": sglang,
    "llamacpp": llamacpp,
}


def _not_a_lora(config: Mapping[str, Any]) -> str | None:
    if config.get("peft_type") == "LORA":
        return None
    return (
        f"{config.get('peft_type')} is not served natively, only plain LoRA is: duallora convert ADAPTER -o FOLDER --rank 64, "
        "or duallora merge ADAPTER -o FOLDER"
    )


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the base's head is its embeddings; also where its configuration cannot be read."""
    name = config.get("base_model_name_or_path")
    try:
        base = models.load_config(name, revision=config.get("revision")) if name else None
    except DualLoraError:
        return True
    return base is None or bool(base.get_text_config().tie_word_embeddings)


def vllm_rank(config: Mapping[str, Any]) -> int:
    """The smallest --max-lora-rank that holds every rank the configuration names; 0 where none does."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= _largest_rank(config)), 0)


def _largest_rank(config: Mapping[str, Any]) -> int:
    ranks = (config.get("r"), *(config.get("rank_pattern") or {}).values())
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)


def _other_scale(config: Mapping[str, Any], module: str, rank: int) -> str | None:
    """Why llama.cpp's lora_alpha / rank is not the scale PEFT trained this module with."""
    alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    told = _of_pattern(config.get("rank_pattern"), module, config.get("r", rank))
    meant = alpha / (told**0.5 if config.get("use_rslora") else told)
    taken = config["lora_alpha"] / rank
    if abs(meant - taken) <= 1e-6 * abs(meant):
        return None
    return f"{module} was trained with the scale {meant:.4g}, and lora_alpha / rank is {taken:.4g}"


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module's name, at a dot."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _module(tensor: str) -> str:
    """``base_model.model.model.layers.0.q_proj.lora_A.weight`` -> ``model.layers.0.q_proj``."""
    name = tensor.removeprefix("base_model.model.")
    return re.sub(r"\.(lora_|duallora_)\w+(\.weight|\.bias)?$", "", name)
