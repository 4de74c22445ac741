"""The command line: thin commands over the package. They import torch and peft inside, so that --help is quick."""

import sys
import warnings
from typing import Any

import typer
from rich.markup import escape

from ctsft.cli.adapter import export, sample
from ctsft.cli.basis import basis
from ctsft.cli.compare import compare
from ctsft.cli.console import say
from ctsft.cli.inspect import inspect
from ctsft.cli.lab import lab
from ctsft.cli.plan import plan
from ctsft.cli.tune import tune
from ctsft.errors import CTError, needs, shown

app = typer.Typer(
    help="Fine-tune a language model by a few thousand numbers in its own spectrum (CT-SFT).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(epilog="Example: ctsft tune --model smollm2-135m --data my.jsonl --k 64 --steps 100 --out runs/mine")(tune)
app.command(epilog="Example: ctsft plan --model smollm2-135m --data my.jsonl --budget '15 min' --out plans/mine")(plan)
app.command(epilog="Example: ctsft compare --model smollm2-135m --data my.jsonl --arms lora-8,norms --steps 20")(
    compare
)
app.command(epilog="Example: ctsft export runs/mine --to lora --out runs/mine/lora")(export)
app.command(epilog="Example: ctsft inspect smollm2-135m --k 64 --plot spectra.svg")(inspect)
app.command(epilog="Example: ctsft sample runs/mine --prompt 'How many moons has Mars?'")(sample)
app.add_typer(basis, name="basis")
app.add_typer(lab, name="lab")


def literal(command: Any) -> Any:
    """`command` with all help texts below it escaped: brackets in them, as in ctsft[ray], are no markup."""
    for part in (command, *command.params):
        for name in ("help", "epilog", "short_help"):
            if isinstance(text := getattr(part, name, None), str):
                setattr(part, name, escape(text))
    for below in getattr(command, "commands", {}).values():
        literal(below)
    return command


def check_digits(words: list[str]) -> None:
    """CTError where a word of the command line is a number of more digits than Python reads (4,300)."""
    for before, word in zip(["", *words], words, strict=False):
        option, _, value = word.rpartition("=") if word.startswith("--") else (before, "", word)
        digits = value.lstrip("+-")
        if len(digits) > sys.int_info.default_max_str_digits and digits.isdecimal():
            raise CTError(
                f"{shown(option, 40)} {value[:20]}... is a number of {len(digits):,} digits; give a smaller one."
            )


def main() -> None:
    """Run the command; a user's mistake is one sentence on standard error and exit code 2."""
    for module in ("peft", "transformers", "trl"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)  # their talk with each other
    try:
        check_digits(sys.argv[1:])
        with needs():
            literal(typer.main.get_command(app))()
    except (CTError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        say(f"error: {error}", "red")
        sys.exit(2)


if __name__ == "__main__":
    main()
