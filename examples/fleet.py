"""A fleet of adapters: directions learned once from some databases, then a few kilobytes for each further one.

    python examples/fleet.py --out runs/fleet        # what `make demo-fleet` runs

It learns K directions a matrix from questions about some databases of the built-in `sql` (once: they stay in --out).
Then a database that none of this has seen is served in three ways: by the siblings' mean as it is, by K amplitudes a
matrix trained from there for a minute, and by LoRA r8 trained for the same minute. A minute is 60 seconds of each
thread's processor time, so that other work on the machine changes nothing.
"""

import argparse
import json
import random
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

import ctsft
from ctsft.adapter.learned import Learned
from ctsft.adapter.loss import summed_loss
from ctsft.data.rows import load_corpus
from ctsft.data.sql.execution import execution_match, extract_sql
from ctsft.data.tokens import format_rows, prompt_ids
from ctsft.models.load import load_model
from ctsft.tune.measure import collate, generate, heldout_loss

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
SIBLINGS = "library school clinic farm restaurant cinema music shop hotel sports company bank garage gym bakery garden"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--siblings", nargs="+", default=SIBLINGS.split(), help="databases to learn directions from")
parser.add_argument("--unseen", default="airline", help="the database to serve then")
parser.add_argument("--k", type=int, default=16, help="directions a matrix")
parser.add_argument("--steps", type=int, default=60, help="steps of learning, each on two databases")
parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
parser.add_argument("--seconds", type=float, default=60, help="of training, for either way")
parser.add_argument("--questions", type=int, default=100, help="that are asked about the unseen database")
parser.add_argument("--lr", type=float, default=0.06)
parser.add_argument("--lora-lr", type=float, default=3e-3)
parser.add_argument("--out", type=Path, default=Path("runs/fleet"))
parser.add_argument("--seed", type=int, default=0)
asked = parser.parse_args()
if asked.unseen in asked.siblings:
    parser.error(f"{asked.unseen} is among the databases that directions are learned from.")


def base():
    """The model as it is; a CPU attends to rows as short as these faster by plain products."""
    loaded = load_model(asked.model)
    loaded.model.set_attn_implementation("eager" if loaded.model.device.type == "cpu" else "sdpa")
    return loaded


def database(name, questions):
    """Rows to train on, held-out rows, and the corpus they are of."""
    corpus = load_corpus(f"sql:{name}", seed=asked.seed, heldout=questions, limit=400)
    parts = (format_rows(part, tokenizer, corpus.kind, 512)[0] for part in (corpus.train, corpus.heldout))
    return [*map(list, parts), corpus]


def learned(folder):
    """The directions in `folder`; where there are none yet they are learned, from where it was stopped."""
    if not (folder / "basis.safetensors").exists():
        siblings = {}
        for name in asked.siblings:
            rows, _, _ = database(name, 1)
            cuts = range(0, len(rows) - asked.rows + 1, asked.rows)
            siblings[name] = [collate(rows[i : i + asked.rows], tokenizer.pad_token_id) for i in cuts]
        options = {"steps": asked.steps, "batches": 2, "rates": (0.004, 0.06), "nested": False, "seed": asked.seed}
        found = ctsft.learn_basis(base().model, siblings, asked.k, **options, keep=folder / "state.safetensors")
        found.save(folder)
        (folder / "state.safetensors").unlink(missing_ok=True)
    return Learned.read(folder)


def train(model, rows, lr):
    """Train for asked.seconds at a rate that falls to zero with the time that is left; returns the number of steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    draw, order, step = random.Random(asked.seed), [], 0
    budget, start = asked.seconds * torch.get_num_threads(), time.process_time()
    model.train()
    while (spent := time.process_time() - start) < budget:
        if len(order) < asked.rows:
            order = draw.sample(rows, len(rows))
        batch = collate([order.pop() for _ in range(asked.rows)], tokenizer.pad_token_id)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 4) * (1 - spent / budget)
        loss, tokens = summed_loss(model, batch)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return step


def scores(model):
    """Held-out loss, and how many of the questions get SQL that gives the right result."""
    loss = heldout_loss(model, heldout, tokenizer.pad_token_id)[0]
    prompts = [prompt_ids(row, tokenizer, corpus.kind) for row in corpus.heldout]
    texts = generate(model, tokenizer, prompts, max_new_tokens=64)
    right = sum(execution_match(extract_sql(t), e) for t, e in zip(texts, corpus.examples, strict=True))
    return {"loss": loss, "right": right, "of": len(texts)}


console = Console(stderr=True)
first = base()
tokenizer = first.tokenizer
directions = learned(asked.out / "directions")
facts = directions.facts
console.print(
    f"directions of {len(facts.siblings)} databases: {facts.steps} steps, {facts.seconds:.0f} s", highlight=False
)
rows, heldout, corpus = database(asked.unseen, asked.questions)
amplitudes = ctsft.CTConfig(
    k=asked.k,
    basis="learned",
    basis_file=str(asked.out / "directions"),
    start="mean",
    basis_dtype="bfloat16" if first.model.dtype == torch.bfloat16 else "float32",
    save_dtype="float16",
    task_type="CAUSAL_LM",
)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
results = {}
for name, config, lr in (
    ("the model as it is", None, None),
    ("the siblings' mean, untrained", amplitudes, None),
    (f"{asked.k} amplitudes a matrix", amplitudes, asked.lr),
    ("LoRA r8", lora, asked.lora_lr),
):
    console.print(f"{name} ...", highlight=False)
    model = base().model if config is None else get_peft_model(base().model, config)
    steps = train(model, rows, lr) if lr else 0
    numbers = size = 0
    if lr:
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if config is amplitudes:
            size = ctsft.save_adapter(model, asked.out / asked.unseen)
        else:  # as PEFT writes it, at two bytes a number as well
            size = len(save({n: p.detach().half() for n, p in model.named_parameters() if p.requires_grad}))
    results[name] = {"numbers": numbers, "bytes": size, "steps": steps, "lr": lr} | scores(model)

shared = (asked.out / "directions" / "basis.safetensors").stat().st_size
record = {"unseen": asked.unseen, "shared_bytes": shared, "learning_seconds": facts.seconds, "results": results}
(asked.out / "fleet.json").write_text(json.dumps(record, indent=1) + "\n")
table = Table(title=f"questions about {asked.unseen}, a database never seen; {asked.seconds:g} s of training")
for column in ("", "trained numbers", "bytes", "steps", "loss", "right"):
    table.add_column(column, justify="left" if not column else "right")
for name, r in results.items():
    told = (f"{r['numbers']:,}", f"{r['bytes']:,}", str(r["steps"])) if r["lr"] else ("", "", "")
    table.add_row(name, *told, f"{r['loss']:.3f}", f"{r['right']} of {r['of']}")
Console().print(table)
print(f"shared by all adapters: {shared:,} bytes of directions, learned in {facts.seconds:.0f} s")
