"""A training loop of one's own with accelerate: accumulation, and a stop in the middle that changes nothing.

python examples/accelerate_loop.py                          the built-in SmolLM2-135M: offline, a CPU will do
python examples/accelerate_loop.py meta-llama/Llama-3.2-1B  any model of the hub, or a local folder
accelerate launch examples/accelerate_loop.py               several devices, as `accelerate config` says
"""

import sys
from itertools import islice

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader

from duallora import DualLoraConfig, gate, param_groups
from duallora.store.models import load_model

MODEL = sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m"
OUT = sys.argv[2] if len(sys.argv) > 2 else "accelerate-out"

TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
texts = [f"{10 * (t + 2) + o + 1} is {ten}-{one}." for t, ten in enumerate(TENS) for o, one in enumerate(ONES)]

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
base, tokenizer = load_model(MODEL, "generate")
config = DualLoraConfig(r=8, target_modules="all-linear", warmup_steps=5, task_type="CAUSAL_LM")
model = get_peft_model(base, config)
# The direction group C, D takes larger steps than the magnitude group A, B.
optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, direction_lr_ratio=2.0))
loader = DataLoader(texts, batch_size=4, collate_fn=lambda batch: tokenizer(batch, padding=True, return_tensors="pt"))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)


def loss_of(batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels).loss


def train(batches):
    """The loss of each batch in turn; the optimizer steps at every second one."""
    model.train()
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = loss_of(batch)
            accelerator.backward(loss)
            optimizer.step()  # accelerate skips it inside an accumulation; the gate counts the real ones
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


batches = list(islice(loader, 16))
first = train(batches[:8])
accelerator.save_state(f"{OUT}/state")  # model, optimizer, random generators, and the gate's counter with the model
last = train(batches[8:])
with torch.no_grad():
    print(f"loss {first[0]:.3f} -> {float(loss_of(batches[0])):.3f}, gate {gate(accelerator.unwrap_model(model)):.2f}")

accelerator.load_state(f"{OUT}/state")  # as after a crash: back to the middle, and the same steps again
print(f"resumed: the same losses: {train(batches[8:]) == last}")

accelerator.wait_for_everyone()
model = accelerator.unwrap_model(model).eval()
if accelerator.is_main_process:
    model.save_pretrained(OUT)
    model.cpu()
    ids = tokenizer("42 is", return_tensors="pt").input_ids
    with torch.no_grad():
        trained = model(ids).logits
        adapter = PeftModel.from_pretrained(load_model(MODEL, "generate")[0], OUT).eval()
        loaded = adapter(ids).logits
        merged = adapter.merge_and_unload()(ids).logits
    print(f"reloaded: largest difference {(loaded - trained).abs().max():.1e}")
    print(f"merged:   largest difference {(merged - trained).abs().max():.1e}")
