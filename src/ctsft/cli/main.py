"""The command line: thin commands over the package. They import torch and peft inside, so that --help is quick."""

import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ctsft.cli.lab import lab
from ctsft.errors import CTError, needs

app = typer.Typer(
    help="Fine-tune a language model by a few thousand numbers in its own spectrum (CT-SFT).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(lab, name="lab")
err = Console(stderr=True)
out_console = Console()

MODEL_HELP = "Built-in name (smollm2-135m, photonic), Hugging Face folder, .gguf file or hub id."


def say(text: str, style: str) -> None:
    """A sentence for a person, on standard error, as it is: brackets in it are no markup, and no line is broken."""
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """`text` without control characters: what a model generates must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def parse_k(text: str) -> int | dict[str, int]:
    """`64`, or `q_proj=64,.*=16`: K by module pattern, the first that fits counts."""
    try:
        if "=" not in text:
            return int(text)
        return {p: int(k) for p, _, k in (part.rpartition("=") for part in text.split(","))}
    except ValueError:
        raise CTError(f"--k {text!r} is neither a number nor pattern=number,pattern=number.") from None


def parse_lr(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise CTError(f"--lr {text!r} is neither a number nor auto.") from None


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else cores


@app.command(epilog="Example: ctsft tune --model smollm2-135m --data my.jsonl --k 64 --steps 100 --out runs/mine")
def tune(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP + " (default: smollm2-135m)")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="sql (built in), a .jsonl, .json, .csv, .parquet or .txt file, or a hub dataset id. (default: sql)"
        ),
    ] = None,
    k: Annotated[str | None, typer.Option(help="Directions per matrix, or pattern=K,pattern=K. (default: 64)")] = None,
    form: Annotated[str | None, typer.Option(help="diagonal, core or scores. (default: diagonal)")] = None,
    basis: Annotated[
        str | None, typer.Option(help="weight, random, universal, gradient or activation. (default: weight)")
    ] = None,
    weight_from: Annotated[
        str | None, typer.Option(help="top, bottom or random singular directions. (default: top)")
    ] = None,
    universal_mode: Annotated[
        str | None, typer.Option(help="residual or replace (paper 78). (default: residual)")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Module name to adapt, repeatable. (default: every linear layer but the head)"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. (default: 120)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step. (default: 8)")] = None,
    lr: Annotated[
        str | None, typer.Option(help="Peak learning rate, or auto (README tells the rule). (default: auto)")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row at most. (default: 512)")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows to train on at most. (default: all)")] = None,
    heldout: Annotated[
        float | None, typer.Option(help="Share (below 1) or number of rows held out. (default: 0.1)")
    ] = None,
    eval_rows: Annotated[int | None, typer.Option(help="Held-out rows scored before and after. (default: 100)")] = None,
    amplitude_dropout: Annotated[
        float | None, typer.Option(help="Chance to drop a direction for a step. (default: 0)")
    ] = None,
    basis_dtype: Annotated[
        str | None, typer.Option(help="Of the directions: float32, bfloat16, or auto, the model's. (default: auto)")
    ] = None,
    save_dtype: Annotated[
        str | None,
        typer.Option(help="Of the trained numbers on disk: float16, bfloat16 or float32. (default: float16)"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the frozen model: auto, float32, bfloat16, float16. (default: auto)")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="torch threads. (default: OMP_NUM_THREADS, else all cores)")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the data split, its order and random bases. (default: 0)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/latest"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out with its own recipe.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json on standard output.")] = False,
) -> None:
    """Fine-tune a model, score it before and after, and write adapter, record and report."""
    from ctsft.tune.recipe import make_recipe, read_recipe

    given: dict[str, Any] = {
        "model": model,
        "data": data,
        "k": None if k is None else parse_k(k),
        "form": form,
        "basis": basis,
        "weight_from": weight_from,
        "universal_mode": universal_mode,
        "target_modules": target or None,
        "steps": steps,
        "batch_size": batch_size,
        "lr": None if lr is None else parse_lr(lr),
        "max_length": max_length,
        "limit": limit,
        "heldout": heldout,
        "eval_rows": eval_rows,
        "amplitude_dropout": amplitude_dropout,
        "basis_dtype": basis_dtype,
        "save_dtype": save_dtype,
        "dtype": dtype,
        "threads": threads,
        "seed": seed,
    }
    values = {n: v for n, v in given.items() if v is not None}
    if resume and overwrite:
        raise CTError("--resume continues the run in --out and --overwrite replaces it; give one of them.")
    known = out / "recipe.json"
    if resume and known.exists():
        values = read_recipe(known).values() | values
    recipe = make_recipe({"threads": default_threads()} | values)

    try:
        with err.status("starting"):
            from ctsft.tune import run as train
        run = train.tune(recipe, out, resume, overwrite, err)
    except KeyboardInterrupt as stop:  # Stopped is one
        if known.exists() and not (out / "run.json").exists() and read_recipe(known) == recipe:
            then = f"continue with: ctsft tune --resume --out {shlex.quote(str(out))}"
        else:
            then = "nothing was begun, so start it again with the same command"
        say(f"{str(stop) or 'stopped'}; {then}", "yellow")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(run, indent=1))
    else:
        show_run(run, out)


def show_run(run: dict[str, Any], out: Path) -> None:
    """The result of a run for a person: scores, generations, costs, files."""
    table = Table(title=run["name"], title_justify="left")
    for column in ("held out", "before", "after"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    before, after = run["before"], run["after"]
    table.add_row("loss, nats per token", f"{before['heldout_loss']:.3f}", f"{after['heldout_loss']:.3f}")
    if before["accuracy"]:
        table.add_row(
            "execution accuracy", *(f"{s['accuracy']['correct']} of {s['accuracy']['total']}" for s in (before, after))
        )
        table.add_row(
            "95% interval", *(f"{s['accuracy']['low']:.0%} to {s['accuracy']['high']:.0%}" for s in (before, after))
        )
    if after["accuracy"] and run["samples"]:
        out_console.print(
            "Held-out questions, in turn the first that came out right and the first that came out wrong:"
        )
    for sample in run["samples"]:
        marks = {True: "[green]right[/] ", False: "[red]wrong[/] ", None: ""}
        out_console.rule(style="dim")
        for label, key, mark in (
            ("prompt", "prompt", ""),
            ("wanted", "reference", ""),
            ("before", "before", "before_ok"),
            ("after", "after", "after_ok"),
        ):
            text = sample[key] if len(sample[key]) < 600 else sample[key][:600] + " ..."
            out_console.print(f"[bold]{label:7}[/] {marks[sample[mark]] if mark else ''}", end="")
            out_console.print(printable(text), markup=False, highlight=False)
    out_console.print(table)
    from ctsft.pages.words import duration, size

    c = run["costs"]
    out_console.print(
        f"cost: {c['trainable']:,} trained numbers, adapter {size(c['adapter_bytes'])}, extra memory "
        f"{size(c['extra_memory_bytes'])}, training {duration(c['seconds'])} (one seed: no spread)",
        highlight=False,
    )
    out_console.print(
        f"adapter {out / 'adapter'}   record {out / 'run.json'}   report {out / 'report.html'}", highlight=False
    )


@app.command(epilog="Example: ctsft export runs/mine --to lora --out runs/mine/lora")
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run of ctsft tune.")],
    to: Annotated[str, typer.Option(help="lora (exact, for any LoRA server) or merged (a whole model).")] = "lora",
    out: Annotated[Path | None, typer.Option(help="Folder to write. (default: beside the adapter)")] = None,
    model: Annotated[str | None, typer.Option(help="The base, where it is not the recorded one. " + MODEL_HELP)] = None,
    dtype: Annotated[
        str, typer.Option(help="Of a merged model; auto: as the base is stored, which rounds W + dW.")
    ] = "auto",
) -> None:
    """Write an adapter as an ordinary LoRA or a merged model, and measure that it gives the same logits."""
    if to not in ("lora", "merged"):
        raise CTError(f"--to {to!r} is unknown; choose lora or merged.")
    import torch
    from peft import PeftModel

    from ctsft.adapter.export import export_adapter, largest_logit_difference
    from ctsft.models.load import load_model

    adapted, tokenizer, folder = load_adapted(adapter, model, "float32")
    out = out or folder.parent / f"{folder.name}-{to}"
    ids = torch.randint(0, adapted.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = adapted(ids).logits
    if to == "merged":
        adapted, tokenizer, _ = load_adapted(adapter, model, dtype)
    for note in export_adapter(adapted, out, to, tokenizer=tokenizer):  # type: ignore[arg-type]
        say(note, "yellow")
    if to == "lora":
        other: Any = PeftModel.from_pretrained(adapted.unload(), os.fspath(out)).eval()
    else:
        other = load_model(os.fspath(out), "float32").model
    difference = largest_logit_difference(wanted, other, ids)
    print(f"wrote {out} ({sum(f.stat().st_size for f in out.iterdir()):,} bytes)")
    print(
        f"largest difference in logits, in float32, over {ids.numel()} random tokens: {difference:.2e} "
        f"(logits reach {wanted.abs().max():.1f})"
    )


def load_adapted(folder: Path, model: str | None, dtype: str) -> Any:
    """(adapted model in eval mode, tokenizer, adapter folder) for the folder of an adapter or of a run."""
    from ctsft.files import read_json
    from ctsft.models.load import load_model

    run = folder
    if (folder / "adapter" / "adapter_config.json").exists():
        folder = folder / "adapter"
    else:
        run = folder.parent
    if not (folder / "adapter_config.json").exists():
        raise CTError(
            f"{folder} holds no adapter (no adapter_config.json); give the folder of an adapter or of a finished run."
        )
    settings = read_json(folder / "adapter_config.json")
    recorded = (
        read_json(run / "recipe.json")["model"]
        if (run / "recipe.json").exists()
        else settings.get("base_model_name_or_path")
    )
    if not (model or recorded):
        raise CTError(f"{folder} does not say which model it belongs to; give --model.")

    from peft import PeftModel

    with err.status("loading"):
        loaded = load_model(model or recorded, dtype)
        adapted = PeftModel.from_pretrained(loaded.model, os.fspath(folder)).eval()
    return adapted, loaded.tokenizer, folder


@app.command(epilog="Example: ctsft inspect smollm2-135m --k 64 --plot spectra.svg")
def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    k: Annotated[int, typer.Option(help="Energy is told for the top K.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the spectra: .svg or .png.")] = None,
    universal: Annotated[
        bool, typer.Option("--universal", help="Tell of the universal basis only: one pass, the model is not loaded.")
    ] = False,
) -> None:
    """Show a model's spectra: per matrix its shape, effective rank and energy in the top K, and the universal basis."""
    if k < 1:
        raise CTError(f"--k {k} must be at least 1.")
    if universal and plot:
        raise CTError("--universal takes no spectra of single matrices, so there is nothing to --plot; leave one out.")
    from ctsft.models.load import load_model
    from ctsft.tune.inspect import (
        inspect_model,
        inspect_universal,
        inspection_table,
        plot_spectra,
        universal_table,
    )

    if universal:
        found = inspect_universal(model, k, "universal basis")
        print(json.dumps(found, indent=1)) if as_json else out_console.print(universal_table(found))
        return
    with err.status(f"loading {model}"):
        loaded = load_model(model)
    with err.status("decomposing") as status:
        result = inspect_model(
            loaded.model, k, lambda done, total, name: status.update(f"decomposing {done} of {total}: {name}")
        )
    if plot:
        plot_spectra(result, plot)
        err.print(f"wrote {plot}")
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        out_console.print(inspection_table(result))


@app.command(epilog="Example: ctsft sample runs/mine --prompt 'How many moons has Mars?'")
def sample(
    source: Annotated[str, typer.Argument(help="Folder of a run or adapter, or a model. " + MODEL_HELP)],
    prompt: Annotated[str | None, typer.Option(help="The prompt; without it, it is read from standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    base: Annotated[bool, typer.Option("--base", help="Also show what the base model says.")] = False,
    model: Annotated[
        str | None, typer.Option(help="The base of the adapter, where it is not the recorded one.")
    ] = None,
) -> None:
    """Complete a prompt, greedily, with the model's chat template where it has one."""
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        raise CTError("the prompt is empty; give --prompt or pipe a text in.")
    folder = Path(source)
    is_adapter = any((folder / n).exists() for n in ("adapter_config.json", "adapter", "recipe.json"))

    if base and not is_adapter:
        raise CTError(f"--base compares an adapter with its base, and {source} is a model; leave --base out.")

    from ctsft.data.rows import prompt_ids
    from ctsft.models.load import load_model
    from ctsft.tune.run import generate

    if is_adapter:
        tuned, tokenizer, _ = load_adapted(folder, model, "auto")
    else:
        with err.status(f"loading {source}"):
            loaded = load_model(source)
        tuned, tokenizer = loaded.model, loaded.tokenizer
    prompts = [prompt_ids({"prompt": text, "completion": ""}, tokenizer, "prompt_completion")]
    context = getattr(tuned.config, "max_position_embeddings", None)
    if context and len(prompts[0]) >= context:
        raise CTError(f"the prompt has {len(prompts[0])} tokens and the model's context {context}; shorten it.")
    if base and is_adapter:
        with tuned.disable_adapter():
            print("base:  " + printable(generate(tuned, tokenizer, prompts, max_new_tokens)[0]))
        print("tuned: ", end="")
    print(printable(generate(tuned, tokenizer, prompts, max_new_tokens)[0]))


def main() -> None:
    """Run the command; a user's mistake is one sentence on standard error and exit code 2."""
    for module in ("peft", "transformers", "trl"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)  # their talk with each other
    try:
        with needs():
            app()
    except (CTError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        say(f"error: {error}", "red")
        sys.exit(2)


if __name__ == "__main__":
    main()
