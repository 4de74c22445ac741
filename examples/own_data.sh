#!/usr/bin/env bash
# Fine-tune on a table of your own, whatever its columns are called: here `problem` and `solution`.
#
#     examples/own_data.sh smollm2-135m problems.jsonl runs/problems
set -euo pipefail
model=$1 data=$2 out=$3

# The columns are named, so no file need be rewritten. Ctrl-C stops; the same command with --resume goes on.
ctsft tune --model "$model" --data "$data" --prompt-column problem --completion-column solution --out "$out"

# What it says now, beside what the base says.
ctsft sample "$out" --prompt "Ann has 3 apples and buys 4. How many has she?" --base

# The same adapter as an ordinary LoRA, for PEFT without ctsft, vLLM or llama.cpp.
ctsft export "$out" --to lora --out "$out/lora"
