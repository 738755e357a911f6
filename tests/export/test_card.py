"""The card is what the hub reads, is the same for the same files, names nothing of this machine, and spares a person's edits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from export.conftest import base_of
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from peft import PeftModel
from transformers import AutoModelForCausalLM

from duallora import cli
from duallora.errors import ConfigError, IntegrityError
from duallora.export import card, convert
from duallora.tasks import TASKS, load_data, load_task, made_up

BASE = "org/tiny-llama"


@pytest.fixture
def run(run_folder, tmp_path) -> Path:
    """A copy of the run, to write a card into."""
    return Path(shutil.copytree(run_folder, tmp_path / "runs" / "sums"))


def test_the_form_that_peft_leaves_is_written_over_until_somebody_fills_it_in(native, tmp_path, console):
    adapter = Path(shutil.copytree(native, tmp_path / "mine"))
    base = AutoModelForCausalLM.from_pretrained(base_of(native))
    PeftModel.from_pretrained(base, adapter).save_pretrained(adapter, save_embedding_layers=False)
    form = (adapter / "README.md").read_text()
    assert "[More Information Needed]" in form
    card.card(adapter, base_model=BASE, console=console)
    (adapter / "README.md").write_text(form.replace("[More Information Needed]", "me", 1))
    with pytest.raises(ConfigError, match=r"edited by hand.*--force"):
        card.card(adapter, base_model=BASE, console=console)


def test_the_hubs_own_library_reads_what_was_meant(run, tmp_path, console):
    convert.convert(run, run / "lora-r2", rank=2)
    facts = json.loads((run / "run.json").read_text())
    own, recipe = facts["result"]["metrics"], facts["recipe"]
    own |= {"spikes": [13, 21], "start_rows": 512, "rows_at_once": 2, "steps_without_gradient": 1}  # no metrics
    (run / "stray.json").write_text(json.dumps({"kind": "eval", "source": str(tmp_path), "metrics": {}}))
    (run / "run.json").write_text(json.dumps(facts))
    named = {"license": "mit", "language": "en", "datasets": ["me/sums"]}
    result = card.card(run, base_model=BASE, repo="me/sums", console=console, **named)
    path = run / "adapter" / "README.md"
    assert result["output"] == str(path)
    front = metadata_load(path)
    named |= {"library_name": "peft", "base_model": BASE, "base_model_relation": "adapter"}
    named["pipeline_tag"] = "text-generation"
    assert named.items() <= front.items()
    assert {"duallora", "lora", f"base_model:adapter:{BASE}"} <= set(front["tags"])
    (index,) = front["model-index"]
    values = {metric["type"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    assert values
    assert values == {name: pytest.approx(own[name], abs=1e-4) for name in values}
    bookkeeping = {"train_seconds", "spikes", "start_rows", "rows_at_once", "steps_without_gradient"}
    assert not {"loss", "perplexity", *bookkeeping} & set(values)
    text = ModelCard.load(path).text
    assert text.index("import duallora") < text.index('PeftModel.from_pretrained(base, "me/sums")')
    for words in (
        'AutoTokenizer.from_pretrained("me/sums")',
        "| target modules | model.layers.*.mlp.down_proj (2), ",
        f"| trained parameters | {facts['parameters']['trainable']:,} |",
        facts["fingerprints"]["data"]["train"][:16],
        "| seed | 0 |",
        "`lora-r2/` | 2 |",
        'subfolder="lora-r2"',
        "pip install duallora",
        "One training run",
        "arXiv:2512.03402",
    ):
        assert words in text
    for local in (str(run), str(Path.home()), "spikes", recipe["model"]["name"], recipe["data"]["path"]):
        assert local not in path.read_text()
    (run / "adapter" / "tokenizer_config.json").unlink()
    assert f'AutoTokenizer.from_pretrained("{BASE}")' in card.build(run / "adapter", base_model=BASE, repo="me/sums")[0]


@pytest.mark.parametrize("task", [task for task in TASKS if task not in made_up.NAMES])
def test_every_task_of_the_papers_names_its_data(task, monkeypatch):
    monkeypatch.delenv("DUALLORA_DATA", raising=False)
    assert card._datasets(task, {})


def test_the_same_files_give_the_same_bytes_and_an_edit_is_spared(run, console):
    path = run / "adapter" / "README.md"
    card.card(run, base_model=BASE, console=console)
    first = path.read_bytes()
    card.card(run, base_model=BASE, console=console)
    assert path.read_bytes() == first
    for edited in (first.decode().replace("## Training", "## My own words"), "# A form of another tool\n"):
        path.write_text(edited)
        with pytest.raises(ConfigError, match=r"edited by hand or written by another tool.*--force"):
            card.card(run, base_model=BASE, console=console)
        assert path.read_text() == edited
    card.card(run, base_model=BASE, force=True, console=console)
    assert path.read_bytes() == first


def test_a_base_model_of_this_machine_needs_a_name_on_the_hub(run, tmp_path):
    with pytest.raises(ConfigError, match="--base-model org/name"):
        card.card(run)
    assert not (run / "adapter" / "README.md").exists()
    assert card.hub_id("builtin:smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.hub_id("org/name") == "org/name"
    assert card.hub_id("gpt2") == "gpt2"
    for name in ("/models/llama", "./llama", "~/llama", "a/b/c", "builtin:other", "", None, "..", "org/na me"):
        assert card.hub_id(name) is None, name


def test_only_conversions_of_this_very_adapter_are_named(run, native):
    for name, rank in (("lora-r3", 3), ("lora-r20", 20), ("adapter/lora-r1", 1), ("lora-mine", 1)):
        convert.convert(run, run / name, rank=rank)
    convert.convert(native, run / "lora-r5", rank=5)
    assert list(card.conversions(run / "adapter")) == ["lora-r1", "lora-r3", "lora-r20"]


def test_a_bootstrap_interval_is_that_of_the_binomial(tmp_path):
    """60 of 100 right: 0.6 +- 1.96 sqrt(0.24 / 100), in percent."""
    rows = [json.dumps({"text": f"row {i}", "label": "yes" if i < 60 else "no"}) for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    task = load_data(str(tmp_path / "rows.jsonl"), eval_fraction=0.5)
    examples = [*task.splits["train"], *task.splits["validation"]]
    found = card.interval(task, "accuracy", [task.labels.index("yes")] * 100, examples)
    half = 1.96 * math.sqrt(0.24 / 100) * 100
    assert found == pytest.approx([60 - half, 60 + half], abs=1.5)
    assert found == card.interval(task, "accuracy", [task.labels.index("yes")] * 100, examples)


@pytest.fixture
def e2e_folder(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "data" / "e2e_nlg"
    folder.mkdir(parents=True)
    for name in ("train", "valid", "test"):
        lines = [f"name : Place {i} | area : town||Place {i} is a place in the town number {i} ." for i in range(12)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.delenv("DUALLORA_DATA", raising=False)
    return folder.parent


@pytest.mark.parametrize("same", [True, False])
def test_a_metric_has_an_interval_only_if_the_scored_rows_are_here(run, e2e_folder, console, monkeypatch, same):
    monkeypatch.setattr(card, "RESAMPLES", 60)
    task = load_task("e2e", data_dir=e2e_folder)
    examples = list(task.splits["test"])[:9]
    predictions = [e.references[0] if i % 3 else "Place is wrong" for i, e in enumerate(examples)]
    metrics = task.metrics(predictions, examples)
    result = {
        "kind": "eval", "source": str(run), "task": "e2e", "split": "test", "n": 9, "main_metric": "bleu",
        "metrics": metrics, "predictions": predictions, "recipe": {},
        "data": {"test": task.fingerprint("test") if same else "0" * 64},
    }  # fmt: skip
    (run / "scores.json").write_text(json.dumps(result))
    card.card(run, base_model=BASE, data_dir=e2e_folder, console=console)
    lines = (run / "adapter" / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| bleu (percent) |") and "test" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert float(cells[1]) == pytest.approx(metrics["bleu"], rel=1e-3)
    if same:
        low, high = map(float, cells[2].split(" to "))
        assert low < metrics["bleu"] < high
    else:
        assert cells[2] == ""
    with pytest.raises(ConfigError, match="no result of duallora eval"):
        card.card(run, base_model=BASE, results=[run / "run.json"], force=True)


def test_broken_front_matter_is_not_called_a_card(tmp_path):
    other = "---\nlibrary_name: peft\nbase_model: other/base\n---\n"
    for text in ("---\nlibrary_name: [\n---\n", other, "no front matter"):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(IntegrityError):
            card.validate(tmp_path / "README.md", BASE)


def test_the_verb_and_a_folder_that_is_no_native_adapter(run, tmp_path, capsys):
    convert.convert(run, run / "lora-r2", rank=2)
    assert cli.run(["card", str(run / "lora-r2"), "--base-model", BASE]) == 2
    assert "converted from" in capsys.readouterr().err
    line = ["card", str(run), "--base-model", BASE, "-o", str(tmp_path / "card.md"), "--license", "mit", "--json"]
    assert cli.run(line) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["metadata"]["license"] == "mit"
    assert payload["notes"] == ["no data set is named: --dataset org/name if it is on the hub"]
    assert (tmp_path / "card.md").is_file()


def test_a_classifiers_card_names_its_classes_as_the_model_is_to_be_told():
    """Names with quotes and commas too: the code shown is run, up to the download."""
    names = ["no", 'so, "so" it\'s', "yes"]
    lines = card._usage("org/base", "classify", "me/mine", names, True).splitlines()
    known: dict = {}
    exec(next(line for line in lines if line.startswith("id2label")), known)
    call = next(line for line in lines if line.startswith("base = "))
    exec(call.replace("AutoModelForSequenceClassification.from_pretrained", "dict").replace('"org/base", ', ""), known)
    by_number = dict(enumerate(names))
    assert known["base"] == {"id2label": by_number, "label2id": {name: at for at, name in by_number.items()}}
    assert "num_labels=1" in card._usage("org/base", "regress", "me/mine", (), True)
