"""The verdict on each claim: its sides tested over seeds, corrected for two looks and for its family.

A claim is confirmed if every side is shown to be so, refuted if the contrary is shown of one, else inconclusive;
"shown" is a one-sided t test at LEVEL after Bonferroni's correction for the looks that the profile allows and Holm's
over the claims and controls of one family, for confirmations and for refutations apart. The rule and its error rates
stand in docs/laboratory.md. Nothing here imports torch: verdicts are made from records alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ctsft.lab.claims import Claim
from ctsft.lab.compare import ArmRuns, arm_runs
from ctsft.lab.experiments import Laboratory
from ctsft.lab.opened import unsettled
from ctsft.lab.predicates import ONE, PREDICATES, Evidence, NotRun, Reading, Side
from ctsft.lab.records import Record
from ctsft.lab.spec import Spec
from ctsft.lab.stats import LEVEL, SEEDS, all_hold, corrected, one_fails, over_looks
from ctsft.lab.tables import short

NOT_APPLICABLE = "not applicable"  # told only where there are such claims
VERDICTS = {  # what each means, in the order in which they are told
    "confirmed": "it holds, by the test that was written before the runs were read",
    "refuted": "it does not hold, by the same test",
    "artefact": "it shows in the paper's setting, and a control shows what else makes it",
    "inconclusive": "the runs are there and do not decide it",
    "not run": "runs that it needs are missing",
    NOT_APPLICABLE: "it cannot be asked of this model",
}


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    verdict: str  # one of VERDICTS
    detail: str  # what was measured, in one sentence
    p: float | None = None  # corrected; of the verdict's direction, of the likelier one if inconclusive
    seeds: int = 0
    control: str = ""  # the control's verdict and detail
    side: Side | None = None  # the side that decided it, or came nearest to it
    unsettled: str = ""  # of an open claim: what is ruled out, and how many seeds would settle it
    due: tuple[ArmRuns, ...] = ()  # what an open claim, or its open control, would read at the second look


class Verdicts(list[Verdict]):
    """The verdicts on all claims of a file, in its order, and what they were made from."""

    def __init__(
        self, verdicts: Sequence[Verdict], profile: str, records: int, tests: Mapping[str, int], looks: str
    ) -> None:
        super().__init__(verdicts)
        self.profile, self.records = profile, records
        self.tests = tests  # of claims and controls, by family
        self.looks = looks  # in words


@dataclass(frozen=True)
class _Judged:
    """A claim, or its control, at one look and before the corrections."""

    claim: Claim
    done: str = ""  # a verdict that needs no test: "not run", or that of exact
    detail: str = ""
    sides: list[Side] = field(default_factory=list)
    arms: tuple[ArmRuns, ...] = ()

    @property
    def holds(self) -> float:
        return all_hold([side.holds for side in self.sides]) if self.sides else 1.0

    @property
    def fails(self) -> float:
        return one_fails([side.fails for side in self.sides]) if self.sides else 1.0


def judge(
    claims: Sequence[Claim],
    laboratory: Laboratory,
    records: Mapping[str, Record],
    profile: str = "full",
    aside: Mapping[str, str] = {},
) -> Verdicts:
    """The verdict on every claim from the records that exist. The corrections count all claims and looks, made or not.

    Claims whose id is in `aside` are not judged: "not applicable", for the reason there (see `claims.applicable`).
    CTError where a claim names an experiment that is not there, or a selection fits several arms.
    """
    kept = [claim for claim in claims if claim.id not in aside]
    every = [one for claim in kept for one in ([claim, claim.control()] if claim.artefact else [claim])]
    size = laboratory.profiles[profile]
    looks = size.looks
    named = {(name, one.protocol, look) for one in every for name in one.experiments for look in range(looks)}
    pools = {
        (name, protocol, look): arm_runs(laboratory, name, records, profile, protocol, look > 0)
        for name, protocol, look in named
    }
    judged = []
    for one in every:
        made = [_judged(one, {n: pools[n, one.protocol, look] for n in one.experiments}) for look in range(looks)]
        judged.append([made[0], *(later for later in made[1:] if not made[0].done and not later.done)])
    tests = [i for i, one in enumerate(every) if one.predicate != "exact"]
    families = [every[i].family for i in tests]
    p_holds = [over_looks([look.holds for look in judged[i]], looks) for i in tests]
    p_fails = [over_looks([look.fails for look in judged[i]], looks) for i in tests]
    holds = dict(zip(tests, corrected(families, p_holds), strict=True))
    fails = dict(zip(tests, corrected(families, p_fails), strict=True))
    counts = Counter(families)
    single = [
        _single(one, holds.get(i, 1.0), fails.get(i, 1.0), LEVEL / looks / max(1, counts[every[i].family]))
        for i, one in enumerate(judged)
    ]
    out, left = [], iter(single)
    for claim in claims:
        if claim.id in aside:
            out.append(Verdict(claim, NOT_APPLICABLE, aside[claim.id]))
            continue
        verdict = next(left)
        out.append(_with_control(claim, verdict, next(left)) if claim.artefact else verdict)
    told = f"two looks (the planned seeds, and {size.second} for what is then open)" if looks == 2 else "one look"
    return Verdicts(out, profile, len(records), counts, told)


def _judged(claim: Claim, pools: dict[str, list[ArmRuns]]) -> _Judged:
    evidence = Evidence(pools, claim.where)
    try:
        if claim.predicate == "exact":
            return _equals(claim, evidence)
        sides = PREDICATES[claim.predicate](claim, evidence)
    except NotRun as error:
        return _Judged(claim, "not run", f"missing: {error}")
    told = "; ".join(filter(None, (_means(evidence.used), *_remarks(evidence.used))))
    return _Judged(claim, "", told, sides, tuple(evidence.arms.values()))


def _equals(claim: Claim, evidence: Evidence) -> _Judged:
    assert claim.number is not None
    readings = evidence.readings(claim.a, claim.metric)
    text, n = short(claim.number) + (f" x {claim.per}" if claim.per else ""), 0
    for reading in readings:
        wanted = claim.number * (getattr(reading.arm.spec, claim.per) if claim.per else 1)
        for seed, found in reading.by_seed.items():
            n += 1
            if abs(found - wanted) > claim.effect:
                told = f"{claim.metric}{reading.of} is {_digits(found)} at seed {seed}, not {_digits(wanted)}"
                return _Judged(claim, "refuted", told + (f" ({text})" if claim.per else ""))
    if not n:
        raise NotRun(f"{claim.metric} is not measured, all runs diverged")
    within = f" within {short(claim.effect)}" if claim.effect else ""
    means = f" ({_means(readings)})" if len(readings) > 1 else ""
    return _Judged(claim, "confirmed", f"{claim.metric} is {text}{within} in all {n} runs{means}")


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:,.6g}"


def _means(readings: Sequence[Reading]) -> str:
    """`train_loss 8.46 (k 32), 9.13 (k 8)`, by metric, each arm once; nothing for an arm alone."""
    by_metric: dict[str, dict[str, str]] = {}
    for reading in readings if len(readings) > 1 else ():
        if reading.metric not in Spec.model_fields:
            shown = short(reading.mean) if reading.by_seed else "diverged"
            by_metric.setdefault(reading.metric, {})[reading.label] = (
                shown if reading.label == ONE else f"{shown} ({reading.label})"
            )
    return "; ".join(f"{metric} {', '.join(arms.values())}" for metric, arms in by_metric.items())


def _remarks(readings: Sequence[Reading]) -> list[str]:
    """What a reader must know of the runs: rates that are not bracketed, runs that diverged."""
    loose = {c.label: None for c in readings if c.arm.tuned and not c.arm.bracketed}
    lost = {c.label: sum(r.diverged for r in c.arm.records) for c in readings}
    out = [f"learning rate not bracketed: {'; '.join(loose)}"] if loose else []
    return out + [f"{n} runs of {label} diverged" for label, n in lost.items() if n]


def _single(looks: Sequence[_Judged], holds: float, fails: float, level: float) -> Verdict:
    """The verdict of a claim's looks by its corrected p; told is the look that decides, or the last one. `level` is
    what one test of it may spend."""
    first, one = looks[0], looks[-1]
    if first.done:
        return Verdict(first.claim, first.done, first.detail, seeds=0)
    word, p = "inconclusive", min(holds, fails)
    if holds <= LEVEL < fails:
        word, p, one = "confirmed", holds, min(looks, key=lambda look: look.holds)
    elif fails <= LEVEL < holds:
        word, p, one = "refuted", fails, min(looks, key=lambda look: look.fails)
    if word == "refuted":
        side = min(one.sides, key=lambda s: (s.fails, s.margin))
    else:
        side = max(one.sides, key=lambda s: (s.holds, -s.margin))
    seeds = min(s.test.n for s in one.sides)
    few = f" (fewer than {SEEDS}: no verdict)" if seeds < SEEDS else ""
    detail = "; ".join(filter(None, (side.told(), f"p {_p(p)}, {seeds} seeds{few}", one.detail)))
    if word != "inconclusive":
        return Verdict(one.claim, word, detail, p, seeds, side=side)
    due = first.arms if len(looks) == 1 else ()
    return Verdict(one.claim, word, detail, p, seeds, "", side, unsettled(one.claim, one.sides, side, level), due)


def _p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _with_control(claim: Claim, verdict: Verdict, control: Verdict) -> Verdict:
    """A claim that holds, and whose control is refuted, is an artefact; it waits for a control that is open."""
    assert claim.artefact
    told = f"control ({_changes(claim)}) {control.verdict}: {control.detail}"
    word, detail = verdict.verdict, verdict.detail
    if word == "confirmed" and control.verdict == "refuted":
        word, detail = "artefact", f"{claim.artefact.cause} As the paper has it: {detail}"
    elif word == "confirmed" and control.verdict != "confirmed":
        word, detail = "inconclusive", f"holds as the paper has it, its control is open; {detail}"
    if word != "inconclusive":
        return replace(verdict, verdict=word, detail=detail, control=told)
    of_control = control.unsettled and f"Of the control: {control.unsettled}"
    both = " ".join(filter(None, (verdict.unsettled, of_control)))
    due = (*verdict.due, *control.due)
    return replace(verdict, verdict=word, detail=detail, control=told, unsettled=both, due=due)


def _changes(claim: Claim) -> str:
    assert claim.artefact
    told = []
    for name, found in claim.artefact.control.items():
        parts = found.items() if name == "where" else [(name, found)]
        told += [f"{n} {v}" for n, v in parts]
    return ", ".join(told)


# ------------------------------------------------------------------------------------------------------- markdown


def told_counts(verdicts: Sequence[Verdict]) -> str:
    """`25 confirmed, 40 refuted, ...`; "not applicable" only where there are such claims."""
    counts = Counter(v.verdict for v in verdicts)
    return ", ".join(f"{counts[word]} {word}" for word in VERDICTS if counts[word] or word != NOT_APPLICABLE)


def markdown(verdicts: Verdicts, made_from: str = "the committed records", summary: Sequence[str] = ()) -> str:
    """VERDICTS.md: the same text for the same records, so that comparing it shows whether it is stale.

    It opens with `summary`, a sentence each. Claims that cannot be asked stand at the end, with the reason.
    """
    families = ", ".join(f"{source} {count}" for source, count in verdicts.tests.items())
    lines = [
        "# Verdicts",
        "",
        f"Made by `ctsft lab verdicts` from {made_from}; do not edit.",
        "",
        f"{told_counts(verdicts)}: {len(verdicts)} claims.",
        "",
        *(f"{i}. {sentence}" for i, sentence in enumerate(summary, 1)),
        *([""] if summary else []),
        f"Profile `{verdicts.profile}`, {verdicts.records:,} records. Losses are in nats per token; intervals are 95% "
        f"(t, over seeds). A claim is confirmed, or refuted, at p <= {LEVEL} after correction for {verdicts.looks} and "
        "Holm's over the claims and controls of its family, for either direction apart; fewer than "
        f"{SEEDS} seeds give no verdict. Families and tests: {families}. The rule and its error rates stand in "
        "`docs/laboratory.md`. *Artefact*: it holds as the paper has it, and the control without the named cause "
        "refutes it. "
        "The effect sizes stand in `src/ctsft/lab/papers/claims.toml`; they were written before the runs were read, "
        "unless a claim's note says otherwise.",
    ]
    titles = {"derived": "Arithmetic on the papers' figures", "ours": "Our own expectations"}
    judged = [v for v in verdicts if v.verdict != NOT_APPLICABLE]
    sources = list(dict.fromkeys(v.claim.source for v in judged))
    for source in sorted(sources, key=lambda s: list(titles).index(s) if s in titles else -1):
        lines += ["", f"## {titles.get(source, f'Paper {source}')}", "", "| | claim | verdict | what was measured |"]
        lines.append("|---|---|---|---|")
        for v in judged:
            if v.claim.source == source:
                told = "<br>".join(
                    filter(None, (v.detail, v.control, v.unsettled, v.claim.note and f"Note: {v.claim.note}"))
                )
                lines.append(f"| {v.claim.id} | {_cell(v.claim.told)} | **{v.verdict}** | {_cell(told)} |")
    if aside := [v for v in verdicts if v.verdict == NOT_APPLICABLE]:
        lines += ["", "## Not applicable", "", "| | claim | why |", "|---|---|---|"]
        lines += [f"| {v.claim.id} | {_cell(v.claim.text)} | {_cell(v.detail)} |" for v in aside]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
