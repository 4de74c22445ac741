"""`ctsft export` and `ctsft sample`: what one does with a finished adapter."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ctsft.cli.console import MODEL_HELP, err, printable, say
from ctsft.errors import CTError
from ctsft.progress import waiting


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
    from ctsft.adapter.config import CTConfig
    from ctsft.adapter.read import load_adapter
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
    recorded = CTConfig.from_pretrained(folder).base_model_name_or_path  # all is checked before a model is loaded
    if not model and (run / "recipe.json").exists():
        recipe = read_json(run / "recipe.json")
        recorded = recipe.get("model") if isinstance(recipe, dict) else None
        if not isinstance(recorded, str):
            raise CTError(f"{run / 'recipe.json'} does not name the model; it is damaged, give --model.")
    if not (model or recorded):
        raise CTError(f"{folder} does not say which model it belongs to; give --model.")

    with waiting(err, f"loading {model or recorded}"):
        loaded = load_model(model or recorded, dtype)
        adapted = load_adapter(loaded.model, folder)
    return adapted, loaded.tokenizer, folder


def prompt_text(given: str | None) -> str:
    """The prompt that is `given`, or what stands on standard input; CTError where that is no text or only blanks."""
    try:
        text = sys.stdin.read() if given is None else given
        text.encode()
    except UnicodeError:
        raise CTError("the prompt is not UTF-8 text; give it as UTF-8.") from None
    if not text.strip():
        raise CTError("the prompt is empty; give --prompt or pipe a text in.")
    return text


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
    text = prompt_text(prompt)
    folder = Path(source)
    is_adapter = any((folder / n).exists() for n in ("adapter_config.json", "adapter", "recipe.json"))

    if base and not is_adapter:
        raise CTError(f"--base compares an adapter with its base, and {source} is a model; leave --base out.")
    if model and not is_adapter:
        raise CTError(f"--model is the base of an adapter, and {source} is a model; leave --model out.")

    from ctsft.data.tokens import fits, prompt_ids
    from ctsft.models.load import load_model
    from ctsft.tune.measure import generate

    if is_adapter:
        tuned, tokenizer, _ = load_adapted(folder, model, "auto")
    else:
        with waiting(err, f"loading {source}"):
            loaded = load_model(source)
        tuned, tokenizer = loaded.model, loaded.tokenizer
    fits(tokenizer, tuned)
    context = getattr(tuned.config, "max_position_embeddings", None)
    prompts = [prompt_ids({"prompt": text, "completion": ""}, tokenizer, "prompt_completion", context)]
    if context and len(prompts[0]) >= context:
        raise CTError(f"the prompt has {len(prompts[0])} tokens or more and the model's context {context}; shorten it.")
    if base and is_adapter:
        with tuned.disable_adapter():
            print("base:  " + printable(generate(tuned, tokenizer, prompts, max_new_tokens)[0]))
        print("tuned: ", end="")
    print(printable(generate(tuned, tokenizer, prompts, max_new_tokens)[0]))
