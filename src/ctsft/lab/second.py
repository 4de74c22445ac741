"""The second look: the runs that open claims still need, cheapest claim first."""

from collections.abc import Mapping, Sequence

from ctsft.lab.compare import ArmRuns
from ctsft.lab.records import Record
from ctsft.lab.spec import Arm
from ctsft.lab.verdicts import Verdict


def second_look(
    verdicts: Sequence[Verdict], records: Mapping[str, Record], seeds: int
) -> list[tuple[Verdict, list[Arm], float]]:
    """The open claims, each with the arms that it reads, run with `seeds` seeds, and the seconds its missing runs take.

    Cheapest first, by the mean seconds of training of the arms' own runs. An arm is told with every claim that reads
    it, at the rate that was chosen for it: it is not tuned again.
    """
    out = []
    for verdict in verdicts:
        arms = {one.spec.model_dump_json(): (_again(one, seeds), _seconds(one)) for one in verdict.due}
        cost = sum(
            seconds * sum(spec.key not in records for spec in arm.final(arm.rates[0])) for arm, seconds in arms.values()
        )
        if arms:
            out.append((verdict, [arm for arm, _ in arms.values()], cost))
    return sorted(out, key=lambda one: one[2])


def _again(arm: ArmRuns, seeds: int) -> Arm:
    assert arm.lr is not None
    return Arm(name=arm.name, spec=arm.spec, seeds=tuple(range(seeds)), rates=(arm.lr,))


def _seconds(arm: ArmRuns) -> float:
    return sum(record.seconds for record in arm.records) / len(arm.records)
