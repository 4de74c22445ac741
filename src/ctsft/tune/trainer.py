"""Training: TRL's trainer with our loss, checkpoints that a kill leaves whole, and the way back from a bad rate."""

import hashlib
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import torch
import xxhash
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ctsft.adapter.layer import CTLayer
from ctsft.adapter.loss import summed_loss
from ctsft.adapter.rate import BATCHES, learning_rate
from ctsft.adapter.store import adapted
from ctsft.compat import count_tokens, plain_head
from ctsft.errors import CTError
from ctsft.files import replacing, write_text
from ctsft.progress import watched
from ctsft.tune.measure import NotFinite, Tokens, collate, heldout_loss
from ctsft.tune.recipe import Recipe
from ctsft.tune.record import Setback

SAVE_EVERY = 20.0  # seconds between checkpoints
COMPLETE = "complete"  # a file put into a checkpoint last of all, with its inventory
BEST = "best.safetensors"  # beside the checkpoints: the best state so far
CHECKS = 16  # looks at the held-out loss on the way, at most; every eighth step at most
LONG = 2  # looks in a row above the start's that are too many
RATES = ("base_lrs", "_last_lr")  # what a schedule keeps of them
SLOWER = 0.25  # what the rate is multiplied by when a run steps back

State = dict[str, Tensor]  # trained numbers by the name of their layer


class Stopped(KeyboardInterrupt):
    """The user stopped the run; it can be resumed. Carries the number of steps done."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class CTTrainer(SFTTrainer):
    """TRL's SFTTrainer with the loss computed where there is one, and a loss that is not finite never stepped on.

    TRL's own loss projects every position on the vocabulary, in float32 off CUDA, and reads `lm_head.weight` past any
    adapter. `keeper` is the KeepBest among its callbacks.
    """

    def __init__(self, model: Any, keeper: "KeepBest", **kwargs: Any) -> None:
        self.keeper = keeper
        with plain_head(model):
            super().__init__(model=model, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        bare = self.accelerator.unwrap_model(model)
        loss, count = summed_loss(bare, inputs)
        if not torch.isfinite(loss):
            self.keeper.step_back(self.state, self.optimizer, self.lr_scheduler, NOT_FINITE)
            loss, count = summed_loss(bare, inputs)
        if not torch.isfinite(loss):
            raise CTError(
                f"the loss on the rows of step {self.state.global_step + 1} is {loss.item()} at the best state too; "
                "use dtype float32 or bfloat16, or look at the rows."
            )
        count_tokens(self, int(inputs["attention_mask"].sum()))
        return loss / (num_items_in_batch if num_items_in_batch is not None else count)


class Watch(TrainerCallback):
    """Shows progress, saves every `SAVE_EVERY` seconds, and turns an interrupt into a checkpoint and a stop."""

    def __init__(self, shown: Any) -> None:
        self.shown, self.stopped = shown, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        steps = [{"seconds": 0.0, "tokens": 0}, *(entry for entry in state.log_history if "loss" in entry)]
        self.seconds, self.tokens = steps[-1]["seconds"], steps[-1]["tokens"]
        self.begun = self.saved = time.monotonic()
        self.shown.n = self.shown.last_print_n = self.shown.initial = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        elapsed, tokens = time.monotonic() - self.begun, int(logs["num_tokens"])
        state.log_history[-1] |= {"seconds": self.seconds + elapsed, "tokens": self.tokens + tokens}
        self.shown.set_postfix_str(f"loss {logs['loss']:.3f}, {tokens / elapsed:,.0f} tokens/s", refresh=False)
        self.shown.update(state.global_step - self.shown.n)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The last step is not saved: transformers would train one more when it resumes there.
        due = self.stopped or time.monotonic() - self.saved > SAVE_EVERY
        control.should_save = due and state.global_step < state.max_steps
        control.should_training_stop |= self.stopped

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        shutil.copyfile(Path(args.output_dir) / BEST, folder / BEST)
        write_text(folder / COMPLETE, inventory(folder))
        self.saved = time.monotonic()

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) asks for a checkpoint and a stop, the second one stops at once."""

        def stop(*_: Any) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            self.shown.set_description_str("stopping", refresh=False)

        old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


# ---- the best state


NOT_FINITE, ABOVE = "not finite", "above its start"  # why a run steps back


class KeepBest(TrainerCallback):
    """Keeps the state with the lowest held-out loss on the way, the start included, in the file `path`; the run steps
    back to it, at a quarter of the rate, where its loss is not finite or stays above the start's for long.

    `loss()` is over a batch of held-out rows, always the same ones: one forward pass at most every eighth step, about a
    twentieth of the training time. Nothing is drawn at random, so training goes on to the same bits. Every checkpoint
    has a copy of the file as it then was. Looks (`heldout`) and steps back (`back_to`) stand in the trainer's
    log_history, which checkpoints keep: nothing else is remembered. `tell` gets a sentence for every step back.
    """

    def __init__(
        self, model: PeftModel, loss: Callable[[], float], path: Path, steps: int, tell: Callable[[str], object] = print
    ) -> None:
        self.model, self.loss, self.path, self.tell = model, loss, path, tell
        self.every = max(8, -(-steps // CHECKS))
        self.best = read_best(path)[1] if path.exists() else math.inf

    def look(self, state: Any) -> None:
        """Look at the held-out loss as the model stands, and keep the state if it is the best so far."""
        loss = self.loss()
        self.model.train()
        state.log_history.append({"step": state.global_step, "heldout": loss})
        if loss < self.best:
            self.best = loss
            with replacing(self.path) as scratch:
                save_file(state_of(self.model), scratch, {"step": str(state.global_step), "loss": repr(loss)})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if math.isinf(self.best):
            self.look(state)

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.look(state)
            if too_long(state.log_history):
                self.step_back(state, optimizer, lr_scheduler, ABOVE)

    def step_back(self, state: Any, optimizer: Any, lr_scheduler: Any, why: str) -> None:
        """Go on from the best state with a fresh optimizer; the rest of the schedule is `SLOWER` as high."""
        step, _, best = read_best(self.path)
        restore(self.model, best)
        optimizer.state.clear()
        schedule = lr_scheduler.state_dict()
        lr_scheduler.load_state_dict(schedule | {n: [lr * SLOWER for lr in schedule[n]] for n in RATES})
        for group in optimizer.param_groups:
            group["lr"], group["initial_lr"] = group["lr"] * SLOWER, group["initial_lr"] * SLOWER
        back = Setback(step=state.global_step, back_to=step, why=why, peak=lr_scheduler.base_lrs[0])
        state.log_history.append(back.model_dump())
        self.tell(back.told())


def too_long(history: list[dict[str, Any]]) -> bool:
    """Whether the last `LONG` looks since the last step back all lie above the first look, that of the start."""
    looks = [entry["heldout"] for entry in history if "heldout" in entry]
    since: list[float] = []
    for entry in history:
        since = [] if "back_to" in entry else [*since, entry["heldout"]] if "heldout" in entry else since
    return len(since) >= LONG and all(not loss <= looks[0] for loss in since[-LONG:])


def read_best(path: Path) -> tuple[int, float, State]:
    """The best state that `KeepBest` kept in `path`: its step, its loss on the few rows, and its numbers."""
    with safe_open(path, "pt") as file:
        notes = file.metadata()
        return int(notes["step"]), float(notes["loss"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


def state_of(model: PeftModel) -> State:
    """A copy of all trained numbers of `model`."""
    return {n: m.ctsft_coefficients["default"].detach().cpu().clone() for n, m in adapted(model, "default")}


def restore(model: PeftModel, state: State) -> None:
    """Put the trained numbers of `state` into `model`."""
    for name, layer in adapted(model, "default"):
        layer.ctsft_coefficients["default"].data.copy_(state[name])


# ---- checkpoints and settings


def inventory(folder: Path) -> str:
    """The files of a checkpoint with a hash (xxh3, 128 bits) of the content of each."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != COMPLETE:
            with path.open("rb") as file:
                lines.append(f"{path.name} {hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}\n")  # type: ignore[arg-type]
    return "".join(lines)


def last_checkpoint(folder: Path, tell: Callable[[str], object] = print) -> Path | None:
    """The newest whole checkpoint. Those that a kill left half-written, or half-deleted, are removed; so are damaged
    ones, of which `tell` gets a sentence each."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d{1,18})", path.name)
        if not step or not path.is_dir():
            continue
        mark = path / COMPLETE
        if mark.exists() and mark.read_bytes() == inventory(path).encode():
            found.append((int(step[1]), path))
        else:
            if mark.exists():
                tell(f"{path} is damaged; the run goes on from before it.")
            shutil.rmtree(path)
    return max(found, default=(0, None))[1]


def last_state(folder: Path, tell: Callable[[str], object] = print) -> Path | None:
    """As `last_checkpoint`; the file of the best state in `folder` becomes the one that belongs to it, if any."""
    checkpoint, best = last_checkpoint(folder, tell), folder / BEST
    best.unlink(missing_ok=True)
    if checkpoint is not None:
        with replacing(best) as scratch:
            shutil.copyfile(checkpoint / BEST, scratch)
    return checkpoint


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


CHUNK = 8  # batches whose rows are sorted by length among themselves
ARRANGED = 1_000_000  # rows whose order is written down at most; after them it begins anew


def arranged(lengths: list[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """The rows of all steps one after the other: every row in each round, by chance, those of a batch of like length.

    Rows come in a seeded order; those of every `CHUNK` batches are sorted by their `lengths`, cut into batches, and the
    batches mixed. So little of a batch is padding, and short and long batches take turns.
    """
    draw = random.Random(seed)
    count = min(steps * batch_size, max(ARRANGED // batch_size, 1) * batch_size)
    order: list[int] = []
    while len(order) < count:
        order += draw.sample(range(len(lengths)), len(lengths))
    size = batch_size * min(CHUNK, max(1, len(lengths) // batch_size))
    found: list[int] = []
    for i in range(0, count, size):
        rows = sorted(order[i : min(i + size, count)], key=lengths.__getitem__)
        batches = [rows[j : j + batch_size] for j in range(0, len(rows), batch_size)]
        found += chain.from_iterable(draw.sample(batches, len(batches)))
    return found


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
        train_sampling_strategy="sequential",  # see arranged
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


def measured_rate(model: PeftModel, rows: datasets.Dataset, size: int, pad: int) -> float:
    """The rate by the rule, measured on the first `rows`, in batches of `size` if there are so many."""
    first: list[Tokens] = list(rows.select(range(min(BATCHES * size, len(rows)))))
    groups = [first[i::BATCHES] for i in range(min(BATCHES, len(first)))]
    batches = [{k: v.to(model.device) for k, v in collate(group, pad).items()} for group in groups]
    return learning_rate(model, batches if len(batches) > 1 else batches * 2)


def fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    heldout: list[Tokens],
    recipe: Recipe,
    lr: float,
    folder: Path,
    file: Any,
) -> CTTrainer:
    """Train the adapter of `model` on `rows`, from the last checkpoint in `folder` if there is one. Raises Stopped.

    The best state by the first of the `heldout` rows is left in `folder` (see KeepBest). `file` gets the progress.
    """
    few, pad = heldout[: recipe.batch_size], tokenizer.pad_token_id

    def tell(sentence: str) -> None:
        print(sentence, file=file)

    def look() -> float:
        try:
            return heldout_loss(model, few, pad)[0]
        except NotFinite:
            return math.inf

    order = arranged([len(row) for row in rows["input_ids"]], recipe.batch_size, recipe.steps, recipe.seed)
    checkpoint = last_state(folder, tell)
    with watched(text="training", total=recipe.steps, file=file) as shown:
        watch = Watch(shown)
        best = KeepBest(model, look, folder / BEST, recipe.steps, tell)
        trainer = CTTrainer(
            model=model,
            keeper=best,
            args=sft_config(recipe, folder, lr),
            train_dataset=rows.select_columns(["input_ids", "labels"]).select(order),
            data_collator=lambda rows: collate(rows, pad),
            processing_class=tokenizer,
            callbacks=[watch, best],
        )
        trainer.remove_callback(PrinterCallback)  # Watch shows instead
        with watch.catching_signals():
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else os.fspath(checkpoint))
            except UnpicklingError:  # torch reads tensors and plain values only, and refuses all else
                raise CTError(f"{checkpoint} cannot be read: it holds more than numbers; delete it.") from None
    if watch.stopped:
        raise Stopped(trainer.state.global_step)
    return trainer
