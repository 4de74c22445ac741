"""A comparison in a folder: every arm's rate, then every arm on every seed; each trial is kept when it ends."""

import platform
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from rich.console import Console

from ctsft.data.tokens import prompt_ids
from ctsft.errors import CTError, wrong_fields
from ctsft.files import cpu_name, versions, write_json
from ctsft.plan.arms import Candidate, candidate
from ctsft.plan.contest import Contest, make_contest, read_contest
from ctsft.plan.page import write_comparison
from ctsft.plan.rates import best_of, raced
from ctsft.plan.record import Arm, Comparison, Start, Trial
from ctsft.plan.trial import Bench, narrowest, number
from ctsft.progress import watched
from ctsft.spectral.kinds import content
from ctsft.tune.folder import check_sources, is_foreign, locked, sweep, write_sealed
from ctsft.tune.material import Material, gathered
from ctsft.tune.measure import answers
from ctsft.tune.record import Accuracy, DataFacts, Machine, ModelFacts, Part

P = TypeVar("P", bound=Part)
CONTEST, SOURCES, TRIALS, STARTS = "contest.json", "sources.json", "trials.jsonl", "rates.jsonl"
RECORD, PAGE = "comparison.json", "comparison.html"
SCRATCH = re.compile(rf"\.({'|'.join(map(re.escape, (CONTEST, SOURCES, RECORD, PAGE)))})-[0-9a-f]{{32}}")
RACE = 0  # the seed that rates are found on; those that are judged come after it
LOOKS = 8  # at the held-out loss, the last at the end
SHARE = 4  # a short race takes the steps of a trial over this,
LEAST = 10  # and at least so many


def compare(
    out: str | Path = "runs/comparison",
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    **options: Any,
) -> Comparison:
    """Compare methods on one's own data, in folder `out`; options are those of `ctsft compare`, such as model, data,
    arms, seeds, steps. Returns the record, losses in nats per token, which is also in comparison.json.

    Leaves comparison.html, and every finished trial as a line of trials.jsonl at once: stopped at any moment, it goes
    on with `resume` to the same numbers. Raises CTError for a mistake, another process at work in `out` among them.
    """
    return contested(make_contest(options), Path(out), resume, overwrite, console)


def contested(
    contest: Contest, out: Path, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Comparison:
    """`compare` by a Contest, which gets the arms of the one that it goes on with after its own."""
    console = console or Console(stderr=True, markup=False)
    with locked(out, (CONTEST,)):
        check_folder(contest, out, resume, overwrite)
        material = gathered(contest.recipe(), console)
        contest.fit(narrowest(material.loaded.model))
        if resume:
            check_sources(material.sources, contest.model, contest.data, out, console.print)
            contest.add(read_contest(out / CONTEST).arms)
        match = Match(contest, material, out, console, resume)
        rules = match.rules()  # what an arm cannot do shows before anything is written, and before anything trains
        if not resume:
            for name in (RECORD, PAGE, TRIALS, STARTS):
                (out / name).unlink(missing_ok=True)
            write_sealed(out / SOURCES, material.sources)
        write_json(out / CONTEST, contest.values())
        sweep(out, SCRATCH)
        found = match.played(rules)
        write_json(out / RECORD, found.model_dump())
        write_comparison(found, out / PAGE)
    return found


def check_folder(contest: Contest, out: Path, resume: bool, overwrite: bool) -> None:
    """CTError where `out` holds another comparison, none to resume, or something that is not ours."""
    begun = (out / CONTEST).exists()
    if is_foreign(out, (CONTEST,)):
        raise CTError(f"{out} exists and is no comparison of ctsft; give another --out.")
    if resume and not begun:
        raise CTError(f"{out} holds no comparison to resume; start one without --resume.")
    if begun and not (resume or overwrite):
        raise CTError(
            f"{out} holds a comparison; continue it with --resume, replace it with --overwrite, or give another --out."
        )
    if resume and (old := read_contest(out / CONTEST)).fixed() != contest.fixed():
        wrong = [name for name, value in old.fixed().items() if contest.fixed()[name] != value]
        raise CTError(
            f"the comparison in {out} was started with other {', '.join(wrong)}; resume it without giving them."
        )


class Lines(dict[Any, P]):
    """Records by key, kept as JSON lines in a file: what is added is on disk at once. `old`: with what is there."""

    def __init__(self, path: Path, kind: type[P], key: Callable[[P], Any], old: bool = True) -> None:
        super().__init__()
        self.path, self.key = path, key
        if not (old and path.exists()):
            return
        whole = path.read_bytes().rpartition(b"\n")[0]  # a kill may have cut the last line
        for i, line in enumerate(whole.splitlines(), 1):
            try:
                found = kind.model_validate_json(line)
            except ValidationError as error:
                raise CTError(
                    f"{path} is damaged in line {i} ({wrong_fields(error)}); delete that line, or start anew with "
                    "--overwrite."
                ) from None
            self[key(found)] = found
        path.write_bytes(whole + b"\n" if whole else b"")

    def add(self, found: P) -> P:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(found.model_dump_json() + "\n")
        self[self.key(found)] = found
        return found


def key_of(trial: Trial) -> tuple[str, int, float, int]:
    return trial.candidate, trial.seed, trial.rate, trial.steps


class Match:
    """The trials of a contest, those that are in the folder taken as they are, if `old`."""

    def __init__(self, contest: Contest, material: Material, out: Path, console: Console, old: bool) -> None:
        self.contest, self.material, self.console = contest, material, console
        tokenizer = material.loaded.tokenizer
        self.bench = Bench(
            material.loaded.model,
            tokenizer.pad_token_id,
            material.train,
            material.heldout,
            contest.batch_size,
            self.score if contest.questions and material.corpus.examples else None,
        )
        self.trials = Lines(out / TRIALS, Trial, key_of, old)
        self.starts = Lines(out / STARTS, Start, lambda start: start.candidate, old)
        self.race_steps = contest.steps
        if contest.rates == "short":
            self.race_steps = min(contest.steps, max(LEAST, contest.steps // SHARE))

    def score(self, model: Any) -> Accuracy | None:
        """How many of the first held-out questions `model` answers as wanted."""
        corpus, tokenizer = self.material.corpus, self.material.loaded.tokenizer
        asked = range(min(self.contest.questions, len(corpus.examples)))
        context = getattr(model.config, "max_position_embeddings", None)
        prompts = [prompt_ids(corpus.heldout[i], tokenizer, corpus.kind, context) for i in asked]
        return answers(model, tokenizer, corpus, prompts, self.contest.recipe(), lambda n: None)[2]

    def rules(self) -> list[Start]:
        """The rule's rates of those arms that have none in the folder; nothing is written. CTError where the trials of
        the others are not from the directions that their files now hold."""
        held = {name: self.directions(candidate(name)) for name in self.contest.arms or ()}
        for name in held.keys() & self.starts.keys():
            if self.starts[name].directions != held[name]:
                raise CTError(
                    f"the trials of {name} in {self.starts.path.parent} are not from the directions that its file now "
                    "holds; put back what changed, or start anew with --overwrite."
                )
        shown = watched([n for n in held if n not in self.starts], "rates by the rule", file=self.console.file)
        return [
            Start(candidate=name, rule=self.bench.rate(candidate(name), RACE), directions=held[name]) for name in shown
        ]

    def directions(self, found: Candidate) -> str | None:
        """The checksum of the file that the directions of an arm are read from, if there is one."""
        return content(self.bench.config(found, RACE)) if found.basis_file else None

    def played(self, rules: list[Start]) -> Comparison:
        """Every rate, every trial, and the record of all."""
        contest, bench = self.contest, self.bench
        for start in rules:
            self.starts.add(start)
        before, asked = number(bench.start), bench.score(bench.model) if bench.score else None
        if before is None:
            raise CTError(f"the held-out loss of {contest.model} is not finite as it is; use dtype float32.")
        races = 0 if contest.rates == "rule" else 3 * self.race_steps
        total = len(contest.arms or ()) * (races + contest.seeds * contest.steps)
        with watched(text="comparing", total=total, file=self.console.file) as shown:
            self.shown = shown
            tried = {name: self.rates(name) for name in contest.arms or ()}
            for seed in range(RACE + 1, RACE + 1 + contest.seeds):  # seed by seed: whoever stops it has whole rounds
                for name, rates in tried.items():
                    self.trial(name, seed, best_of(rates), contest.steps, f"{name}, seed {seed} of {contest.seeds}")
        arms = [self.arm(name, rates) for name, rates in tried.items()]
        return record_of(contest, self.material, before, asked, arms)

    def rates(self, name: str) -> list[tuple[float, float]]:
        """(rate, held-out loss of its race) of an arm; of the rule alone there is no race, and the loss is 0."""
        if self.contest.rates == "rule":
            return [(self.starts[name].rule, 0.0)]
        planned = 3

        def loss(lr: float) -> float:
            nonlocal planned
            planned -= 1
            if planned < 0:  # the grid grows
                self.shown.total += self.race_steps
            return self.trial(name, RACE, lr, self.race_steps, f"{name}, rate {lr:g}").end

        return raced(self.starts[name].rule, loss)

    def trial(self, name: str, seed: int, lr: float, steps: int, told: str) -> Trial:
        """The trial as it is in the folder, or made now. Races are looked at in the end alone."""
        key = name, seed, lr, steps
        if key in self.trials:
            self.shown.total -= steps
            return self.trials[key]
        self.shown.set_description_str(told, refresh=False)
        looks = {steps} if seed == RACE else {steps * i // LOOKS for i in range(LOOKS + 1)}
        begun, shown = self.shown.n, self.shown
        done = self.bench.trial(
            candidate(name), seed, steps, lr, looks, scored=seed != RACE, tick=lambda n: shown.update(n)
        )
        shown.update(begun + steps - shown.n)  # one that diverged ended early
        return self.trials.add(done)

    def arm(self, name: str, rates: list[tuple[float, float]]) -> Arm:
        found, best = candidate(name), best_of(rates)
        seeds = range(RACE + 1, RACE + 1 + self.contest.seeds)
        return Arm(
            name=name,
            told=found.arm.told,
            rule=self.starts[name].rule,
            tried=[] if self.contest.rates == "rule" else [(lr, number(loss)) for lr, loss in rates],
            race_steps=self.race_steps,
            rate=best,
            trials=[self.trials[name, seed, best, self.contest.steps] for seed in seeds],
        )


def record_of(
    contest: Contest, material: Material, before: float, asked: Accuracy | None, arms: list[Arm]
) -> Comparison:
    """The record of a contest whose trials are all done."""
    loaded, corpus, cut = material.loaded, material.corpus, material.cut
    model: Any = loaded.model
    return Comparison(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        contest=contest.values(),
        versions=versions(),
        machine=Machine(
            platform=platform.platform(), cpu=cpu_name(), threads=contest.threads, device=str(model.device)
        ),
        model=ModelFacts(
            name=loaded.name,
            parameters=material.parameters,
            dtype=str(model.dtype).removeprefix("torch."),
            note=loaded.note,
        ),
        data=DataFacts(
            name=corpus.name,
            kind=corpus.kind,
            train_rows=len(material.train),
            heldout_rows=len(material.heldout),
            truncated=cut.truncated,
            dropped=cut.dropped,
            notes=material.notes,
        ),
        before=before,
        before_accuracy=asked,
        arms=arms,
    )
