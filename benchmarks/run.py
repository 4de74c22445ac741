"""Run the short form of every benchmark and write benchmarks/RESULTS.md.

    python benchmarks/run.py                       # all of them, as `make bench` does
    python benchmarks/run.py --only step_time scaling
    python benchmarks/run.py --device cuda         # sections of their own, beside those of the CPU

A section is one script on one device. Sections that are not run stay as they are in the file, which is written anew,
whole or not at all, after every script. Exits with 1 where a script has failed; its section says how.
"""

import argparse
import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from ctsft.files import versions, write_text

RESULTS = Path(__file__).parent / "RESULTS.md"
BF16 = ["--dtype", "bfloat16"]
SMOLLM2 = ["--model", "smollm2-135m"]
# The short forms: a script's name and the options of each of its runs. The order is that of the file. A script has
# main(argv) -> str, which prints and returns Markdown, knows --device and --threads, and says in the first paragraph of
# its docstring what it measures and the limit.
SCRIPTS: dict[str, list[list[str]]] = {
    "step_time": [[], BF16, [*SMOLLM2, "--repeats", "9"]],
    "where": [[], BF16],
    "saved_activations": [[], BF16],
    "methods": [[]],
    "per_sample": [[], SMOLLM2],
    "probes": [[]],
    "adapter_file": [["--tinylora"]],
    "scaling": [[], BF16],
    "startup": [["--peft-layers", "1"]],
    "universal": [[*SMOLLM2, "--accuracy"]],
}
ON_CPU = ("startup", "universal")  # bases are made there, whatever the model's device
DEVICES = ("cpu", "cuda")
HEAD = """# Results

Written by `make bench` (`benchmarks/run.py`); do not edit. Ratios are medians over rounds, with quartiles; both sides \
of a ratio were measured in the same round, in one process, on the same weights and batch. A section tells its own \
date and machine.

Last written {date}; {versions}.
"""


def read(path: Path) -> dict[str, str]:
    """The sections there are, by name and device, between their comments."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.findall(r"<!-- section (.+?) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    return dict(found)


def write(path: Path, sections: dict[str, str]) -> None:
    packages = ", ".join(f"{n} {v}" for n, v in versions().items())
    known = [f"{name} {device}" for device in DEVICES for name in SCRIPTS]
    order = sorted(sections, key=lambda s: known.index(s) if s in known else len(known))
    body = "\n".join(f"<!-- section {s} -->\n{sections[s]}\n<!-- end -->\n" for s in order)
    write_text(path, HEAD.format(date=date.today(), versions=packages) + "\n" + body)


def section(name: str, runs: list[list[str]], common: list[str], device: str) -> tuple[str, bool]:
    """The Markdown of one script, and whether it ran through."""
    title = f"## {name.replace('_', ' ')}, {device}"
    try:
        script = importlib.import_module(name)
        what = " ".join((script.__doc__ or "").partition("\n\n")[0].split())
        tables = [script.main([*options, *common]) for options in runs]
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return f"{title}\n\n**Failed**: {type(error).__name__}: {' '.join(str(error).split())}\n", False
    return "\n\n".join([title, f"{what} Measured {date.today()}.", *(t.strip() for t in tables)]) + "\n", True


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    p.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="re-run these alone")
    p.add_argument("--device", choices=DEVICES, default="cpu")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--peers", type=Path, help="checkouts for methods.py; their code is run")
    p.add_argument("--out", type=Path, default=RESULTS, help="the file to write")
    p.add_argument("options", nargs="*", help="after --: passed to every script, such as --repeats 3")
    args = p.parse_args(argv)
    common = ["--device", args.device, "--threads", str(args.threads), *args.options]
    peers = ["--peers", str(args.peers)] if args.peers else []
    failed = []
    for name in (n for n in SCRIPTS if n in args.only and (args.device == "cpu" or n not in ON_CPU)):
        print(f"== {name}", file=sys.stderr, flush=True)
        own = {"methods": peers, "scaling": ["--figures", str(args.out.parent / "figures")]}.get(name, [])
        text, ran = section(name, SCRIPTS[name], [*common, *own], args.device)
        write(args.out, read(args.out) | {f"{name} {args.device}": text})
        failed += [] if ran else [name]
    if failed:
        print(f"failed: {', '.join(failed)}; {args.out} says how.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
