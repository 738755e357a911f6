"""transformers' Trainer: wrap the model, train, keep the best checkpoint, save.

python examples/trainer.py                          the built-in SmolLM2-135M: offline, a CPU will do
python examples/trainer.py meta-llama/Llama-3.2-1B  any model of the hub, or a local folder
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from duallora import DualLoraConfig, gate
from duallora.store.models import load_model

MODEL = sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m"
OUT = sys.argv[2] if len(sys.argv) > 2 else "trainer-out"

TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
texts = [f"{10 * (t + 2) + o + 1} is {ten}-{one}." for t, ten in enumerate(TENS) for o, one in enumerate(ONES)]

torch.manual_seed(0)
base, tokenizer = load_model(MODEL, "generate")
config = DualLoraConfig(r=8, target_modules="all-linear", warmup_steps=3, task_type="CAUSAL_LM")
model = get_peft_model(base, config)
rows = [tokenizer(text) for text in texts]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        OUT,
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        warmup_steps=3,
        logging_steps=1,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=5,
        save_steps=5,
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),  # on a GPU: bf16 arithmetic, float32 factors
    ),
    train_dataset=rows[8:],
    eval_dataset=rows[:8],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on from the newest, the gate's counter included
losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, gate {gate(model):.2f}")

model.save_pretrained(OUT)

model.cpu().eval()
ids = tokenizer("42 is", return_tensors="pt").input_ids
with torch.no_grad():
    trained = model(ids).logits
    adapter = PeftModel.from_pretrained(load_model(MODEL, "generate")[0], OUT).eval()
    loaded = adapter(ids).logits
    merged = adapter.merge_and_unload()(ids).logits
print(f"reloaded: largest difference {(loaded - trained).abs().max():.1e}")
print(f"merged:   largest difference {(merged - trained).abs().max():.1e}")
