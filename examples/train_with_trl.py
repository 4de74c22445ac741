"""Fine-tune with TRL's SFTTrainer: a held-out loss before and after, checkpoints, and the adapter saved whole.

    python examples/train_with_trl.py HuggingFaceTB/SmolLM2-135M-Instruct my.jsonl --steps 120 --out runs/trl

Rows of the data hold `prompt` and `completion`. Needs `pip install 'ctsft[tune]'`.
"""

import argparse
from itertools import islice

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import ctsft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Hugging Face folder or hub id")
parser.add_argument("data", help="JSONL file")
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--out", default="runs/trl")
asked = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(asked.model, dtype="float32")
model = get_peft_model(base, ctsft.CTConfig(k=64, task_type="CAUSAL_LM"))
model.print_trainable_parameters()

rows = load_dataset("json", data_files=asked.data, split="train").train_test_split(test_size=0.1, seed=0)
args = SFTConfig(
    output_dir=asked.out,
    max_steps=asked.steps,
    per_device_train_batch_size=8,
    lr_scheduler_type="linear",
    warmup_steps=asked.steps // 20,
    weight_decay=0.0,
    save_steps=50,
    logging_steps=10,
    report_to="none",
    bf16=torch.cuda.is_available(),
)
trainer = SFTTrainer(model, args, train_dataset=rows["train"], eval_dataset=rows["test"])
# The rule behind it: docs/learning-rates.md. TRL's default, 2e-5, is thousands of times too small here.
args.learning_rate = ctsft.learning_rate(model, list(islice(trainer.get_train_dataloader(), 4)))
before = trainer.evaluate()["eval_loss"]
trainer.train()  # resume_from_checkpoint=True goes on after a stop
after = trainer.evaluate()["eval_loss"]
print(f"held-out loss, nats per token: {before:.3f} before, {after:.3f} after")

size = ctsft.save_adapter(model, f"{asked.out}/adapter")
print(f"{asked.out}/adapter holds {size:,} bytes")
