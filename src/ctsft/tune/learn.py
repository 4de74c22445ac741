"""Learning directions from siblings in a folder: from rows to one file, resumable at any moment."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ctsft.adapter.config import CTConfig
from ctsft.adapter.learn import learn_basis, targets_of
from ctsft.adapter.learned import Learned
from ctsft.choices import LEARNED
from ctsft.data.rows import Corpus
from ctsft.data.siblings import load_siblings
from ctsft.data.tokens import fits, format_rows
from ctsft.errors import CTError
from ctsft.files import write_json
from ctsft.models.load import Loaded, load_model
from ctsft.progress import waiting
from ctsft.spectral.basis import generator
from ctsft.spectral.weights import fingerprint
from ctsft.tune.folder import check_sources, hashed, is_foreign, locked, sweep, write_sealed
from ctsft.tune.lesson import FIELDS, Lesson, read_lesson
from ctsft.tune.material import settle
from ctsft.tune.measure import Tokens, collate
from ctsft.tune.record import Sources

LESSON, SOURCES, STATE = "lesson.json", "sources.json", "state.safetensors"  # in the folder until all is learned
SCRATCH = re.compile(rf"\.({'|'.join(map(re.escape, (LEARNED, LESSON, SOURCES, STATE)))})-[0-9a-f]{{32}}")
MARKS = (LESSON, LEARNED)  # a folder with one of them is ours
TOGETHER = 4  # siblings that a step sees at most


@dataclass
class Family:
    """Siblings in tokens: the rows to train on and those to score, by the name of each."""

    train: dict[str, list[Tokens]]
    heldout: dict[str, list[Tokens]]
    notes: list[str]


def family_of(lesson: Lesson, loaded: Loaded) -> tuple[Family, dict[str, Corpus]]:
    """The siblings of `lesson` in tokens, and as they were read."""
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    longest = min(lesson.max_length, context or lesson.max_length)
    corpora, notes = load_siblings(
        lesson.data or (),
        lesson.by,
        seed=lesson.seed,
        heldout=lesson.heldout if lesson.heldout < 1 else int(lesson.heldout),
        limit=lesson.limit,
        prompt_column=lesson.prompt_column,
        completion_column=lesson.completion_column,
    )
    family = Family({}, {}, notes)
    for name, corpus in corpora.items():
        how = (loaded.tokenizer, corpus.kind, longest)
        train, cut = format_rows(corpus.train, *how, context=context, which=f"training row of {name}")
        scored = corpus.heldout.select(range(min(lesson.eval_rows, len(corpus.heldout))))
        family.train[name] = list(train)
        kept, lost = format_rows(scored, *how, context=context, which=f"held-out row of {name}")
        family.heldout[name] = list(kept)
        notes = [*corpus.notes, *cut.told("training row", longest), *lost.told("held-out row", longest)]
        family.notes += [f"{name}: {note}" for note in notes]
    return family, corpora


def batches_of(rows: list[Tokens], size: int, pad: int, seed: int, name: str) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` rows without end: every round has all rows, in an order of its own."""
    picked: list[Tokens] = []
    round_ = 0
    while True:
        order = torch.randperm(len(rows), generator=generator(seed, "rows", name, round_)).tolist()
        for i in order:
            picked.append(rows[i])
            if len(picked) == size:
                yield collate(picked, pad)
                picked = []
        round_ += 1


def check_folder(lesson: Lesson, out: Path, resume: bool, overwrite: bool) -> None:
    """CTError where `out` holds learned directions, another learning, none to resume, or something not ours."""
    begun = (out / LESSON).exists()
    if is_foreign(out, MARKS):
        raise CTError(f"{out} exists and holds no directions of ctsft; give another --out.")
    if resume and not begun:
        told = f"all is learned: ctsft basis show {out}" if (out / LEARNED).exists() else "start one without --resume"
        raise CTError(f"{out} holds no learning to resume; {told}.")
    if resume and (old := read_lesson(out / LESSON)) != lesson:
        wrong = [n for n in FIELDS if getattr(old, n) != getattr(lesson, n)]
        raise CTError(
            f"the learning in {out} was started with other {', '.join(wrong)}; resume it without giving them."
        )
    if not (resume or overwrite) and (begun or (out / LEARNED).exists()):
        state = "an unfinished learning; continue it with --resume, replace" if begun else "learned directions; replace"
        raise CTError(f"{out} holds {state} it with --overwrite, or give another --out.")


def learn(
    lesson: Lesson, out: str | Path, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Learned:
    """Learn directions as `lesson` says and leave them in `out`/basis.safetensors, and nothing else.

    Stopped or killed at any moment once lesson.json is there, it continues with `resume` to the same numbers as an
    unbroken learning. Raises CTError for a user's mistake, another process at work in `out` among them.
    """
    out, console = Path(out), console or Console(stderr=True, markup=False)
    with locked(out, MARKS):
        check_folder(lesson, out, resume, overwrite)
        settle(lesson.threads)

        def tell(sentence: str) -> None:
            console.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)

        with waiting(console, f"loading {lesson.model}"):
            loaded = load_model(lesson.model, lesson.dtype)
            weights = fingerprint(loaded.model.named_parameters())
        fits(loaded.tokenizer, loaded.model)
        targets_of(loaded.model, CTConfig(k=lesson.k, basis="random", target_modules=lesson.target_modules))
        with waiting(console, f"reading {', '.join(lesson.data or ())}"):
            family, corpora = family_of(lesson, loaded)
            sources = sources_of(lesson, family, corpora, weights)
        for note in filter(None, (loaded.note, *family.notes)):
            tell(note)
        if resume:
            check_sources(sources, lesson.model, ", ".join(lesson.data or ()), out, tell)
        else:  # up to here nothing was written
            for name in (LEARNED, STATE, SOURCES):
                (out / name).unlink(missing_ok=True)
            write_json(out / LESSON, lesson.values())
            write_sealed(out / SOURCES, sources)
        learned = taught(lesson, loaded, family, out / STATE, console)
        learned.save(out)
        for name in (LESSON, STATE, SOURCES):  # what remains without the first is finished
            (out / name).unlink(missing_ok=True)
        sweep(out, SCRATCH)
    return learned


def sources_of(lesson: Lesson, family: Family, corpora: dict[str, Corpus], weights: str) -> Sources:
    """What the learning is started from, as hashes."""
    parts: list[Any] = [[name, part] for name, corpus in corpora.items() for part in (corpus.train, corpus.heldout)]
    return Sources(
        recipe=hashed([lesson.values()]),
        data=hashed(row for name, part in parts for row in ([name], *part)),
        tokens=hashed([family.train, family.heldout]),
        weights=weights,
    )


def taught(lesson: Lesson, loaded: Loaded, family: Family, state: Path, console: Console) -> Learned:
    """The directions that the siblings in `family` teach; where the file `state` is, learning goes on from it."""
    pad, names = loaded.tokenizer.pad_token_id, list(family.train)
    size = max(1, lesson.batch_size // min(TOGETHER, len(names)))  # rows of one sibling
    model: Any = loaded.model
    if torch.cuda.is_available():
        model.to("cuda")
    heldout = {
        name: [collate(rows[i : i + 16], pad) for i in range(0, len(rows), 16)] for name, rows in family.heldout.items()
    }
    learned = learn_basis(
        model,
        {name: batches_of(rows, size, pad, lesson.seed, name) for name, rows in family.train.items()},
        lesson.k,
        steps=lesson.steps,
        batches=lesson.batch_size // size,
        heldout=heldout,
        target_modules=lesson.target_modules,
        rates=(lesson.lr, 10 * lesson.lr),
        nested=lesson.nested,
        seed=lesson.seed,
        keep=state,
        file=console.file,
    )
    learned.facts.model = loaded.name
    return learned
