"""The hub's README.md of an adapter: what it is, how it is loaded, how it was trained, how good it is.

Everything is read from the files of the adapter and its run, so the same files give the same card; nothing local (paths,
host, time of writing) enters it. The last line holds a hash of the text: a card edited by hand is told from one that was not.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from rich.console import Console
from rich.markup import escape
from yaml import YAMLError  # what huggingface_hub reads front matter with

from duallora.errors import ConfigError, DualLoraError, IntegrityError, is_number
from duallora.store import adapters, checkpoint, record, untrusted
from duallora.store.run_folder import RunFolder
from duallora.tasks import TASKS, Example, Task, commonsense, e2e, glue, load_task, made_up, metrics
from duallora.terminal import say, shown

# The hub's names of what the built-in models were made from, and their license there.
HUB_NAMES = {
    "builtin:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "builtin:minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}
BUILT_IN_NOTE = {
    "builtin:smollm2-135m": "The base was the 4-bit GGUF edition of that model, widened to bfloat16: on the hub's own weights "
    "the metrics will differ a little, and the adapter's fingerprint check asks for `--lenient`."
}
PIPELINES = {"generate": "text-generation", "classify": "text-classification", "regress": "text-classification"}
TOKENIZER = "tokenizer_config.json"
RESAMPLES = 1000
CITATION = """## Citation

```bibtex
@misc{duallora,
  title = {Dual LoRA},
  note = {arXiv:2512.03402},
  url = {https://arxiv.org/abs/2512.03402}
}
```"""
CONVERSION = re.compile(r"lora-r\d+")


def card(
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    force: bool = False,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes the card to ``output`` (README.md of the adapter) and returns ``{"output", "base_model", "metadata", ...}``.

    ``options`` are those of `build`.

    Raises:
        ConfigError: no adapter, no hub id for the base model, or a card that was edited by hand and no ``force``.
        IntegrityError: the card, read back by huggingface_hub, is not what was meant.
    """
    console = console or Console()
    folder = adapter_folder(adapter)
    path = Path(output) if output is not None else folder / "README.md"
    text, metadata, notes = build(folder, **options)
    if path.exists() and not force and not (is_ours(path.read_text(encoding="utf-8")) or _is_blank(path)):
        raise ConfigError(
            f"{path} was edited by hand or written by another tool; --force overwrites it, or choose -o FILE"
        )
    base = str(metadata["base_model"])
    record.write_text(path, text)
    validate(path, base)
    for note in notes:
        say(console, "note", escape(note))
    say(console, "card", f"[bold]{shown(path)}[/], base model {escape(base)}")
    return {"output": str(path), "base_model": base, "metadata": metadata, "notes": notes}


def build(
    folder: Path,
    *,
    base_model: str | None = None,
    repo: str | None = None,
    license: str | None = None,
    language: str | None = None,
    datasets: Sequence[str] = (),
    results: Sequence[str | Path] = (),
    data_dir: str | Path | None = None,
) -> tuple[str, dict[str, Any], list[str]]:
    """(the card's text, its front matter, what a person should still see to) for the adapter in ``folder``.

    ``base_model`` is the hub id where the adapter names a folder of this machine, ``repo`` where the adapter will lie.
    ``results`` are files of ``duallora eval -o``, beside those found in the run folder; a metric gets a bootstrap interval
    where its predictions can be scored again (the task's data are here and are the same).
    """
    settings = untrusted.read(folder)
    sidecar, run = adapters.read_sidecar(folder), _run(folder)
    local = settings.get("base_model_name_or_path") or sidecar.get("base", {}).get("name")
    base = hub_id(base_model or local)
    if base is None:
        raise ConfigError(
            f"the base model is {base_model or local!r}, which is no name on the hub: give it with --base-model org/name"
        )
    kind = sidecar.get("kind") or ("classify" if settings.get("task_type") == "SEQ_CLS" else "generate")
    task = str(sidecar.get("task") or "")
    found = _datasets(task, run) if not datasets else list(datasets)
    scores = [*_validation(run, sidecar), *_results(folder, results, task, data_dir)]
    others = conversions(folder)
    license = license or ("apache-2.0" if local in HUB_NAMES else None)
    language = language or ("en" if task in TASKS else None)
    data = ModelCardData(
        library_name="peft",
        base_model=base,
        base_model_relation="adapter",
        pipeline_tag=PIPELINES[kind],
        tags=[f"base_model:adapter:{base}", "duallora", "dual-lora", "transformers", *(["lora"] if others else [])],
        datasets=found or None,
        license=license,
        language=language,
        model_name=repo or _title(folder, task),
        eval_results=_eval_results(scores, found, kind, task) or None,
    )
    if not data.eval_results:
        data.pop("model_name")
    notes = []
    if license is None:
        notes.append("no license is named: choose one with --license (apache-2.0, mit, ...)")
    if not found:
        notes.append("no data set is named: --dataset org/name if it is on the hub")
    parts = [
        f"# {repo.partition('/')[2] if repo else _title(folder, task)}",
        f"A [Dual LoRA](https://arxiv.org/abs/2512.03402) adapter for [{base}](https://huggingface.co/{base}). Each adapted "
        "weight is W0 + s ReLU(B A) . Sign(D C): one pair of factors says how far an entry moves, the other in which direction.",
        _usage(base, kind, repo or "ORG/NAME", sidecar.get("labels", ()), (folder / TOKENIZER).is_file()),
        _plain_lora(others, repo or "ORG/NAME"),
        _training(settings, sidecar, run, str(local)),
        _scores(scores),
        CITATION,
    ]
    body = "\n\n".join(part for part in parts if part) + "\n"
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    return f"{text}\n{_mark(text)}\n", data.to_dict(), notes


def adapter_folder(adapter: str | Path) -> Path:
    """The folder of a native Dual LoRA adapter; ConfigError for anything else."""
    folder = adapters.find_adapter(adapter, "a card is written for an adapter")
    if untrusted.read(folder).get("peft_type") != "DUALLORA":
        raise ConfigError(f"{adapter} is no Dual LoRA adapter; name the adapter that it was converted from")
    return folder


def hub_id(name: str | None) -> str | None:
    """The hub's id of a base model; None for a folder of this machine or nothing at all."""
    name = name or ""
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def conversions(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """``lora-rNN`` -> (folder, what duallora convert recorded), for those made from this very adapter.

    They lie in the adapter's folder, or beside it in the run's.
    """
    if not (folder / adapters.WEIGHTS).is_file():
        return {}
    ours = checkpoint.file_record(folder / adapters.WEIGHTS)["sha256"]
    places = [folder, folder.parent] if RunFolder(folder.parent).exists() else [folder]
    found = {}
    for path in (path for place in places for path in place.iterdir()):
        if CONVERSION.fullmatch(path.name) and adapters.is_adapter(path):
            sidecar = adapters.read_sidecar(path)
            if "conversion" in sidecar and sidecar.get("converted_from", {}).get(adapters.WEIGHTS) == ours:
                found[path.name] = (path, sidecar["conversion"])
    return dict(sorted(found.items(), key=lambda item: int(item[0].removeprefix("lora-r"))))


def is_ours(text: str) -> bool:
    """Whether the card was written here and not touched since."""
    body, _, last = text.rstrip("\n").rpartition("\n")
    return last == _mark(body)


def _is_blank(path: Path) -> bool:
    """Whether it is the form that PEFT leaves beside every adapter it saves, with nothing filled in."""
    form = ModelCard.from_template(ModelCardData()).text.strip()
    text = ModelCard.load(path, ignore_metadata_errors=True).text.strip()
    return re.fullmatch(r"(\s*### Framework versions\s*- PEFT \S+)?", text.removeprefix(form)) is not None


def validate(path: Path, base_model: str) -> None:
    """Reads the card as the hub's own library does.

    Raises IntegrityError where the front matter is not readable, or lacks library_name, base_model or pipeline_tag.
    """
    try:
        data = ModelCard.load(path).data
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{path}: the front matter cannot be read back: {error}") from error
    expected = {"library_name": ["peft"], "base_model": [base_model], "pipeline_tag": sorted({*PIPELINES.values()})}
    for key, values in expected.items():
        if data.get(key) not in values:
            raise IntegrityError(f"{path}: {key} is {data.get(key)!r}, expected {' or '.join(values)}")


def _mark(text: str) -> str:
    return f"<!-- duallora card {hashlib.sha256(text.encode()).hexdigest()[:32]} -->"


def _run(folder: Path) -> dict[str, Any]:
    """run.json of the run the adapter belongs to; empty where it came without one."""
    return dict(RunFolder(folder.parent).facts() or {}) if folder.name == "adapter" else {}


def _title(folder: Path, task: str) -> str:
    name = folder.parent.name if folder.name == "adapter" else folder.name
    return name or f"Dual LoRA {task}".strip()


def _datasets(task: str, run: dict[str, Any]) -> list[str]:
    """The hub's names of the data the adapter was trained on, where they are known."""
    if task in TASKS:
        if task in made_up.NAMES:
            return []
        loader = e2e if task in e2e.FORMS else commonsense if task in commonsense.NAMES else glue
        return re.findall(r"(?:^hub|,) ([\w.-]+/[\w.-]+)", loader.load(task, None).source)
    path = run.get("recipe", {}).get("data", {}).get("path")
    return [path] if path and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists() else []


# -- metrics -----------------------------------------------------------------------------------------------------------


def _validation(run: dict[str, Any], sidecar: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's own metrics on its held-out rows."""
    every = run.get("result", {}).get("metrics", {})
    chosen = {name: v for name, v in every.items() if is_number(v) and metrics.is_score(name)}
    if not chosen:
        return []
    rows = run.get("data", {}).get("validation")
    return [{"split": "validation", "n": rows, "metrics": chosen, "intervals": {}, "seeds": [run.get("seed")]}]


def _results(folder: Path, files: Sequence[str | Path], task: str, data_dir: str | Path | None) -> list[dict[str, Any]]:
    """The metrics of ``duallora eval -o`` files: those named, and those in the run folder that are of this adapter."""
    named = list(map(Path, files))
    own = [path for place in (folder, folder.parent) for path in sorted(place.glob("*.json")) if _run(folder)]
    found = []
    for path in dict.fromkeys([*named, *own]):
        try:
            result = record.read_json(path)
        except (OSError, ValueError):
            result = None
        if not isinstance(result, dict) or result.get("kind") != "eval" or "metrics" not in result:
            if path in named:
                raise ConfigError(f"{path} is no result of duallora eval -o; expected JSON whose kind is 'eval'")
            continue
        if path not in named and not _is_of(result.get("source"), folder):
            continue
        intervals = {}
        if (known := _examples(result, data_dir)) is not None:
            main = result["main_metric"]
            intervals[main] = interval(known[0], main, result["predictions"], known[1])
        facts = {key: result.get(key) for key in ("task", "split", "n", "metrics", "recipe")}
        found.append({**facts, "intervals": intervals})
    return found


def _is_of(source: Any, folder: Path) -> bool:
    """Whether what was scored, a run or an adapter, is the adapter in ``folder``."""
    try:
        found = adapters.find(source) if Path(str(source)).is_dir() else None
    except ConfigError:  # a folder whose adapter is gone
        return False
    return found is not None and found.resolve() == folder.resolve()


def _examples(result: dict[str, Any], data_dir: str | Path | None) -> tuple[Task, list[Example]] | None:
    """The task and the rows that were scored, if they are here and are the same; None otherwise."""
    name, split, predictions = result.get("task"), result.get("split"), result.get("predictions") or []
    if name not in TASKS or len(predictions) < 2:
        return None
    try:
        task = load_task(str(name), data_dir=data_dir)
        if task.fingerprint(str(split)) != result.get("data", {}).get(split):
            return None
    except (DualLoraError, OSError, ValueError, KeyError):  # no data here: the metrics stand without an interval
        return None
    return task, list(task.splits[str(split)][: len(predictions)])


def interval(task: Task, metric: str, predictions: Sequence[Any], examples: Sequence[Example]) -> list[float]:
    """[low, high]: the 95 % percentile bootstrap interval of ``metric`` over the rows."""
    chosen = metrics.get(metric, task.name)
    if not (chosen.statistics or chosen.compute):
        return []
    values = chosen.resample([predictions], examples, rounds=RESAMPLES)[:, 0]
    return [float(end) for end in np.percentile(values, [2.5, 97.5])]


def _eval_results(scores: list[dict[str, Any]], datasets: list[str], kind: str, task: str) -> list[EvalResult]:
    """The model-index: every metric that is no loss."""
    return [
        EvalResult(
            task_type=PIPELINES[kind],
            dataset_type=datasets[0] if datasets else "private",
            dataset_name=task or "the run's own data",
            dataset_split=score["split"],
            metric_type=name,
            metric_name=name,
            metric_value=round(float(value), 4),
        )
        for score in scores
        for name, value in score["metrics"].items()
        if not metrics.find(name).likelihood
    ]


# -- text --------------------------------------------------------------------------------------------------------------


def _usage(base: str, kind: str, repo: str, labels: Sequence[str], own_tokenizer: bool) -> str:
    auto = "AutoModelForCausalLM" if kind == "generate" else "AutoModelForSequenceClassification"
    names = extra = ""
    if labels:  # which PEFT does not keep; without them a pipeline prints LABEL_0
        names = f"id2label = {dict(enumerate(labels))!r}\n"
        extra = ", id2label=id2label, label2id={name: number for number, name in id2label.items()}"
    elif kind != "generate":
        extra = ", num_labels=1"
    return f"""## Use

```bash
pip install duallora
```

```python
import duallora  # registers the method; without it PEFT says KeyError: 'DUALLORA'
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

{names}base = {auto}.from_pretrained("{base}"{extra})
model = PeftModel.from_pretrained(base, "{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo if own_tokenizer else base}")
```"""


def _plain_lora(others: dict[str, tuple[Path, dict[str, Any]]], repo: str) -> str:
    if not others:
        return ""
    lines = [
        "## Without duallora: plain LoRA",
        "",
        "The same update as a LoRA of one rank, for PEFT alone, vLLM, SGLang and llama.cpp. dW of Dual LoRA has a high rank, "
        "so a LoRA keeps a part of it: the table says which, and what the metrics become.",
        "",
        "| folder | rank | of \\|dW\\|² kept | in the worst layer | relative error | adapter | as LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (_, facts) in others.items():
        cells = [_main_metrics(facts.get("scores", {}).get(which, {})) for which in ("adapter", "conversion")]
        lines.append(
            f"| `{name}/` | {facts['rank']} | {facts['energy']:.2%} | {facts['lowest_energy']:.2%} | "
            f"{facts['relative_error']:.2e} | {' | '.join(cells)} |"
        )
    first = next(iter(others))
    return "\n".join(
        [*lines, "", "```python", f'model = PeftModel.from_pretrained(base, "{repo}", subfolder="{first}")', "```"]
    )


def _main_metrics(scores: dict[str, float]) -> str:
    """The task's first metric and the loss."""
    names = [name for name in scores if not metrics.find(name).likelihood][:1]
    names += ["loss"] if "loss" in scores else []
    return ", ".join(f"{name} {scores[name]:.4g}" for name in names) or "not measured"


def _training(settings: dict[str, Any], sidecar: dict[str, Any], run: dict[str, Any], local: str) -> str:
    recipe = run.get("recipe", {})
    train, data = recipe.get("train", {}), run.get("data", {})
    versions = sidecar.get("versions") or run.get("versions") or {}
    ranks = [settings.get(name) or settings.get("r") for name in ("r1", "r2")]
    targets = settings.get("target_modules")
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(sidecar.get("labels", ())))
    rows = {
        "ranks r1, r2": f"{ranks[0]}, {ranks[1]}",
        "alpha": settings.get("alpha"),
        "target modules": _by_layer(targets) if isinstance(targets, list) else targets,
        "target parameters": ", ".join(settings.get("target_parameters") or ()) or None,
        "trained parameters": f"{run['parameters']['trainable']:,}" if "parameters" in run else None,
        "task": sidecar.get("task"),
        "classes": classes.replace("|", r"\|"),
        "rows of training data": f"{data['train']:,}" if "train" in data else None,
        "data (sha256)": ", ".join(f"{split} {digest[:16]}" for split, digest in sidecar.get("data", {}).items()),
        "base weights (sha256)": (sidecar.get("base", {}).get("fingerprint") or "")[:16],
        "optimizer steps": sidecar.get("steps"),
        "batch": train.get("batch_size", 0) * train.get("gradient_accumulation_steps", 1) or None,
        "learning rate": train.get("learning_rate"),
        "dtype of the base": sidecar.get("base", {}).get("dtype"),
        "seed": run.get("seed"),
        "hardware": run.get("device"),
        "time": f"{run['result']['seconds']:,.0f} s" if run.get("result", {}).get("seconds") else None,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit of duallora": sidecar.get("commit"),
    }
    table = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    text = ["## Training", "", "| | |", "|---|---|", *table]
    if local in BUILT_IN_NOTE:
        text += ["", BUILT_IN_NOTE[local]]
    return "\n".join(text)


def _by_layer(names: Sequence[str]) -> str:
    """``model.layers.*.q_proj (30)``: one entry for the same module in all layers, where each is named in full."""
    found = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sorted(found.items()))


def _scores(scores: list[dict[str, Any]]) -> str:
    if not scores:
        return "## Metrics\n\nNone were recorded with the adapter."
    lines = ["## Metrics", "", "| metric | value | 95 % interval | rows | split |", "|---|---|---|---|---|"]
    for score in scores:
        for name, value in score["metrics"].items():
            low_high = score["intervals"].get(name)
            shown_interval = f"{low_high[0]:.4g} to {low_high[1]:.4g}" if low_high else ""
            unit = " (percent)" if metrics.find(name).unit == "percent" else ""
            lines.append(f"| {name}{unit} | {float(value):.4g} | {shown_interval} | {score['n']} | {score['split']} |")
    intervals = any(score["intervals"] for score in scores)
    how = f"percentile bootstrap over the rows, {RESAMPLES:,} resamples; " if intervals else ""
    return "\n".join(
        [*lines, "", f"One training run ({how}no spread over seeds). `loss_before` is the base model's loss."]
    )
