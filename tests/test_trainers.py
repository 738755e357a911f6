"""What the trainers of transformers and TRL do around a model leaves the gate and the factors right."""

from __future__ import annotations

import peft
import pytest
import torch
from adapter_building import layers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import duallora
from duallora import DualLoraConfig

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Saving a Dual LoRA adapter whose gate is not open")

OPTIONS = {"r1": 4, "r2": 3, "alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_seed": 3}


def config(**options) -> DualLoraConfig:
    start = {"init_std": 0.02, "direction_init_std": 0.02}  # of random weights of 0.02
    return DualLoraConfig(**{**OPTIONS, **start, "warmup_steps": 5, **options})


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 36, "intermediate_size": 63, "num_hidden_layers": 2, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=260, num_key_value_heads=2, pad_token_id=0, **shape))


def arguments(cls, folder, **options):
    """One pass of 6 steps over 24 rows, unless told otherwise."""
    common = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    if cls is not TrainingArguments:
        common |= {"gradient_checkpointing": False, "bf16": False}
    return cls(str(folder), **{**common, **options})


def steps(model, adapter="default") -> set[int]:
    return {int(m.duallora_step[adapter]) for m in layers(model)}


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fit(folder, resume=None, rows=24, ramp=5, **options) -> Trainer:
    ids = torch.randint(1, 260, (rows, 9), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "labels": row} for row in ids]
    model = peft.get_peft_model(base(), config(warmup_steps=ramp))
    trainer = Trainer(model, arguments(TrainingArguments, folder, **options), train_dataset=data, eval_dataset=data[:4])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("ramp", "ramp_steps", "at"), [(5, 5, 3), ("auto", 2, 1)])
def test_a_run_resumed_in_mid_ramp_ends_where_the_straight_one_ends(ramp, ramp_steps, at, tmp_path):
    """Bit for bit, with the counter."""
    straight = fit(tmp_path / "a", ramp=ramp, save_strategy="steps", save_steps=at)
    assert steps(straight.model) == {6}
    saved = load_file(tmp_path / "a" / f"checkpoint-{at}" / "adapter_model.safetensors")
    assert {int(value) for name, value in saved.items() if "duallora_step" in name} == {at}
    resumed = fit(tmp_path / "b", ramp=ramp, resume=str(tmp_path / "a" / f"checkpoint-{at}"))
    assert resumed.state.global_step == 6
    assert {t.model.peft_config["default"].warmup_steps for t in (straight, resumed)} == {ramp_steps}
    assert same(state(resumed.model), state(straight.model))


def test_the_best_checkpoint_comes_back_with_its_own_gate(tmp_path):
    """The loss falls, so by the largest loss the first checkpoint is best: its gate is 2/5, the last one's is 1."""
    trainer = fit(
        tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert steps(trainer.model) == {2}
    assert duallora.gate(trainer.model) == pytest.approx(0.4)
    want = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert same(state(trainer.model), want)


@pytest.mark.filterwarnings("error:.*whose gate is not open")
def test_an_automatic_warm_up_is_a_third_of_a_short_run_and_a_tenth_of_a_long_one(tmp_path):
    """DualLoraConfig's default: nobody who trains for 9 steps saves a gate that is a tenth open, as with 100 it was."""
    trainer = fit(tmp_path, ramp=DualLoraConfig().warmup_steps, max_steps=9, save_strategy="steps", save_steps=9)
    assert duallora.gate(trainer.model) == 1.0
    read = peft.PeftConfig.from_pretrained(tmp_path / "checkpoint-9")
    assert read.warmup_steps == 3
    model = trainer.model
    trainer.args.max_steps = 200
    trainer.add_callback(StopAtOnce())
    trainer.train()
    assert model.peft_config["default"].warmup_steps == 3  # of the first run, which its gate goes on from
    model.peft_config["default"].warmup_steps = "auto"
    trainer.train()
    assert model.peft_config["default"].warmup_steps == 20


def test_one_config_of_several_models_warms_each_up_by_its_own_run(tmp_path):
    """A short trial first, then the run proper, both with the notebook's one config: each has a tenth of its own steps.

    And the model of the trial, which is still there, keeps the ramp that its counters were trained with.
    """
    shared, trainers = config(warmup_steps="auto"), []
    for max_steps, ramp in ((9, 3), (200, 20), (9, 3)):
        model = peft.get_peft_model(base(), shared)
        row = torch.arange(9)
        trainer = Trainer(
            model,
            arguments(TrainingArguments, tmp_path, max_steps=max_steps),
            train_dataset=[{"input_ids": row, "labels": row}] * 8,
            callbacks=[] if not trainers else [StopAtOnce()],
        )
        trainer.train()
        trainers.append(trainer)
        assert model.peft_config["default"].warmup_steps == ramp
        assert {layer.duallora_config["default"].ramp_steps for layer in layers(model)} == {ramp}
        model.save_pretrained(tmp_path / "saved")
        assert peft.PeftConfig.from_pretrained(tmp_path / "saved").warmup_steps == ramp
    assert [duallora.gate(trainer.model) for trainer in trainers] == pytest.approx([1, 1 / 20, 1 / 3])


class StopAtOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_in_any_other_loop_an_automatic_warm_up_is_100_steps_and_the_last_save_names_the_remedy(ids, tmp_path):
    model = peft.get_peft_model(base(), config(warmup_steps="auto"))
    model.save_pretrained(tmp_path / "new")
    assert peft.PeftConfig.from_pretrained(tmp_path / "new").warmup_steps == "auto"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids[:, :2], labels=ids[:, :2]).loss.backward()
        optimizer.step()
    with pytest.warns(
        UserWarning, match=r"at 0\.40 \(step 40 of 100\).*train again with warmup_steps=10, or \"auto\" with"
    ):
        model.save_pretrained(tmp_path / "trained")
    assert peft.PeftConfig.from_pretrained(tmp_path / "trained").warmup_steps == 100


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "wrapped"},
        {"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sft_trains_every_layer_and_counts_its_steps(tiny_tokenizer, tmp_path, options):
    data = Dataset.from_list([{"text": f"{n} and {n + 1} make {2 * n + 1}."} for n in range(24)])
    settings = arguments(trl.SFTConfig, tmp_path, max_length=64, max_steps=3, **options)
    trainer = trl.SFTTrainer(
        base(), settings, train_dataset=data, processing_class=tiny_tokenizer, peft_config=config(warmup_steps="auto")
    )
    before = state(trainer.model)
    trainer.train()
    after = state(trainer.model)
    assert steps(trainer.model) == {3}
    assert trainer.model.peft_config["default"].warmup_steps == 1
    assert before.keys() == after.keys()
    assert [n for n in before if torch.equal(before[n], after[n])] == []  # every factor and counter moved
    assert all(value.dtype == torch.float32 for name, value in after.items() if "duallora_step" not in name)


PREFERENCES = [
    {"prompt": f"{n} and {n}?", "chosen": f" {2 * n}", "rejected": f" {2 * n + 1}, I think"} for n in range(8)
]


def dpo(folder, tokenizer, model, **options) -> trl.DPOTrainer:
    peft_config = None if isinstance(model, peft.PeftModel) else config(**options.pop("adapter", {}))
    settings = arguments(trl.DPOConfig, folder, max_steps=2, **options)
    data = Dataset.from_list(PREFERENCES)
    return trl.DPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_takes_the_base_model_as_its_reference(tiny_tokenizer, tmp_path, precompute):
    """At the start policy and reference agree, so the first loss is ln 2 even with an adapter that acts at once."""
    trainer = dpo(tmp_path, tiny_tokenizer, base(), precompute_ref_log_probs=precompute)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[1] != losses[0]
    assert steps(trainer.model) == {2}


def trained(ids) -> tuple[peft.PeftModel, torch.Tensor, torch.Tensor]:
    """A model with a trained adapter, its logits, and those of its base."""
    model = peft.get_peft_model(base(), config(warmup_steps=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        plain = model(ids).logits
    with torch.no_grad():
        logits = model(ids).logits
    assert (logits - plain).abs().max() > 1e-3
    return model, logits, plain


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 260, (3, 9), generator=torch.Generator().manual_seed(1))


def test_dpo_after_merging_has_the_trained_model_as_its_reference(ids, tiny_tokenizer, tmp_path):
    """The documented way from SFT to DPO."""
    model, logits, _ = trained(ids)
    merged = model.merge_and_unload()
    trainer = dpo(tmp_path, tiny_tokenizer, merged, adapter={"init_seed": 4})
    with torch.no_grad(), trainer.model.eval().disable_adapter():
        assert torch.equal(trainer.model(ids).logits, logits)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)


def test_dpo_of_an_unmerged_adapter_would_have_the_base_as_its_reference(ids, tiny_tokenizer, tmp_path):
    """What docs/examples.md warns of: TRL copies parameters whose name holds ".default.", as LoRA's do and ours do not.

    When this fails, TRL makes a true copy and the warning can go.
    """
    model, _, plain = trained(ids)
    dpo(tmp_path, tiny_tokenizer, model)
    if "ref" not in model.peft_config:
        pytest.skip("this TRL makes no adapter of the reference")
    model.set_adapter("ref")
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain)
