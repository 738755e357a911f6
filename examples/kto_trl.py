"""Preferences without pairs, with TRL's KTOTrainer: each answer is good or bad by itself.

    python examples/kto_trl.py                          the built-in SmolLM2-135M: offline, a CPU will do
    python examples/kto_trl.py meta-llama/Llama-3.2-1B  any model of the hub, or a local folder

Likes numbers written as words and dislikes digits, then saves the adapter, loads it again and merges it.
"""

import sys

import torch
from datasets import Dataset
from peft import PeftModel
from trl import KTOConfig, KTOTrainer

from duallora import DualLoraConfig, gate
from duallora.store.models import load_model

MODEL = sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m"
OUT = sys.argv[2] if len(sys.argv) > 2 else "kto-out"

WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
rows = [
    {"prompt": f"What comes after {number + 1}?", "completion": f" {answer}", "label": liked}
    for number, word in enumerate(WORDS)
    for answer, liked in ((word, True), (str(number + 2), False))
] * 2

torch.manual_seed(0)
model, tokenizer = load_model(MODEL, "generate")
trainer = KTOTrainer(
    model=model,
    args=KTOConfig(
        OUT,
        max_steps=8,
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
    peft_config=DualLoraConfig(r=8, target_modules="all-linear", warmup_steps=3, task_type="CAUSAL_LM"),
)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, gate {gate(trainer.model):.2f}")  # 0.5 at the start

trainer.save_model(OUT)

ids = tokenizer("What comes after 4?", return_tensors="pt").input_ids
with torch.no_grad():
    adapter = PeftModel.from_pretrained(load_model(MODEL, "generate")[0], OUT).eval()
    trained = trainer.model.cpu().eval().get_base_model().model(ids).last_hidden_state
    loaded = adapter.get_base_model().model(ids).last_hidden_state
    wanted = adapter(ids).logits
    merged = adapter.merge_and_unload()(ids).logits
print(f"reloaded: largest difference {(loaded - trained).abs().max():.1e}")
print(f"merged:   largest difference {(merged - wanted).abs().max():.1e}")
