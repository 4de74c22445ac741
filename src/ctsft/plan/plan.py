"""A plan: short races of a few arms on the user's own rows, what they predict, and what is recommended."""

import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch
from rich.console import Console

from ctsft.adapter.learned import Learned
from ctsft.errors import CTError
from ctsft.files import cpu_name, versions
from ctsft.plan.arms import ARMS, Candidate, candidate
from ctsft.plan.budget import planning
from ctsft.plan.choose import Option, decide
from ctsft.plan.predict import by_size, growth, predicted
from ctsft.plan.question import Question, make_question
from ctsft.plan.rates import further, lowest, power
from ctsft.plan.record import Trial
from ctsft.plan.told import Plan, Race
from ctsft.plan.trial import Bench, narrowest
from ctsft.progress import counted
from ctsft.tune.material import Material, gathered
from ctsft.tune.measure import heldout_loss
from ctsft.tune.recipe import Recipe
from ctsft.tune.record import Machine

KS = (4, 16, 64, 256)
GAINS = 64
PEERS = ("lora-8", "lora-1", "vera-256")
FIRST = ("diagonal-64", "lora-8", "gains-64", "diagonal-16")  # if time is short, these run and the rest is estimated

# Steps of a race, rows a step, rows held out: the first that leaves time for all arms, or the last.
LEVELS = ((12, 8, 48), (12, 4, 32), (12, 2, 24), (12, 2, 16))
PROBE = 4  # rows, in one forward pass, that tell how fast the machine is
BACK = 2.5  # how much longer than a forward pass a step takes
PASSES = 6  # that the rate takes
RACES = 2.5  # of an arm, at several rates, for which there should be time


def make_plan(*, console: Console | None = None, **options: Any) -> Plan:
    """Say which adapter to train on one's own data; options are those of `ctsft plan`, such as model, data, budget.

    Returns the plan: `decision`, `options` (every arm with its predicted held-out loss in nats per token and a 90%
    interval), `tune` (the command). Nothing is written. Once the model is loaded it takes at most 3% of the planned
    training, or a minute if that is more, or `spend` seconds. Raises CTError for a mistake.
    """
    return answered(make_question({"threads": torch.get_num_threads()} | options), console)


def answered(question: Question, console: Console | None = None, found: Material | None = None) -> Plan:
    """`make_plan` by a Question; `found`: its model and rows, if they are at hand. The model is left as it is."""
    console = console or Console(stderr=True, markup=False)
    check_arms(question)
    most = max(held for _, _, held in LEVELS)
    found = found or gathered(question.recipe(eval_rows=most), console)
    scored = found.heldout[:most]
    began = time.monotonic()
    arms = ordered(chosen_arms(found.loaded.model, question))
    second = seconds_a_row(found)
    steps, size = question.allowed().length(question.steps, BACK * second * question.batch_size), question.batch_size
    spend = question.spend or planning(steps * size * BACK * second)
    race = level(len(arms), second, spend, steps, size)
    race.heldout = min(race.heldout, len(scored))
    bench = Bench(
        found.loaded.model, found.loaded.tokenizer.pad_token_id, found.train, scored[: race.heldout], race.rows
    )
    tried = races(bench, arms, race, question.seed, began + spend, console)
    start = bench.loss(bench.model, scored)  # races are scored on few of these rows
    options = weighed(bench, arms, tried, race, question, start)
    decision = decide(start, options, question.allowed(), len(found.train), len(scored))
    seconds = time.monotonic() - began
    training = next((o.seconds for o in options if o.candidate == decision.candidate), options[0].seconds)
    return Plan(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=found.loaded.name,
        data=found.corpus.name,
        question=asdict(question),
        rows=len(found.train),
        heldout=len(scored),
        tokens=sum(map(len, found.train["input_ids"])) / len(found.train),
        parameters=found.parameters,
        start=start,
        race=race,
        options=options,
        decision=decision,
        tune=command(question, decision.candidate, options),
        seconds=round(seconds, 1),
        share=seconds / training,
        notes=found.notes,
        versions=versions(),
        machine=Machine(
            platform=platform.platform(),
            cpu=cpu_name(),
            threads=question.threads,
            device=str(found.loaded.model.device),
        ),
    )


# ---- what runs


def check_arms(question: Question) -> None:
    """CTError where one that is asked for is none, or none of them can be recommended; nothing is loaded for it."""
    named = [*(question.arms or ()), *([f"diagonal@{question.basis}"] if question.basis is not None else [])]
    kinds = {arm.arm.kind for name in named for arm in spelled(name, KS)}
    if kinds and "form" not in kinds:
        forms = ", ".join(name for name, arm in ARMS.items() if arm.kind == "form")
        raise CTError(f"a plan recommends an arm of ours, and {', '.join(named)} is none; name one of {forms} as well.")


def chosen_arms(model: Any, question: Question) -> list[Candidate]:
    """The arms that are asked for, else a few of every size; along learned directions too, where they are at hand."""
    most = narrowest(model)
    ks = [k for k in KS if k <= most]
    if most < KS[-1] and most >= 1.4 * max(ks, default=1):
        ks.append(most)
    names = [*(question.arms or (*own_arms(model), *PEERS))]
    if question.basis is not None:
        names.append(f"diagonal@{question.basis}")
    found = [arm for name in names for arm in spelled(name, ks)]
    held = {place: directions(place) for place in {arm.basis_file for arm in found} if place}
    return [replace(arm, k=min(arm.k, held[arm.basis_file])) if arm.basis_file else arm for arm in found]


def own_arms(model: Any) -> tuple[str, str]:
    """The arms of ours that are weighed where none are asked for, as `spelled` reads them."""
    return "diagonal", f"gains-{min(GAINS, narrowest(model))}"


def directions(place: str) -> int:
    """How many every matrix has at least, of those that were learned in the folder `place`."""
    k = Learned.read(place).k
    return k if isinstance(k, int) else min(k.values())


def spelled(name: str, ks: Sequence[int]) -> list[Candidate]:
    """The arm called `name`; one of our forms without a K stands for it at all `ks`."""
    method, at, where = name.partition("@")
    if method in ARMS and ARMS[method].kind == "form":
        return [candidate(f"{method}-{k}{at}{where}") for k in ks]
    return [candidate(name)]


def ordered(arms: Sequence[Candidate]) -> list[Candidate]:
    """`arms`, first those that tell most."""
    rank = {name: i for i, name in enumerate(FIRST)}
    return sorted(dict.fromkeys(arms), key=lambda arm: rank.get(arm.name, len(rank) - (arm.basis == "learned")))


def seconds_a_row(found: Material) -> float:
    """Of a forward pass over held-out rows."""
    rows, pad = found.heldout[:PROBE], found.loaded.tokenizer.pad_token_id
    heldout_loss(found.loaded.model, rows[:1], pad)  # the first pass of a model takes longer
    began = time.monotonic()
    heldout_loss(found.loaded.model, rows, pad)
    return (time.monotonic() - began) / len(rows)


def level(arms: int, second: float, spend: float, steps: int, size: int) -> Race:
    """How long the races are: the longest of LEVELS that all `arms` have time for within `spend` seconds."""
    for long, rows, held in LEVELS:
        long, rows = min(long, steps), min(rows, size)
        if arms * second * (BACK * rows * PASSES + RACES * (BACK * rows * long + held)) <= spend:
            break
    return Race(steps=long, rows=rows, heldout=held)


def races(
    bench: Bench, arms: Sequence[Candidate], race: Race, seed: int, end: float, console: Console
) -> dict[str, dict[int, Trial]]:
    """By arm and power of three, times its measured rate: the races that end before the clock is at `end`, as far as
    can be told; those of two arms at least."""
    tried: dict[str, dict[int, Trial]] = {}
    longest = 0.0
    bench.start  # noqa: B018  (measured before the first race is timed)
    with counted("racing", console.file) as show:
        for i, (arm, at) in enumerate(heats(arms, tried)):
            began = time.monotonic()
            if len(tried) >= 2 and began + longest > end:
                break
            show(i, max(i + 1, 3 * len(arms)), arm.name)
            own = tried.setdefault(arm.name, {})
            own[at] = bench.trial(arm, seed, race.steps, power(own[0].rate, at) if own else None)
            longest = max(longest, time.monotonic() - began)
    return tried


def heats(arms: Sequence[Candidate], tried: dict[str, dict[int, Trial]]) -> Iterator[tuple[Candidate, int]]:
    """What races next, and at which power of three times its measured rate, while `tried` fills: ours and the first
    peers at that rate; the first arm of each kind at rates beside its best, then the others at the one that won for
    their kind; all that again for the other peers; at last everyone beside their best."""
    first = {(arm.method, arm.basis): arm for arm in reversed(arms)}

    def climb(arm: Candidate) -> Iterator[tuple[Candidate, int]]:
        while (at := further(ends(tried[arm.name]))) is not None:
            yield arm, at

    ours = [arm for arm in arms if arm.arm.kind == "form"]
    for some in (ours, [arm for arm in arms if arm not in ours]):
        yield from ((arm, 0) for arm in arms if arm.name not in tried and (arm in some or arm.name in FIRST))
        for arm in some:
            if arm in first.values():
                yield from climb(arm)
        for arm in some:
            won = lowest(ends(tried[first[arm.method, arm.basis].name]))
            if won not in tried[arm.name]:
                yield arm, won
    for arm in arms:
        yield from climb(arm)


def ends(tried: dict[int, Trial]) -> dict[int, float]:
    return {at: trial.end for at, trial in tried.items()}


# ---- what it says


def weighed(
    bench: Bench,
    arms: Sequence[Candidate],
    tried: dict[str, dict[int, Trial]],
    race: Race,
    question: Question,
    start: float,
) -> list[Option]:
    """What is predicted of every arm, the smallest first; one that did not run from the nearest one that did. Drops are
    those of the races, below `start`."""
    trials = {name: own[lowest(ends(own))] for name, own in tried.items()}
    budget, options = question.allowed(), []
    pace = sum(t.seconds for t in trials.values()) / sum(len(t.clock) for t in trials.values())
    for arm in arms:
        trial = trials.get(arm.name)
        if trial:
            trained, weight, memory = trial.trained, trial.adapter_bytes, trial.memory_bytes
            near, further = trial, 0.0
        else:
            with bench.equipped(arm, question.seed) as equipped:
                trained, weight = equipped.trained, equipped.adapter_bytes()
                memory = equipped.memory_bytes + 12 * trained  # gradients and Adam's two moments
            near = nearest(arm, trained, trials)
            further = by_size(near.trained, trained)
        own = trial.seconds / len(trial.clock) if trial and trial.clock else pace
        step = own * question.batch_size / race.rows
        steps = budget.length(question.steps, step)
        raced = min(race.steps, steps)
        log_growth = growth(raced, steps, race.rows, question.batch_size, trained) + further
        told = predicted(start, bench.start - near.end, log_growth, steps / raced, trial is not None)
        options.append(
            Option(
                candidate=arm.name,
                ours=arm.arm.kind == "form",
                raced=trial is not None,
                rate=trial.rate if trial else None,
                again=trial is not None and trial is not tried[arm.name][0],
                race=trial.end + (start - bench.start) if trial and not trial.diverged else None,
                steps=steps,
                loss=told.loss,
                low=told.low,
                high=told.high,
                trained=trained,
                adapter_bytes=weight,
                memory_bytes=memory,
                seconds=round(steps * step, 6),  # a budget of time that is used up is not passed by a rounding error
                fits=budget.fits(trained, weight),
            )
        )
    return sorted(options, key=lambda o: (o.trained, o.candidate))


def nearest(arm: Candidate, trained: int, trials: dict[str, Trial]) -> Trial:
    """The trial of the arm that is most like `arm`: of its method if there is one, and of a size near its own."""
    alike = [t for name, t in trials.items() if name.startswith(arm.method)] or [*trials.values()]
    return min(alike, key=lambda t: abs(by_size(t.trained, trained)))


def command(question: Question, name: str | None, options: Sequence[Option]) -> str | None:
    """The command that trains the arm called `name`."""
    if name is None:
        return None
    chosen, told = candidate(name), next(o for o in options if o.candidate == name)
    words = ["ctsft", "tune", "--model", question.model, "--data", question.data, "--k", str(chosen.k)]
    words += ["--form", chosen.method] * (chosen.method != "diagonal")
    words += ["--basis", chosen.basis_file or chosen.basis] * (chosen.basis != "random")
    for option, value in (question.tuned() | {"steps": told.steps}).items():
        if option not in ("model", "data", "threads") and value != Recipe.__dataclass_fields__[option].default:
            words += [f"--{option.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--lr", f"{told.rate:g}"] if told.again else []
    return shlex.join(words)
