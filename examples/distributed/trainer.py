"""transformers' Trainer on several devices: DDP, FSDP or DeepSpeed, as the accelerate configuration says.

    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/trainer.py MODEL OUT

MODEL is a hub id, a local folder or builtin:smollm2-135m (the default). docs/distributed.md says what was verified where.
"""

import sys

import torch
from peft import get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from duallora import DualLoraConfig, advance_gate, gate
from duallora.store.models import load_model

MODEL = sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m"
OUT = sys.argv[2] if len(sys.argv) > 2 else "distributed-out"
STEPS = 20


class CountSteps(TrainerCallback):
    """DeepSpeed's optimizer steps copies of the factors, which torch's hooks cannot tell from another model's."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if trainer.is_deepspeed_enabled:
            advance_gate(trainer.accelerator.unwrap_model(model))


TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
texts = [f"{10 * (t + 2) + o + 1} is {ten}-{one}." for t, ten in enumerate(TENS) for o, one in enumerate(ONES)]

# Before the model: under ZeRO-3 and FSDP the arguments decide how its weights are loaded.
arguments = TrainingArguments(
    OUT,
    max_steps=STEPS,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    warmup_steps=5,
    logging_steps=5,
    save_steps=10,
    report_to=[],
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
)
torch.manual_seed(0)
base, tokenizer = load_model(MODEL, "generate")
config = DualLoraConfig(r=8, target_modules="all-linear", warmup_steps=5, init_seed=0, task_type="CAUSAL_LM")
model = get_peft_model(base, config)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=[tokenizer(text) for text in texts],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[CountSteps()],
)
trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on from the newest checkpoint
if trainer.is_fsdp_enabled:
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
trainer.save_model(OUT)
state = trainer.accelerator.unwrap_model(trainer.model)
trainer.accelerator.print(f"gate {gate(state):.2f} after {trainer.state.global_step} steps, saved in {OUT}")
