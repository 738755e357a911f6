"""Reinforcement learning with TRL's GRPOTrainer: answers are drawn, scored by a function, and the better ones made likelier.

    python examples/grpo_trl.py                          the built-in SmolLM2-135M: offline, a CPU will do
    python examples/grpo_trl.py meta-llama/Llama-3.2-1B  any model of the hub, or a local folder

Rewards short answers, then saves the adapter, loads it again and merges it. Where vLLM draws the answers (use_vllm=True), TRL
merges the adapter into the weights that it hands over and takes it out again, which is exact both ways.
"""

import sys

import torch
from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer

from duallora import DualLoraConfig, gate
from duallora.store.models import load_model

MODEL = sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m"
OUT = sys.argv[2] if len(sys.argv) > 2 else "grpo-out"

rows = [{"prompt": f"Name a number above {number}:"} for number in range(32)]


def few_e(completions: list[str], **kwargs: object) -> list[float]:
    """Of an answer's characters the share that is no "e": something to be had by a model that knows nothing."""
    return [1 - text.count("e") / max(len(text), 1) for text in completions]


torch.manual_seed(0)
model, tokenizer = load_model(MODEL, "generate")
trainer = GRPOTrainer(
    model=model,
    reward_funcs=few_e,
    args=GRPOConfig(
        OUT,
        max_steps=6,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        warmup_steps=2,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=DualLoraConfig(r=8, target_modules="all-linear", warmup_steps=2, task_type="CAUSAL_LM"),
)
trainer.train()
rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}, gate {gate(trainer.model):.2f}")

trainer.save_model(OUT)

ids = tokenizer("Name a number above 7:", return_tensors="pt").input_ids
with torch.no_grad():
    adapter = PeftModel.from_pretrained(load_model(MODEL, "generate")[0], OUT).eval()
    trained = trainer.model.cpu().eval().get_base_model().model(ids).last_hidden_state
    loaded = adapter.get_base_model().model(ids).last_hidden_state
    wanted = adapter(ids).logits
    merged = adapter.merge_and_unload()(ids).logits
print(f"reloaded: largest difference {(loaded - trained).abs().max():.1e}")
print(f"merged:   largest difference {(merged - wanted).abs().max():.1e}")
