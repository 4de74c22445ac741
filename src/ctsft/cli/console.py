"""What all commands share: the two consoles, and how text that is not ours reaches them."""

from rich.console import Console

from ctsft.errors import steers

err = Console(stderr=True, markup=False)  # names of files, columns and models may hold [brackets]
out_console = Console(markup=False)

MODEL_HELP = "Built-in name (smollm2-135m, photonic), Hugging Face folder, .gguf file or hub id."


def say(text: str, style: str) -> None:
    """A sentence for a person, on standard error, as it is: brackets in it are no markup, and no line is broken."""
    err.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """`text` without control characters: what a model generates must not steer the terminal."""
    return "".join("\N{REPLACEMENT CHARACTER}" if steers(c) and c not in "\n\t" else c for c in text)
