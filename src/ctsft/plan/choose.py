"""The decision of a plan: which arm, where the curve is flat, when another method is better, and why, in sentences."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ctsft.plan.budget import Budget
from ctsft.plan.predict import HARDLY, RELATIVE
from ctsft.tune.record import Part

FLAT = 0.01  # of the best arm's predicted drop: arms that lose no more are as good, and the smallest of them is taken
USUAL = 64  # directions a matrix, where nothing else is known
FEW = 8  # rows, of those to train on and of those held out, below which nothing is told

Verdict = Literal["recommended", "cannot tell", "nothing fits"]


class Option(Part):
    """One arm under the budget. Losses are held out, in nats per token."""

    candidate: str = Field(description="its name, see arms.candidate")
    ours: bool = Field(description="whether it can be recommended; the others are yardsticks")
    raced: bool = Field(description="whether it ran; if not, it is predicted from arms of other sizes that did")
    rate: float | None = Field(description="peak rate of its best race")
    again: bool = Field(description="whether it ran again at another than its measured rate, and better")
    race: float | None = Field(
        description="loss at the end of its short race: its drop on the rows that were scored, below the start"
    )
    steps: int = Field(description="that it trains within the budget")
    loss: float = Field(description="predicted after those steps")
    low: float = Field(description="lower end of the 90% interval of `loss`")
    high: float = Field(description="upper end")
    trained: int
    adapter_bytes: int
    memory_bytes: int
    seconds: float = Field(description="of training")
    fits: bool = Field(description="whether it is within the budget")


class Decision(Part):
    """candidate: the arm that is recommended; where the verdict is another, the one to take for want of better."""

    verdict: Verdict
    candidate: str | None
    as_good: list[str] = Field(description="arms of ours within 1% of the best one's drop, the smallest first")
    better_peer: str | None = Field(description="a peer that is predicted clearly better and fits")
    why: list[str]


def decide(start: float, options: Sequence[Option], budget: Budget, rows: int, heldout: int) -> Decision:
    """The smallest of our arms whose predicted loss is within 1% of the predicted drop of the best one in the budget.

    start: the held-out loss of the untouched model; rows, heldout: how many there are to train on, and were scored.
    """
    ours = sorted((o for o in options if o.ours and o.fits), key=lambda o: (o.trained, o.loss))
    if not ours:
        least = min((o for o in options if o.ours), key=lambda o: (o.trained, o.adapter_bytes))
        return Decision(
            verdict="nothing fits", candidate=None, as_good=[], better_peer=None,
            why=[f"Not even {least.candidate} fits the budget: it has {least.trained:,} numbers and "
                 f"{least.adapter_bytes:,} bytes."],
        )  # fmt: skip
    best = min(ours, key=lambda o: o.loss)
    good = [o for o in ours if o.loss <= best.loss + FLAT * max(start - best.loss, 0.0)]
    chosen = good[0]
    peer = better_peer(start, chosen, options)
    told = doubt(start, ours, best, rows, heldout)
    return Decision(
        verdict="cannot tell" if told else "recommended",
        candidate=usual(ours).candidate if told else chosen.candidate,
        as_good=[] if told else [o.candidate for o in good],
        better_peer=None if told or peer is None else peer.candidate,
        why=told or [*reasons(start, ours, chosen, best, good), *against(start, chosen, peer, options)],
    )


def usual(ours: Sequence[Option]) -> Option:
    """What to take where nothing can be told: K=64 along random directions, or what is nearest to it in size."""
    plain = [o for o in ours if o.candidate.startswith("diagonal-") and "@" not in o.candidate] or [*ours]
    return min(plain, key=lambda o: abs(math.log(int(o.candidate.split("-")[1].split("@")[0]) / USUAL)))


def doubt(start: float, ours: Sequence[Option], best: Option, rows: int, heldout: int) -> list[str]:
    """Why nothing can be told, if so."""
    if min(rows, heldout) < FEW:
        return [f"There are {rows} rows to train on and {heldout} held out; below {FEW} of either, chance decides."]
    if start - best.loss < HARDLY * start:
        return [f"The races hardly lowered the loss: from {start:.3f}, the best arm is predicted at {best.loss:.3f}."]
    if best.high >= start:
        return [
            f"The best arm is predicted at {best.loss:.3f}, and its interval reaches {best.high:.3f}, no better "
            f"than the untouched model ({start:.3f}): these races do not show that training helps."
        ]
    if len(ours) > 1 and apart(start, min(o.loss for o in ours), max(o.loss for o in ours)) < 1:
        return [
            "The intervals of all arms overlap wholly: the predicted losses of the best and the worst lie closer than "
            "what such races tell apart."
        ]
    return []


def apart(start: float, better: float, worse: float) -> float:
    """How far two predicted losses lie apart, in units of what races on the same rows tell apart (90%)."""
    gain, less = start - better, start - worse
    return math.inf if less <= 0 < gain else abs(math.log(gain / less)) / RELATIVE if min(gain, less) > 0 else 0.0


def better_peer(start: float, chosen: Option, options: Sequence[Option]) -> Option | None:
    """The peer in the budget with the lowest predicted loss, if that is clearly below the chosen arm's."""
    peers = [o for o in options if not o.ours and o.fits and o.loss < chosen.loss]
    best = min(peers, key=lambda o: o.loss, default=None)
    return best if best and apart(start, best.loss, chosen.loss) >= 1 else None


def reasons(start: float, ours: Sequence[Option], chosen: Option, best: Option, good: Sequence[Option]) -> list[str]:
    """Why `chosen`, of the arms of `ours` that fit."""
    drop = start - chosen.loss
    told = [
        f"{chosen.candidate} is predicted to end at {chosen.loss:.3f} ({chosen.low:.3f} to {chosen.high:.3f}) after "
        f"{chosen.steps:,} steps, {drop:.3f} nats per token below the untouched model ({start:.3f})."
    ]
    if chosen is best:
        told.append("No smaller arm is predicted within 1% of that drop.")
    else:
        told.append(
            f"{best.candidate} is predicted lowest ({best.loss:.3f}), but the curve is flat there: "
            f"{', '.join(o.candidate for o in good)} lie within 1% of its drop, and {chosen.candidate} has the fewest "
            f"numbers ({chosen.trained:,} where {best.candidate} has {best.trained:,})."
        )
    smaller = [o for o in ours if o.trained < chosen.trained]
    if smaller:
        near = min(smaller, key=lambda o: o.loss)
        told.append(
            f"{near.candidate}, the best of the smaller ones, is predicted at {near.loss:.3f}: it gives away "
            f"{(near.loss - chosen.loss) / drop:.0%} of the drop."
        )
    if not chosen.raced:
        told.append(f"{chosen.candidate} did not run itself: it is predicted from arms of other sizes that did.")
    return told


def against(start: float, chosen: Option, peer: Option | None, options: Sequence[Option]) -> list[str]:
    """When not to use this method, or why the peers do not speak against it."""
    if peer:
        return [
            f"Use {peer.candidate} instead if its {peer.adapter_bytes:,} bytes are no matter (here "
            f"{chosen.adapter_bytes:,}): it is predicted clearly better, {peer.loss:.3f} ({peer.low:.3f} to "
            f"{peer.high:.3f}), {(start - peer.loss) / (start - chosen.loss) - 1:.0%} more drop."
        ]
    peers = [o for o in options if not o.ours]
    over = [o.candidate for o in peers if not o.fits]
    told = [f"{', '.join(over)} {'does' if len(over) == 1 else 'do'} not fit the budget."] if over else []
    if len(over) < len(peers):
        told.append(f"No other method that fits the budget is predicted clearly better than {chosen.candidate}.")
    return told
