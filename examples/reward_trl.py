"""A reward model with TRL's RewardTrainer: a head that learns which of two answers is preferred, on an adapted body.

    python examples/reward_trl.py                          the built-in SmolLM2-135M: offline, a CPU will do
    python examples/reward_trl.py meta-llama/Llama-3.2-1B  any model of the hub, or a local folder

Prefers numbers written as words to digits, then saves adapter and head, loads them again and merges.
"""

import sys

import torch
from datasets import Dataset
from peft import PeftModel
from trl import RewardConfig, RewardTrainer

from duallora import DualLoraConfig, gate
from duallora.store.models import load_model

MODEL = sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m"
OUT = sys.argv[2] if len(sys.argv) > 2 else "reward-out"

WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
rows = [
    {"chosen": f"What comes after {number + 1}? {word}", "rejected": f"What comes after {number + 1}? {number + 2}"}
    for number, word in enumerate(WORDS)
] * 4

torch.manual_seed(0)
model, tokenizer = load_model(MODEL, "regress")
trainer = RewardTrainer(
    model=model,
    args=RewardConfig(
        OUT,
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        warmup_steps=3,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=DualLoraConfig(
        r=8, target_modules="all-linear", modules_to_save=["score"], warmup_steps=3, task_type="SEQ_CLS"
    ),
)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, gate {gate(trainer.model):.2f}")  # ln 2 = 0.693 for a guess

trainer.save_model(OUT)

ids = tokenizer("What comes after 4? five", return_tensors="pt").input_ids
with torch.no_grad():
    adapter = PeftModel.from_pretrained(load_model(MODEL, "regress")[0], OUT).eval()
    trained = trainer.model.cpu().eval()(input_ids=ids).logits
    loaded = adapter(input_ids=ids).logits
    merged = adapter.merge_and_unload()(input_ids=ids).logits
print(f"reloaded: largest difference {(loaded - trained).abs().max():.1e}")
print(f"merged:   largest difference {(merged - loaded).abs().max():.1e}")
