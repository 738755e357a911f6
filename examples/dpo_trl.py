"""Preference optimization with TRL's DPOTrainer: the reference model is the same model with its adapter disabled.

    python examples/dpo_trl.py                          the built-in SmolLM2-135M: offline, a CPU will do
    python examples/dpo_trl.py meta-llama/Llama-3.2-1B  any model of the hub, or a local folder

Prefers numbers written as words to digits, then saves the adapter, loads it again and merges it.
"""

import sys

import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from duallora import DualLoraConfig, gate
from duallora.store.models import load_model

MODEL = sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m"
OUT = sys.argv[2] if len(sys.argv) > 2 else "dpo-out"

TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
rows = [
    {
        "prompt": [{"role": "user", "content": f"What comes after {10 * (t + 2) + o}?"}],
        "chosen": [{"role": "assistant", "content": f"{ten}-{one}"}],
        "rejected": [{"role": "assistant", "content": str(10 * (t + 2) + o + 1)}],
    }
    for t, ten in enumerate(TENS)
    for o, one in enumerate(ONES)
]

torch.manual_seed(0)
model, tokenizer = load_model(MODEL, "generate")
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        OUT,
        max_steps=8,
        per_device_train_batch_size=2,
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
    peft_config=DualLoraConfig(r=8, target_modules="all-linear", warmup_steps=3, task_type="CAUSAL_LM"),
)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, gate {gate(trainer.model):.2f}")  # ln 2 = 0.693 at the start

trainer.save_model(OUT)

# The trainer has replaced the forward of the model it trained (its fused loss); a fresh base is compared.
ids = tokenizer("What comes after 41?", return_tensors="pt").input_ids
with torch.no_grad():
    adapter = PeftModel.from_pretrained(load_model(MODEL, "generate")[0], OUT).eval()
    trained = trainer.model.cpu().eval().get_base_model().model(ids).last_hidden_state
    loaded = adapter.get_base_model().model(ids).last_hidden_state
    wanted = adapter(ids).logits
    merged = adapter.merge_and_unload()(ids).logits
print(f"reloaded: largest difference {(loaded - trained).abs().max():.1e}")
print(f"merged:   largest difference {(merged - wanted).abs().max():.1e}")
