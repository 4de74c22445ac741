"""A budget in words, and what it allows: minutes, bytes, steps, trained numbers."""

import re
from dataclasses import dataclass

from ctsft.errors import CTError, shown

# Unit, as a person may write it: what it limits, and how much of that it is.
UNITS: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1)),
    **dict.fromkeys(("min", "minute", "minutes"), ("seconds", 60)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600)),
    **dict.fromkeys(("byte", "bytes"), ("bytes", 1)),
    **dict.fromkeys(("kb", "kilobytes"), ("bytes", 1e3)),
    **dict.fromkeys(("mb", "megabytes"), ("bytes", 1e6)),
    **dict.fromkeys(("gb", "gigabytes"), ("bytes", 1e9)),
    **dict.fromkeys(("step", "steps"), ("steps", 1)),
    **dict.fromkeys(("number", "numbers"), ("numbers", 1)),
}
PART = re.compile(r"((?:\d{1,3}(?:,\d{3}){1,4}|\d{1,15})(?:\.\d{1,6})?)\s*([A-Za-z]+)")
BETWEEN = re.compile(r"\s+and\s+|;|(?<=[A-Za-z])\s*,\s*")


@dataclass(frozen=True)
class Budget:
    """At most so much of each; None: no limit. seconds: of training; bytes: of its file; numbers: that train."""

    seconds: float | None = None
    bytes: float | None = None
    steps: float | None = None
    numbers: float | None = None

    def fits(self, trained: int, adapter_bytes: int) -> bool:
        """Whether an arm of so many numbers and bytes is within it. Seconds and steps limit how long it trains."""
        return not (self.numbers and trained > self.numbers) and not (self.bytes and adapter_bytes > self.bytes)

    def length(self, steps: int, seconds_a_step: float) -> int:
        """How many steps an arm trains: `steps`, or what the budget says."""
        steps = int(self.steps or steps)
        return max(1, int(self.seconds / seconds_a_step)) if self.seconds else steps


def parse_budget(text: str | None) -> Budget:
    """`15 min`, `20 KB`, `2000 steps`, `5000 numbers`, or several with commas or `and` between them."""
    limits: dict[str, float] = {}
    for part in BETWEEN.split(text.strip()) if text else ():
        found = PART.fullmatch(part.strip())
        kind, unit = UNITS.get(found[2].lower(), ("", 0.0)) if found else ("", 0.0)
        amount = float(found[1].replace(",", "")) * unit if found else 0.0
        if not amount or kind in limits:
            raise CTError(
                f"--budget {shown(text or '')!r} is not understood; write 15 min, 1.5 h, 20 KB, 2,000 steps or 5000 "
                "numbers, or two kinds of them with a comma between."
            )
        limits[kind] = amount
    if "steps" in limits and "seconds" in limits:
        raise CTError("a budget has steps or a time, not both.")
    if (limits.get("steps") or 1) % 1 or (limits.get("steps") or 1) > 1e9:
        raise CTError(f"--budget {shown(text or '')!r} must be a whole number of steps, at most 1,000,000,000.")
    return Budget(**limits)


def planning(seconds: float) -> float:
    """Seconds that a plan of a training of `seconds` may take: 3% of it, or a minute if that is more."""
    return max(60.0, 0.03 * seconds)
