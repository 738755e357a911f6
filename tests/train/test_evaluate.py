"""Scores are what a slow loop by hand gives; an adapter is loaded whole, on its own base, or not at all."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from damage import bit_flip, half
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from duallora.errors import ConfigError, DataError, IntegrityError, NonFiniteError
from duallora.store import adapters, checkpoint, record
from duallora.store.models import load_model
from duallora.tasks import Example, Task, encode, encode_prompt, load_data
from duallora.train import evaluate
from duallora.tuner import Linear

SHORT = {"max_new_tokens": 1}


@pytest.fixture
def task(sums):
    return load_data(str(sums), eval_fraction=0.5)


def loss_by_hand(model, tokenizer, examples):
    """Row by row, token by token, in float64, no padding."""
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            for row in encode(example, tokenizer, max_length=512):
                logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
                for position, label in enumerate(row.labels[1:]):
                    if label != -100:
                        scores = logits[position]
                        total += math.log(sum(math.exp(score) for score in scores.tolist())) - scores[label].item()
                        count += 1
    return total / count


def test_the_loss_is_the_mean_over_trained_tokens_whatever_the_batch(trained, task):
    """Trainer's own loss is a mean of batch means, in which a token of a short answer weighs more."""
    model, tokenizer = adapters.load_adapter(trained(), "generate")
    how = {"batch_size": 3, "max_length": 64, "generation": SHORT}
    result = evaluate.evaluate(model, tokenizer, task, split="validation", **how)
    expected = loss_by_hand(model, tokenizer, task.splits["validation"])
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    for answer, example in zip(result.answers, result.examples, strict=True):
        alone = loss_by_hand(model, tokenizer, [example])
        assert -answer.log_likelihood / answer.tokens == pytest.approx(alone, rel=1e-5)


def test_batched_generation_equals_one_by_one_and_keeps_the_order(trained, task):
    """Sorting by length and padding on the left must not show."""
    model, tokenizer = adapters.load_adapter(trained(), "generate")
    examples = list(task.splits["validation"])
    assert len({len(example.prompt) for example in examples}) > 2
    together = evaluate.generate(model, tokenizer, examples, batch_size=5, max_new_tokens=7)
    alone = [evaluate.generate(model, tokenizer, [example], max_new_tokens=7)[0] for example in examples]
    assert together == alone
    assert len(set(alone)) > 1


def test_evaluation_builds_each_weight_once_and_leaves_no_trace(trained, task, monkeypatch):
    """Not in every forward, of which a generation has one for each token; and without a word on a gate that moves."""
    model, tokenizer = adapters.load_adapter(trained(), "generate")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    model.train()
    built, build = [], Linear._merged_weight
    monkeypatch.setattr(Linear, "_merged_weight", lambda self, *given: built.append(self) or build(self, *given))
    evaluate.evaluate(model, tokenizer, task, split="validation", limit=4, max_length=64, generation=SHORT)
    assert built == layers
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_answer_compared_is_the_extracted_one(trained, task):
    model, tokenizer = adapters.load_adapter(trained(), "generate")
    seen = {}

    def metrics(predictions, examples):
        seen["predictions"], seen["examples"] = predictions, examples
        return {"share": 100.0}

    examples = [Example(prompt="1 plus 1 is", answer=" 2", references=("2",))] * 2
    odd = Task(
        name="odd", kind="generate", splits={"test": examples}, format="", metrics=metrics, main_metric="share",
        generation={"max_new_tokens": 2}, extract=lambda text, example: f"<{len(text)}>",
    )  # fmt: skip
    result = evaluate.evaluate(model, tokenizer, odd)
    assert result.predictions == seen["predictions"]
    assert all(prediction.startswith("<") for prediction in result.predictions)
    assert result.metrics["share"] == 100.0
    assert result.examples == examples == seen["examples"]


def test_classes_come_back_in_order_with_the_mean_loss_over_rows(trained, moods):
    model, tokenizer = adapters.load_adapter(trained("classify"), "classify")
    task = load_data(str(moods), eval_fraction=0.5)
    result = evaluate.evaluate(model, tokenizer, task, split="validation", batch_size=5)
    losses, classes = [], []
    for example in task.splits["validation"]:
        with torch.no_grad():
            logits = model(**tokenizer(*example.texts, return_tensors="pt")).logits[0].double()
        losses.append(torch.logsumexp(logits, 0).item() - logits[example.label].item())
        classes.append(int(logits.argmax()))
    assert result.predictions == classes
    assert result.metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_regression_gives_floats_and_the_squared_error(tiny_encoder_folder):
    torch.manual_seed(0)
    model, tokenizer = load_model(str(tiny_encoder_folder), "regress")
    examples = [Example(texts=("a b", "c"), label=1.5), Example(texts=("d",), label=-2)]
    task = Task(
        name="r", kind="regress", splits={"test": examples}, format="", main_metric="n",
        metrics=lambda predictions, examples: {"n": float(len(predictions))},
    )  # fmt: skip
    result = evaluate.evaluate(model, tokenizer, task, batch_size=1)
    with torch.no_grad():
        outputs = [model(**tokenizer(*example.texts, return_tensors="pt")).logits.item() for example in examples]
    assert result.predictions == pytest.approx(outputs, rel=1e-5)
    assert result.metrics["loss"] == pytest.approx(((outputs[0] - 1.5) ** 2 + (outputs[1] + 2) ** 2) / 2, rel=1e-5)


def test_an_absent_or_empty_split_is_named(trained, task):
    with pytest.raises(ConfigError, match="no split 'dev'; it has train, validation"):
        evaluate.select(task, "dev")
    with pytest.raises(DataError, match="empty"):
        evaluate.select(task, "validation", 0)


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["generate", "classify"])
def test_a_loaded_adapter_has_the_loss_that_training_ended_with(trained, make_recipe, held_out_loss, kind):
    """Whether the run is named or its adapter: the head and its classes come with it."""
    expected = record.read_json(trained(kind) / "run.json")["result"]["metrics"]["loss"]
    for source in (trained(kind), trained(kind) / "adapter"):
        assert held_out_loss(source, make_recipe(kind=kind), kind) == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(trained() / "adapter", tmp_path / "adapter"))


def test_another_base_is_refused_with_both_fingerprints(adapter, tiny_causal_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_causal_folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = record.read_json(adapter / "adapter_config.json")
    record.write_json(adapter / "adapter_config.json", {**config, "base_model_name_or_path": str(other)})
    without_record(adapter, "adapter_config.json")
    recorded = record.read_json(adapter / "duallora.json")["base"]["fingerprint"]
    with pytest.raises(IntegrityError) as caught:
        adapters.load_adapter(adapter, "generate")
    assert recorded[:16] in str(caught.value)
    assert str(other) in str(caught.value)
    adapters.load_adapter(adapter, "generate", strict=False)


def without_record(adapter, name):
    """Takes a file out of the recorded hashes, so that the checks behind them are reached."""
    sidecar = record.read_json(adapter / "duallora.json")
    del sidecar["files"][name]
    record.write_json(adapter / "duallora.json", sidecar)


@pytest.mark.parametrize(("damage", "recorded"), [(half, False), (bit_flip, True)])
def test_damaged_weights_are_refused_with_the_files_name(adapter, damage, recorded):
    """Without the record only the format's own checks are left, which a flipped bit passes."""
    damage(adapter / "adapter_model.safetensors")
    if not recorded:
        (adapter / "duallora.json").unlink()
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        adapters.load_adapter(adapter, "generate")


def test_a_pickle_is_refused_unread(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(IntegrityError, match="pickle"):
        adapters.load_adapter(adapter, "generate")
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        adapters.load_adapter(adapter, "generate")


def drop_one(tensors):
    del tensors[sorted(tensors)[5]]


def add_one(tensors):
    tensors["base_model.model.model.layers.9.self_attn.q_proj.duallora_A"] = torch.ones(3, 32)


def reshape_one(tensors):
    name = next(name for name in sorted(tensors) if name.endswith("duallora_A"))
    tensors[name] = torch.ones(7, 32)


@pytest.mark.parametrize(
    ("edit", "reason"), [(drop_one, "1 missing"), (add_one, "1 unexpected"), (reshape_one, "duallora_A")]
)
def test_missing_added_and_misshapen_tensors_are_errors_not_warnings(adapter, edit, reason):
    """PEFT warns and goes on with a model that is partly the base."""
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    edit(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    (adapter / "duallora.json").unlink()
    with pytest.raises(IntegrityError, match=reason):
        adapters.load_adapter(adapter, "generate", strict=False)


@pytest.mark.parametrize(
    "content", ["{", "[]", json.dumps({"peft_type": "DUALORA"}), json.dumps({"peft_type": "DUALLORA", "r": -1})]
)
def test_a_config_that_cannot_be_used_is_named(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    without_record(adapter, "adapter_config.json")
    with pytest.raises((IntegrityError, ConfigError), match=r"adapter_config\.json|r=-1"):
        adapters.load_adapter(adapter, "generate")


def test_the_wrong_kind_of_task_is_said(adapter):
    with pytest.raises(ConfigError, match="trained for CAUSAL_LM"):
        adapters.load_adapter(adapter, "classify")


def test_what_is_not_there_is_said(tmp_path, trained):
    with pytest.raises(ConfigError, match="no such folder"):
        adapters.load_adapter(tmp_path / "absent", "generate")
    with pytest.raises(ConfigError, match=r"neither adapter_config\.json nor config\.json"):
        adapters.load_adapter(tmp_path, "generate")
    unfinished = tmp_path / "run"
    shutil.copytree(trained(), unfinished)
    shutil.rmtree(unfinished / "adapter")
    with pytest.raises(ConfigError, match=r"without a finished adapter .*--resume auto"):
        adapters.load_adapter(unfinished, "generate")


def test_an_adapter_of_plain_peft_loads_without_a_sidecar(tiny_causal_folder, tmp_path):
    torch.manual_seed(1)
    model, _ = load_model(str(tiny_causal_folder), "generate")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(tiny_causal_folder)
    model.save_pretrained(tmp_path / "lora")
    loaded, _ = adapters.load_adapter(tmp_path / "lora", "generate")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_dtype_is_that_of_training_unless_asked(trained):
    assert adapters.load_adapter(trained(), "generate")[0].dtype == torch.float32
    assert adapters.load_adapter(trained(), "generate", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_no_repeat_ngrams_sees_generated_tokens_alone(trained, monkeypatch):
    """An answer that repeats its prompt must be sayable; one that repeats itself must not."""
    model, tokenizer = adapters.load_adapter(trained(), "generate")
    prompt = torch.tensor([[5, 6, 7, 8]])
    own = evaluate._OwnNGrams(2, start=4)
    scores = torch.zeros(1, model.config.vocab_size)
    after_five = own(torch.tensor([[5, 6, 7, 8, 5]]), scores.clone())
    assert torch.isfinite(after_five[0, 6])  # "5 6" stands in the prompt only
    after_again = own(torch.tensor([[5, 6, 7, 8, 5, 6, 5]]), scores.clone())
    assert after_again[0, 6] == -math.inf  # "5 6" was generated before
    assert torch.equal(evaluate._OwnNGrams(0, start=4)(prompt, scores), scores)
    examples = [Example(prompt="one two", answer="three")]
    outputs = []
    plain = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: outputs.append(plain(**kwargs)) or outputs[-1])
    evaluate.generate(model, tokenizer, examples, num_beams=3, no_repeat_ngram_size=1, max_new_tokens=6)
    generated = outputs[0][0, len(encode_prompt(examples[0], tokenizer, max_length=64)) :].tolist()
    assert len(generated) == len(set(generated)) > 1


def test_the_models_own_generation_settings_do_not_change_the_score(trained):
    model, tokenizer = adapters.load_adapter(trained(), "generate")
    examples = [Example(prompt=f"{i} plus {i} is", answer=str(2 * i)) for i in range(4)]
    want = evaluate.generate(model, tokenizer, examples, max_new_tokens=12)
    for config in {id(c): c for c in (model.generation_config, model.get_base_model().generation_config)}.values():
        config.repetition_penalty, config.no_repeat_ngram_size, config.do_sample = 1.9, 1, True
    assert evaluate.generate(model, tokenizer, examples, max_new_tokens=12) == want


def test_a_loss_that_is_not_finite_is_an_error_and_not_a_score(trained, task):
    model, tokenizer = adapters.load_adapter(trained(), "generate")
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the loss on the validation rows is nan"):
        evaluate.evaluate(model, tokenizer, task, split="validation", max_length=64, generation=SHORT)


def test_a_chats_turn_mark_ends_an_answer_though_a_line_break_follows_it(tiny_tokenizer):
    """ChatML writes a line break after <|im_end|>, and this tokenizer, like many, does not list the mark as its own."""
    mark, own = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"), tiny_tokenizer.eos_token_id
    assert mark != own
    assert mark not in tiny_tokenizer.all_special_ids
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, own]))
    assert evaluate.end_tokens(model, tiny_tokenizer, chat=True) == sorted({7, own, mark})
    assert evaluate.end_tokens(model, tiny_tokenizer, chat=False) == sorted({7, own})


# Shows reasoning in the last turn alone; a call of tools ends with a mark of its own.
FORGETS = (
    "{% if tools %}{{ tools[0].function.name + '<|im_end|>' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}"
    "{% if loop.last %}{{ m.reasoning_content or '' }}{% endif %}{{ m.content }}{% for c in m.tool_calls %}"
    "{{ '{' + c.function.name + (c.function.arguments | tojson) + '}' }}{% endfor %}{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


def test_a_chat_is_scored_as_it_is_trained(tiny_causal_folder, make_tokenizer, tmp_path):
    """Several sequences of a chat are one row of the result; what the model is to write is the template's writing."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": "{}"}}]}
    asks, thinks = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "hm "}
    rows = [
        {"messages": [asks, thinks, asks, {**thinks, "content": "b"}]},
        {"messages": [asks, {"role": "assistant", "content": "c"}]},
        {"messages": [asks, {**thinks, "weight": 0}, asks, call], "tools": [{"name": "find"}]},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_data(str(tmp_path / "c.jsonl"), eval_data=str(tmp_path / "c.jsonl"))
    model, _ = load_model(str(tiny_causal_folder), "generate")
    tokenizer = make_tokenizer(chat_template=FORGETS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    model.resize_token_embeddings(len(tokenizer))
    result = evaluate.evaluate(model, tokenizer, task, split="validation", generation=SHORT)
    assert len(result.answers) == len(result.examples) == 3
    assert [example.references for example in result.examples] == [("hm b",), ("c",), ("{find{}}",)]
    for answer, example in zip(result.answers, result.examples, strict=True):
        by_hand = loss_by_hand(model, tokenizer, [example])
        assert -answer.log_likelihood / answer.tokens == pytest.approx(by_hand, rel=1e-5)
    assert [answer.tokens for answer in result.answers] == [len("hm a") + 1 + len("hm b") + 1, 2, len("{find{}}") + 1]
    assert result.metrics["loss"] == pytest.approx(loss_by_hand(model, tokenizer, result.examples), rel=1e-5)
    ends = evaluate.end_tokens(model, tokenizer, chat=True, examples=result.examples)
    assert set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|call|>"])) <= set(ends)


# -- from the hub's cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_an_adapter_in_the_hubs_cache_is_loaded_by_its_name_or_its_folder(adapter, lay_in_cache, links, tmp_path):
    snapshot = lay_in_cache("org/mine", adapter, links)
    assert (snapshot / "adapter_config.json").is_symlink() is links
    (tmp_path / "short").symlink_to(snapshot)
    ids = torch.tensor([[1, 2, 3]])
    expected = adapters.load_adapter(adapter, "generate")[0](input_ids=ids).logits
    for source in ("org/mine", snapshot, tmp_path / "short"):
        assert torch.equal(adapters.load_adapter(source, "generate")[0](input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "leads", ["to another repository", "out of the cache", "by an absolute path", "past the blobs"]
)
def test_a_link_that_leaves_its_repository_is_not_followed(adapter, lay_in_cache, leads):
    """What it leads to has the recorded hash: only where it lies is wrong."""
    snapshot = lay_in_cache("org/mine", adapter)
    other = lay_in_cache("org/other", adapter)
    stray = snapshot / "tokenizer.json"
    target = {
        "to another repository": Path("../../../models--org--other/blobs") / (other / stray.name).resolve().name,
        "out of the cache": Path("../../../..") / adapter.name / stray.name,
        "by an absolute path": (adapter / stray.name).absolute(),
        "past the blobs": Path("../../refs") / stray.name,
    }[leads]
    if leads == "past the blobs":
        shutil.copyfile(adapter / stray.name, snapshot.parents[1] / "refs" / stray.name)
    stray.unlink()
    stray.symlink_to(target)
    assert stray.read_bytes() == (adapter / stray.name).read_bytes()
    with pytest.raises(IntegrityError, match=r"'tokenizer\.json' is not a plain file of this folder"):
        adapters.load_adapter("org/mine", "generate")


def test_a_cache_whose_blobs_lie_elsewhere_is_not_trusted(adapter, lay_in_cache, tmp_path):
    repository = lay_in_cache("org/mine", adapter).parents[1]
    (repository / "blobs").rename(tmp_path / "elsewhere")
    (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="is not a plain file of this folder"):
        adapters.load_adapter("org/mine", "generate")


def test_a_cache_that_lacks_a_listed_file_says_which(adapter, lay_in_cache):
    there = {"adapter_config.json", "adapter_model.safetensors", "duallora.json"}
    lay_in_cache("org/mine", adapter, files=there)
    missing = next(name for name in record.read_json(adapter / "duallora.json")["files"] if name not in there)
    with pytest.raises(IntegrityError, match=f"{missing} is missing"):
        adapters.load_adapter("org/mine", "generate")


def test_what_the_sidecar_lists_is_fetched_from_the_hub_and_nothing_else(adapter, lay_in_cache, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    sidecar = record.read_json(adapter / "duallora.json")
    for name in ("chat_template.jinja", "odd[1].bin"):
        (adapter / name).write_text(name)
        sidecar["files"][name] = checkpoint.file_record(adapter / name)
    record.write_json(adapter / "duallora.json", {**sidecar, "files": {**sidecar["files"], "*": {}, "../up": {}}})
    for name in ("optimizer.pt", "odd1.bin", "notes.md"):
        (adapter / name).write_text("not listed")
    there = {path.name for path in adapter.iterdir()}

    cached = {}

    def download(repository, file):
        snapshot = lay_in_cache(repository, adapter, files={file})
        cached[repository] = snapshot.parent
        return str(snapshot / file)

    def snapshot(repository, *, revision, allow_patterns):
        folder = cached[repository] / revision
        for name in filter_repo_objects(sorted(there), allow_patterns=allow_patterns):
            shutil.copyfile(adapter / name, folder / name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = adapters.find("org/mine")
    assert found is not None
    assert {path.name for path in found.iterdir()} == there - {"optimizer.pt", "odd1.bin", "notes.md"}


def test_a_full_model_on_the_hub_is_no_adapter(lay_in_cache, tiny_causal_folder):
    lay_in_cache("org/model", tiny_causal_folder)
    assert adapters.find("org/model") is None
