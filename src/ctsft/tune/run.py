"""One run from a recipe to an adapter, a record and a report, resumable at any moment."""

import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console

from ctsft.adapter.calibrate import calibrate
from ctsft.adapter.config import CTConfig
from ctsft.adapter.store import adapted, save_adapter
from ctsft.data.rows import Corpus
from ctsft.errors import CTError
from ctsft.files import cpu_name, versions, write_json
from ctsft.models.load import Loaded
from ctsft.progress import counted, waiting, watched
from ctsft.spectral.kinds import needs_data
from ctsft.tune.folder import (
    check_folder,
    check_sources,
    claim_folder,
    locked,
    read_sealed,
    sweep,
    write_sealed,
)
from ctsft.tune.material import Material, gathered
from ctsft.tune.measure import NotFinite, Tokens, collate, measure, spectra
from ctsft.tune.recipe import ADAPTER, Recipe
from ctsft.tune.record import (
    Costs,
    DataFacts,
    Machine,
    Measured,
    ModelFacts,
    Point,
    RunRecord,
    Sample,
    Scores,
    Setback,
    Spectrum,
    Worse,
)
from ctsft.tune.report import write_report
from ctsft.tune.trainer import BEST, CTTrainer, State, extra_memory, fit, measured_rate, read_best, restore, state_of


@dataclass
class Parts(Material):
    """What a run is made of before it starts: all mistakes in the recipe have shown when this is there."""

    model: PeftModel
    console: Console
    problems: list[str] = field(default_factory=list)  # what failed after the training, a sentence each

    def measure(self, when: str, generating: Any = nullcontext) -> Measured:
        """The scores of the model as it now is; `when` is told to whoever waits, and `generating()` is around what is
        not the held-out loss."""
        bar = partial(watched, None, f"measuring {when}", file=self.console.file)
        return measure(self.model, self.loaded.tokenizer, self.corpus, self.heldout, self.recipe, bar, generating)

    def tell(self, sentence: str, style: str = "yellow") -> None:
        self.console.print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Around what comes after the training: where it fails, that is told, and costs neither adapter nor record."""
        try:
            yield
        except Exception as error:
            self.problems.append(f"{what} failed ({reason(error)}); all else of the run is there.")
            self.tell(self.problems[-1], "red")


def reason(error: Exception) -> str:
    """An exception of any library in a few words."""
    told = " ".join(str(error).split())
    return f"{type(error).__name__}: {told[:200].rstrip('. ')}" if told else type(error).__name__


def adapter_config(recipe: Recipe, dtype: torch.dtype) -> CTConfig:
    """The adapter of `recipe` for a model in `dtype`; until training ends its numbers are saved exactly."""
    values = {name: getattr(recipe, name) for name in ADAPTER} | {"save_dtype": "float32"}
    if recipe.basis_dtype == "auto":
        values["basis_dtype"] = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return CTConfig(task_type="CAUSAL_LM", **values)


def prepared(recipe: Recipe, console: Console, found: Material | None = None) -> Parts:
    """The model with a fresh adapter, and the rows, from `found` if they are at hand. CTError for whatever does not fit
    together."""
    found = found.of(recipe) if found else gathered(recipe, console)
    model = with_adapter(recipe, found.loaded, found.train, console)
    found.sources.directions = model.peft_config["default"].basis_checksum  # type: ignore[attr-defined]
    return Parts(**vars(found), model=model, console=console)


def with_adapter(recipe: Recipe, loaded: Loaded, train: datasets.Dataset, console: Console) -> PeftModel:
    """The loaded model with the adapter of `recipe`, whose basis is made here, from `train` if it is made from data."""
    model, config = loaded.model, adapter_config(recipe, loaded.model.dtype)
    if needs_data(recipe.basis):
        chosen: list[Tokens] = list(train.select(range(min(recipe.calibration_rows, len(train)))))
        starts = watched(range(0, len(chosen), recipe.batch_size), "calibrating", file=console.file)
        batches = (collate(chosen[i : i + recipe.batch_size], loaded.tokenizer.pad_token_id) for i in starts)
        config = calibrate(model, config, ({k: v.to(model.device) for k, v in b.items()} for b in batches))
    return get_peft_model(model, config)  # type: ignore[return-value]


def measured_before(parts: Parts, out: Path) -> Measured:
    """The scores of the untouched model; measured once, and read from before.json when the run goes on."""
    path = out / "before.json"
    if path.exists():
        try:
            return read_sealed(path, Measured)
        except CTError:
            parts.tell(f"{path} is damaged; the model as it is, is measured again.")
    with parts.model.disable_adapter():
        measured = parts.measure("the model as it is")
    write_sealed(path, measured)
    return measured


def round_trained(model: PeftModel, dtype: Any) -> None:
    """Round to `dtype`, in which the adapter is saved: what is scored is what the file holds. Checkpoints are exact."""
    model.peft_config["default"].save_dtype = dtype  # type: ignore[attr-defined]
    for _, layer in adapted(model, "default"):
        c = layer.ctsft_coefficients["default"]
        c.data = c.data.to(getattr(torch, dtype)).to(c.dtype)


def rose(before: Scores, after: Scores) -> bool:
    """Whether the held-out loss is higher after than before, to the three digits that are shown."""
    return round(after.heldout_loss, 3) > round(before.heldout_loss, 3)


def measured_after(parts: Parts, before: Measured, best: Path) -> tuple[Measured, Worse | None]:
    """The scores of the trained model, as the adapter is to be saved. Where its loss rose, or is not finite, a better
    state is put back.

    Tried in turn, until the loss is no higher than before: the state in the file `best`, and the start.
    """
    writing = partial(parts.surviving, "writing answers after the training")
    round_trained(parts.model, parts.recipe.save_dtype)
    end, tried = None, []
    with suppress(NotFinite):
        end = parts.measure("the tuned model", writing)
        if not rose(before, end):
            return end, None
        tried = [(end, parts.recipe.steps, state_of(parts.model))]
    step, _, state = read_best(best)
    candidates: dict[int, State] = {step: state} | {0: {n: torch.zeros_like(t) for n, t in state.items()}}
    for step, state in candidates.items():
        restore(parts.model, state)
        round_trained(parts.model, parts.recipe.save_dtype)
        tried.append((parts.measure(f"the state after step {step}", writing), step, state_of(parts.model)))
        if not rose(before, tried[-1][0]):
            break
    after, step, state = min(tried, key=lambda one: one[0].heldout_loss)
    restore(parts.model, state)
    return after, Worse(end=end.scores() if end else None, kept_step=step)


def tune(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    found: Material | None = None,
    begun: Callable[[], object] | None = None,
) -> RunRecord:
    """Fine-tune as `recipe` says, in folder `out`; returns the record, which is also in run.json. `found`: the model
    and the rows of the recipe, if they are at hand; `begun` is called once the folder is that of this run.

    Leaves `adapter/` (PEFT), `report.html`, `recipe.json` and, last of all, `run.json`. Stopped or killed at any moment
    once recipe.json is there, it continues with `resume` to the same numbers as an unbroken run. A run whose held-out
    loss rose keeps the best state it saw, and its record says so (`worse`, `warning`). What fails after the training
    (answers, spectra, report) is told, is in the record (`problems`), and costs nothing else. Raises CTError for a
    user's mistake, another process at work in `out` among them, and Stopped when the user interrupts the training.
    """
    out = Path(out)
    console = console or Console(stderr=True, markup=False)
    with locked(out):
        check_folder(recipe, out, resume, overwrite)
        parts = prepared(recipe, console, found)
        if resume:
            check_sources(parts.sources, recipe.model, recipe.data, out, parts.tell)
        else:  # up to here nothing was written
            claim_folder(recipe, parts.sources, out)
            if begun:
                begun()
        sweep(out)
        return trained(parts, out, resume)


def trained(parts: Parts, out: Path, resumed: bool) -> RunRecord:
    """Measure, train, measure again, and leave adapter, report and record in `out`, which is this run's."""
    recipe, model, console, folder = parts.recipe, parts.model, parts.console, out / "checkpoints"
    before = measured_before(parts, out)
    console.print(score_line("before", before), soft_wrap=True)
    lr = recipe.lr
    if lr == "auto":
        with waiting(console, "measuring a learning rate"):
            lr = measured_rate(model, parts.train, recipe.batch_size, parts.loaded.tokenizer.pad_token_id)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trainable / parts.parameters
    console.print(f"training {trainable:,} numbers of {parts.parameters:,} ({share:.4%}), lr {lr:g}", soft_wrap=True)
    trainer = fit(model, parts.loaded.tokenizer, parts.train, parts.heldout, recipe, lr, folder, console.file)
    memory = extra_memory(model, trainer.optimizer)
    try:
        after, worse = measured_after(parts, before, folder / BEST)
    except CTError:
        raise
    except Exception as error:
        save_adapter(model, out / "adapter")
        raise CTError(
            f"measuring the tuned model failed ({reason(error)}); {out / 'adapter'} holds the adapter as it then was, "
            "and --resume tries again."
        ) from error
    console.print(score_line("after", after), soft_wrap=True)
    adapter_bytes = save_adapter(model, out / "adapter")
    curve = points(trainer)
    costs = Costs(
        trainable=trainable,
        adapter_bytes=adapter_bytes,
        extra_memory_bytes=memory,
        seconds=curve[-1].seconds,
    )
    run = record_of(parts, before, after, worse, curve, setbacks(trainer), costs, lr, resumed)
    with parts.surviving("writing the report"):
        write_report(run, out / "report.html")
    run.problems = parts.problems
    write_json(out / "run.json", run.values())
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("before.json", "sources.json"):
        (out / name).unlink()
    return run


def points(trainer: CTTrainer) -> list[Point]:
    """The training curve, a point a step."""
    return [
        Point.model_validate({n: e[n] for n in Point.model_fields}) for e in trainer.state.log_history if "loss" in e
    ]


def setbacks(trainer: CTTrainer) -> list[Setback]:
    """Where the training stepped back, in order."""
    history = trainer.state.log_history
    return [Setback.model_validate({n: e[n] for n in Setback.model_fields}) for e in history if "back_to" in e]


def record_of(
    parts: Parts,
    before: Measured,
    after: Measured,
    worse: Worse | None,
    curve: list[Point],
    setbacks: list[Setback],
    costs: Costs,
    lr: float,
    resumed: bool,
) -> RunRecord:
    """The record of a run that has been measured; its spectra are read here."""
    recipe, loaded, corpus = parts.recipe, parts.loaded, parts.corpus
    table: list[Spectrum] = []
    with parts.surviving("reading the spectra"), counted("reading the spectra", parts.console.file) as show:
        table = spectra(parts.model, show)
    return RunRecord(
        name=f"{loaded.name} on {corpus.name}, {recipe.title}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=recipe.values() | {"learning_rate": lr},
        versions=versions(),
        machine=Machine(
            platform=platform.platform(), cpu=cpu_name(), threads=recipe.threads, device=str(loaded.model.device)
        ),
        model=ModelFacts(
            name=loaded.name,
            parameters=parts.parameters,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            note=loaded.note,
        ),
        data=DataFacts(
            name=corpus.name,
            kind=corpus.kind,
            train_rows=len(parts.train),
            heldout_rows=len(parts.heldout),
            truncated=parts.cut.truncated,
            dropped=parts.cut.dropped,
            notes=parts.notes,
        ),
        fingerprint=parts.model.peft_config["default"].saved_as["fingerprint"],  # type: ignore[attr-defined]
        costs=costs,
        before=before.scores(),
        after=after.scores(),
        curve=curve,
        spectra=table,
        samples=samples(corpus, before, after, recipe.samples),
        steps=recipe.steps,
        resumed=resumed,
        worse=worse,
        setbacks=setbacks,
        problems=[*parts.problems],
    )


def score_line(when: str, scored: Scores) -> str:
    """One line for a person: held-out loss, and execution accuracy where there is one."""
    line = f"{when}: held-out loss {scored.heldout_loss:.3f} nats per token"
    if scored.accuracy:
        right, total = scored.accuracy.correct, scored.accuracy.total
        line += f", execution accuracy {right} of {total} ({right / total:.0%})"
    return line


def samples(corpus: Corpus, before: Measured, after: Measured, n: int) -> list[Sample]:
    """`n` held-out rows with what was generated for them before and after.

    The first rows; where answers are scored, the first that came out right and the first that came out wrong, in turn.
    """
    wrong = [i for i, ok in enumerate(after.ok) if ok is not True]
    right = [i for i, ok in enumerate(after.ok) if ok is True]
    turns = [i for pair in zip_longest(right, wrong) for i in pair if i is not None]
    found = []
    for i in turns[:n]:
        row = corpus.heldout[i]
        found.append(
            Sample(
                prompt=as_text(row.get("prompt", row.get("text", ""))),
                reference=as_text(row.get("completion", "")),
                before=before.texts[i],
                after=after.texts[i],
                before_ok=before.ok[i],
                after_ok=after.ok[i],
            )
        )
    return found


def as_text(turns: Any) -> str:
    return turns if isinstance(turns, str) else "\n".join(f"{t['role']}: {t['content']}" for t in turns)
