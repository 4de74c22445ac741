"""Training and measuring: one run from a recipe to an adapter, a record and a report, resumable at any moment."""

import inspect
import math
import os
import platform
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from ctsft.adapter.calibrate import calibrate
from ctsft.adapter.config import CTConfig
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.rate import learning_rate
from ctsft.adapter.store import adapted, save_adapter
from ctsft.data.rows import Corpus, load_corpus
from ctsft.data.sql.execution import execution_match, extract_sql
from ctsft.data.tokens import format_rows, prompt_ids
from ctsft.errors import CTError
from ctsft.files import cpu_name, read_json, versions, wilson, write_json, write_text
from ctsft.models.load import load_model
from ctsft.spectral.kinds import needs_data
from ctsft.spectral.weights import clean_name
from ctsft.tune.inspect import spectra_of
from ctsft.tune.recipe import ADAPTER, FIELDS, Recipe, read_recipe
from ctsft.tune.report import write_report

SAVE_EVERY = 20.0  # seconds between checkpoints
COMPLETE = "complete"  # a file put into a checkpoint last of all, with its inventory

Row = dict[str, list[int]]


class Stopped(KeyboardInterrupt):
    """The user stopped the run; it can be resumed. Carries the number of steps done."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


# ---- measuring


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Rows padded on the left to one batch: input_ids, attention_mask, position_ids, labels, each (b, t).

    Labels are -100 where nothing counts, and at a row's first token, which nothing predicts. Completions end together,
    so that only the last positions need logits.
    """
    t = max(len(r["input_ids"]) for r in rows)

    def stack(lists: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([[fill] * (t - len(items)) + items for items in lists])

    mask = stack(([1] * len(r["input_ids"]) for r in rows), 0)
    return {
        "input_ids": stack((r["input_ids"] for r in rows), pad_id),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": stack(([-100, *r["labels"][1:]] for r in rows), -100),
    }


def summed_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum over the batch of -log p (nats) of every labelled token, and the number of those tokens.

    The output head runs over the last positions only, from the first labelled one on, where the model can do that.
    """
    inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch["labels"]
    first = int((labels != -100).any(0).nonzero()[0])
    keep = labels.shape[1] - max(first - 1, 0)
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    if "logits_to_keep" in inspect.signature(type(bare).forward).parameters:
        inputs["logits_to_keep"] = keep
    logits = model(**inputs, use_cache=False).logits[:, -keep:]
    targets = labels[:, -keep:][:, 1:]
    chosen = targets != -100
    return F.cross_entropy(logits[:, :-1][chosen].float(), targets[chosen], reduction="sum"), chosen.sum()


def heldout_loss(model: torch.nn.Module, rows: Sequence[Row], pad_id: int, batch_size: int = 16) -> tuple[float, int]:
    """Mean loss in nats per token over all labelled tokens of `rows`, and their number. CTError if it is not finite."""
    rows = sorted(rows, key=lambda r: len(r["input_ids"]))
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for i in range(0, len(rows), batch_size):
            batch = {k: v.to(device) for k, v in collate(rows[i : i + batch_size], pad_id).items()}
            loss, count = summed_loss(model, batch)
            total, tokens = total + float(loss), tokens + int(count)
    if not math.isfinite(total):
        raise CTError(f"the held-out loss is {total}; use dtype float32 or bfloat16, or a smaller lr.")
    return total / tokens, tokens


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Greedy completions (text) of prompts given as token ids, in their order; "" where the context has no room."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    settings = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    model.eval()
    with torch.inference_mode():
        for i in range(0, len(order), batch_size):
            picked = order[i : i + batch_size]
            batch = collate([{"input_ids": prompts[j], "labels": prompts[j]} for j in picked], tokenizer.pad_token_id)
            ids, mask = (batch[n].to(model.device) for n in ("input_ids", "attention_mask"))
            settings.max_new_tokens = int(min(max_new_tokens, context - ids.shape[1]))
            if settings.max_new_tokens < 1:
                break
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for j, tokens in zip(picked, out[:, ids.shape[1] :], strict=True):
                texts[j] = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return texts


def measure(
    model: Any, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, rows: Sequence[Row], recipe: Recipe
) -> dict[str, Any]:
    """Held-out loss, generations, and for `sql` the execution accuracy with its 95% interval, as JSON values."""
    loss, tokens = heldout_loss(model, rows, tokenizer.pad_token_id)
    wanted = len(corpus.examples[: recipe.eval_rows]) or min(recipe.samples, len(corpus.heldout))
    prompts = [prompt_ids(corpus.heldout[i], tokenizer, corpus.kind) for i in range(wanted)]
    texts = generate(model, tokenizer, prompts, recipe.max_new_tokens)
    accuracy, ok = None, [None] * len(texts)
    if corpus.examples:
        texts = [extract_sql(t) for t in texts]
        ok = [execution_match(t, e) for t, e in zip(texts, corpus.examples, strict=False)]  # type: ignore[misc]
        by_kind: dict[str, list[int]] = {}
        for hit, example in zip(ok, corpus.examples, strict=False):
            counts = by_kind.setdefault(example.kind, [0, 0])
            counts[0] += bool(hit)
            counts[1] += 1
        low, high = wilson(sum(map(bool, ok)), len(ok))
        accuracy = {"correct": sum(map(bool, ok)), "total": len(ok), "low": low, "high": high, "by_kind": by_kind}
    return {"heldout_loss": loss, "heldout_tokens": tokens, "accuracy": accuracy, "texts": texts, "ok": ok}


def spectra(model: PeftModel, progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """Per adapted matrix: its spectrum's summary, and how far training moved it (|dW| / |W|, Frobenius norms)."""
    layers = {clean_name(n): m for n, m in adapted(model, "default")}
    table = spectra_of(
        model.get_base_model(), list(layers), {n: m.ready("default").k for n, m in layers.items()}, progress
    )
    for row in table:
        layer = layers[row["name"]]
        left, right = (f.detach() for f in layer.factors("default"))
        if layer.replaces("default"):
            moved = float(layer.get_delta_weight("default").detach().norm())
        else:  # |L R|^2 = tr(L'L R R')
            moved = float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
        row["coefficient_norm"] = float(layer.ctsft_coefficients["default"].detach().norm())
        row["delta_over_weight"] = moved / float(layer.base_weight().float().norm())
        del row["spectrum"]
    return table


def round_trained(model: PeftModel, dtype: Any) -> None:
    """Round to `dtype`, in which the adapter is saved: what is scored is what the file holds. Checkpoints are exact."""
    model.peft_config["default"].save_dtype = dtype  # type: ignore[attr-defined]
    for _, layer in adapted(model, "default"):
        c = layer.ctsft_coefficients["default"]
        c.data = c.data.to(getattr(torch, dtype)).to(c.dtype)


def extra_memory(model: Any, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes that training holds beyond the frozen model: bases (shared ones once), trained numbers, their gradients and
    optimizer state."""
    storages: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, CTLayer):
            for basis in module.ctsft_basis.values():
                for factor in basis.tensors().values() if basis else ():
                    storages[factor.untyped_storage().data_ptr()] = factor.untyped_storage().nbytes()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [t for s in (optimizer.state.values() if optimizer else ()) for t in s.values() if isinstance(t, Tensor)]
    return sum(storages.values()) + sum(t.numel() * t.element_size() for t in [*trained, *trained, *state])


# ---- training


class Tuner(SFTTrainer):
    """TRL's SFTTrainer with the loss computed where there is one.

    TRL's own loss projects every position on the vocabulary, in float32 off CUDA, and reads `lm_head.weight` past any
    adapter.
    """

    def __init__(self, model: Any, **kwargs: Any) -> None:
        with bare_head(model):
            super().__init__(model=model, **kwargs)
        bare = model.get_base_model()
        del bare.forward  # TRL's fused head, an instance attribute over the class's own forward

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, count = summed_loss(self.accelerator.unwrap_model(model), inputs)
        self._total_train_tokens += int(inputs["attention_mask"].sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss / (num_items_in_batch if num_items_in_batch is not None else count)


@contextmanager
def bare_head(model: Any) -> Iterator[None]:
    """Hide an adapted output head from TRL, which refuses it because of its own loss (see Tuner)."""
    bare = model.get_base_model()
    head = bare.get_output_embeddings()
    if isinstance(head, CTLayer):
        bare.get_output_embeddings = lambda: head.base_layer
    try:
        yield
    finally:
        bare.__dict__.pop("get_output_embeddings", None)


class Watch(TrainerCallback):
    """Shows progress, saves every `SAVE_EVERY` seconds, and turns an interrupt into a checkpoint and a stop."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.stopped = progress, False
        self.task = progress.add_task("training", total=steps, loss="", speed="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last: dict[str, Any] = state.log_history[-1] if state.log_history else {"seconds": 0.0, "tokens": 0}
        self.seconds, self.tokens = last["seconds"], last["tokens"]
        self.begun = self.saved = time.monotonic()
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise CTError(f"the loss is {logs['loss']} at step {state.global_step}; start anew with a smaller lr.")
        elapsed = time.monotonic() - self.begun
        state.log_history[-1] |= {"seconds": self.seconds + elapsed, "tokens": self.tokens + int(logs["num_tokens"])}
        self.progress.update(
            self.task,
            completed=state.global_step,
            loss=f"loss {logs['loss']:.3f}",
            speed=f"{int(logs['num_tokens']) / elapsed:,.0f} tokens/s",
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The last step is not saved: transformers would train one more when it resumes there.
        due = self.stopped or time.monotonic() - self.saved > SAVE_EVERY
        control.should_save = due and state.global_step < state.max_steps
        control.should_training_stop |= self.stopped

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_text(folder / COMPLETE, inventory(folder))
        self.saved = time.monotonic()

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) asks for a checkpoint and a stop, the second one stops at once."""

        def stop(*_: Any) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            self.progress.update(self.task, description="stopping")

        old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def inventory(folder: Path) -> str:
    """The files of a checkpoint and their sizes in bytes."""
    return "".join(f"{f.name} {f.stat().st_size}\n" for f in sorted(folder.iterdir()) if f.name != COMPLETE)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; those that a kill left half-written, or half-deleted, are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        mark = path / COMPLETE
        if mark.exists() and mark.read_text(encoding="utf-8") == inventory(path):
            found.append(path)
        else:
            shutil.rmtree(path)
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def sft_config(recipe: Recipe, folder: Path, lr: float) -> SFTConfig:
    return SFTConfig(
        output_dir=os.fspath(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=lr,
        lr_scheduler_type="linear",
        warmup_steps=recipe.steps // 20,
        weight_decay=0.0,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # Watch saves
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
    )


def adapter_config(recipe: Recipe, dtype: torch.dtype) -> CTConfig:
    """The adapter of `recipe` for a model in `dtype`; until training ends its numbers are saved exactly."""
    values = {name: getattr(recipe, name) for name in ADAPTER} | {"save_dtype": "float32"}
    if recipe.basis_dtype == "auto":
        values["basis_dtype"] = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return CTConfig(task_type="CAUSAL_LM", **values)


def check_folder(recipe: Recipe, out: Path, resume: bool, overwrite: bool) -> None:
    """CTError where `out` holds another run, a finished one, none to resume, or something that is not ours."""
    known, finished = out / "recipe.json", (out / "run.json").exists()
    if known.exists():
        old = read_recipe(known)
        if resume and finished:
            raise CTError(f"the run in {out} is finished; its report is {out / 'report.html'}.")
        if resume and old != recipe:
            wrong = [n for n in FIELDS if getattr(old, n) != getattr(recipe, n)]
            raise CTError(f"the run in {out} was started with other {', '.join(wrong)}; resume it without giving them.")
        if not resume and not overwrite:
            state, choices = (
                ("finished", "replace") if finished else ("unfinished", "continue it with --resume, replace")
            )
            raise CTError(f"{out} holds a run that is {state}; {choices} it with --overwrite, or give another --out.")
    elif resume:
        raise CTError(f"{out} holds no run to resume; start one without --resume.")
    elif out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
        raise CTError(f"{out} exists and is no run of ctsft; give another --out.")


def claim_folder(recipe: Recipe, out: Path) -> None:
    """Make `out` the folder of a new run. Of a run before it only what a run itself writes is removed, nothing else."""
    for name in ("run.json", "report.html", "before.json"):  # run.json first: what remains is an unfinished run
        (out / name).unlink(missing_ok=True)
    for mark in (out / "checkpoints").glob(f"checkpoint-*/{COMPLETE}"):
        mark.unlink()
    for name in ("checkpoints", "adapter"):
        if (out / name).exists():
            shutil.rmtree(out / name)
    write_json(out / "recipe.json", recipe.values())


def fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    recipe: Recipe,
    lr: float,
    folder: Path,
    console: Console,
) -> Tuner:
    """Train the adapter of `model` on `rows`, from the last checkpoint in `folder` if there is one. Raises Stopped."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as progress:
        watch = Watch(progress, recipe.steps)
        trainer = Tuner(
            model=model,
            args=sft_config(recipe, folder, lr),
            train_dataset=rows.select_columns(["input_ids", "labels"]),
            data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # Watch shows instead
        checkpoint = last_checkpoint(folder)
        with watch.catching_signals():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else os.fspath(checkpoint))
    if watch.stopped:
        raise Stopped(trainer.state.global_step)
    return trainer


def tune(
    recipe: Recipe, out: str | Path, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune as `recipe` says, in folder `out`; returns the content of run.json.

    Leaves `adapter/` (PEFT), `report.html`, `recipe.json` and, last of all, `run.json`. Stopped or killed at any moment
    once recipe.json is there, it continues with `resume` to the same numbers as an unbroken run. Raises CTError for a
    user's mistake, Stopped when the user interrupts the training.
    """
    out = Path(out)
    console = console or Console(stderr=True)
    check_folder(recipe, out, resume, overwrite)
    torch.set_num_threads(recipe.threads)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
    with console.status(f"loading {recipe.model}"):
        loaded = load_model(recipe.model, recipe.dtype)
        model, tokenizer = loaded.model, loaded.tokenizer
        config = adapter_config(recipe, model.dtype)
        if torch.cuda.is_available():
            model.to("cuda")  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in model.parameters())
    max_length = min(recipe.max_length, getattr(model.config, "max_position_embeddings", None) or recipe.max_length)
    with console.status(f"reading {recipe.data}"):
        held = recipe.heldout if recipe.heldout < 1 else int(recipe.heldout)
        named = {"prompt_column": recipe.prompt_column, "completion_column": recipe.completion_column}
        corpus = load_corpus(recipe.data, seed=recipe.seed, heldout=held, limit=recipe.limit, **named)
        train_rows, cut = format_rows(corpus.train, tokenizer, corpus.kind, max_length)
        eval_rows, _ = format_rows(
            corpus.heldout.select(range(min(recipe.eval_rows, len(corpus.heldout)))), tokenizer, corpus.kind, max_length
        )
        eval_list: list[Row] = list(eval_rows)
    notes = [*corpus.notes]
    if cut.truncated or cut.dropped:
        notes.append(
            f"{cut.truncated} training rows were cut to {max_length} tokens and {cut.dropped} dropped as too long"
        )
    for note in filter(None, (loaded.note, *notes)):
        console.print(note, style="yellow", markup=False)

    with console.status("making the basis"):
        if needs_data(recipe.basis):
            chosen = list(train_rows.select(range(min(recipe.calibration_rows, len(train_rows)))))
            batches = [
                collate(chosen[i : i + recipe.batch_size], tokenizer.pad_token_id)
                for i in range(0, len(chosen), recipe.batch_size)
            ]
            config = calibrate(model, config, [{k: v.to(model.device) for k, v in b.items()} for b in batches])
        adapted_model = get_peft_model(model, config)

    # Up to here all mistakes in the recipe have shown, and nothing was written.
    if not resume:
        claim_folder(recipe, out)
    before_file = out / "before.json"
    if not before_file.exists():
        with console.status("measuring the model as it is"), adapted_model.disable_adapter():
            write_json(before_file, measure(adapted_model, tokenizer, corpus, eval_list, recipe))
    before = read_json(before_file)
    console.print(score_line("before", before))

    lr = learning_rate(adapted_model) if recipe.lr == "auto" else recipe.lr
    trainable = sum(p.numel() for p in adapted_model.parameters() if p.requires_grad)
    console.print(f"training {trainable:,} numbers of {parameters:,} ({trainable / parameters:.4%}), lr {lr:g}")
    trainer = fit(adapted_model, tokenizer, train_rows, recipe, lr, out / "checkpoints", console)
    memory = extra_memory(adapted_model, trainer.optimizer)
    round_trained(adapted_model, recipe.save_dtype)
    adapter_bytes = save_adapter(adapted_model, out / "adapter")
    with console.status("measuring the tuned model"):
        after = measure(adapted_model, tokenizer, corpus, eval_list, recipe)
    console.print(score_line("after", after))
    curve = [
        {n: e[n] for n in ("step", "loss", "learning_rate", "seconds", "tokens")}
        for e in trainer.state.log_history
        if "loss" in e
    ]
    with console.status("reading the spectra") as status:
        table = spectra(adapted_model, lambda done, total, _: status.update(f"reading the spectra: {done} of {total}"))
    run = {
        "format": 1,
        "name": f"{loaded.name} on {corpus.name}, {recipe.title}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.values() | {"learning_rate": lr},
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "threads": recipe.threads,
            "device": str(model.device),
        },
        "model": {
            "name": loaded.name,
            "parameters": parameters,
            "dtype": str(model.dtype).removeprefix("torch."),
            "note": loaded.note,
        },
        "data": {
            "name": corpus.name,
            "kind": corpus.kind,
            "train_rows": len(train_rows),
            "heldout_rows": len(eval_list),
            "truncated": cut.truncated,
            "dropped": cut.dropped,
            "notes": notes,
        },
        "fingerprint": config.saved_as["fingerprint"],
        "costs": {
            "trainable": trainable,
            "adapter_bytes": adapter_bytes,
            "extra_memory_bytes": memory,
            "seconds": curve[-1]["seconds"],
        },
        "before": scores(before),
        "after": scores(after),
        "curve": curve,
        "spectra": table,
        "samples": samples(corpus, before, after, recipe.samples),
        "steps": recipe.steps,
        "resumed": resume,
    }
    write_report(run, out / "report.html")
    write_json(out / "run.json", run)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    before_file.unlink()
    return run


def score_line(when: str, scored: dict[str, Any]) -> str:
    """One line for a person: held-out loss, and execution accuracy where there is one."""
    line = f"{when}: held-out loss {scored['heldout_loss']:.3f} nats per token"
    if scored["accuracy"]:
        a = scored["accuracy"]
        line += f", execution accuracy {a['correct']} of {a['total']} ({a['correct'] / a['total']:.0%})"
    return line


def scores(measured: dict[str, Any]) -> dict[str, Any]:
    return {n: measured[n] for n in ("heldout_loss", "heldout_tokens", "accuracy")}


def samples(corpus: Corpus, before: dict[str, Any], after: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """`n` held-out rows with what was generated for them before and after.

    The first rows; where answers are scored, the first that came out right and the first that came out wrong, in turn.
    """
    wrong = [i for i, ok in enumerate(after["ok"]) if ok is not True]
    right = [i for i, ok in enumerate(after["ok"]) if ok is True]
    turns = [i for pair in zip_longest(right, wrong) for i in pair if i is not None]
    found = []
    for i in turns[:n]:
        row = corpus.heldout[i]
        found.append(
            {
                "prompt": as_text(row.get("prompt", row.get("text", ""))),
                "reference": as_text(row.get("completion", "")),
                "before": before["texts"][i],
                "after": after["texts"][i],
                "before_ok": before["ok"][i],
                "after_ok": after["ok"][i],
            }
        )
    return found


def as_text(turns: Any) -> str:
    return turns if isinstance(turns, str) else "\n".join(f"{t['role']}: {t['content']}" for t in turns)
