"""Load an adapter, ask it something, and write it as an ordinary LoRA that needs no ctsft.

python examples/load_and_export.py runs/trl/adapter --prompt "How many moons has Mars?" --out my-lora
"""

import argparse

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import ctsft  # makes the method known to PEFT, so it must be imported before an adapter is loaded

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="folder of an adapter")
parser.add_argument("--prompt", required=True)
parser.add_argument("--out", default="my-lora", help="folder of the LoRA")
asked = parser.parse_args()

model = AutoPeftModelForCausalLM.from_pretrained(asked.adapter, dtype="float32").eval()
base_name = model.peft_config["default"].base_model_name_or_path
tokenizer = AutoTokenizer.from_pretrained(base_name)
inputs = tokenizer(asked.prompt, return_tensors="pt")


def complete() -> str:
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


with model.disable_adapter():
    print("base: ", complete())
print("tuned:", complete())

for note in ctsft.export_adapter(model, asked.out, to="lora"):
    print(note)

# The LoRA is exact: on the same base it gives the same logits, up to rounding.
base = AutoModelForCausalLM.from_pretrained(base_name, dtype="float32")
lora = PeftModel.from_pretrained(base, asked.out).eval()
with torch.no_grad():
    difference = (model(**inputs).logits - lora(**inputs).logits).abs().max()
print(f"largest difference in logits between adapter and LoRA: {difference:.1e}")
