"""What training is made from, before there is an adapter: the bare model and the rows in tokens."""

import warnings
from dataclasses import dataclass, replace

import datasets
import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from ctsft.data.rows import Corpus, load_corpus
from ctsft.data.tokens import Cut, fits, format_rows
from ctsft.models.load import Loaded, load_model
from ctsft.progress import waiting
from ctsft.spectral.weights import fingerprint
from ctsft.tune.folder import hashed
from ctsft.tune.measure import Tokens
from ctsft.tune.recipe import Recipe
from ctsft.tune.record import Sources

SHORT = 192  # tokens of a row up to which a CPU attends faster in bfloat16 by plain products than by torch's own way


@dataclass
class Material:
    """The bare model of a recipe, and its rows: those to train on, and those that are scored."""

    recipe: Recipe
    loaded: Loaded
    parameters: int  # of the model without an adapter
    corpus: Corpus
    train: datasets.Dataset
    heldout: list[Tokens]
    cut: Cut
    notes: list[str]
    sources: Sources

    def of(self, recipe: Recipe) -> "Material":
        """The same for `recipe`, which differs from its own in the adapter and the rate at most."""
        sources = self.sources.model_copy(update={"recipe": hashed([recipe.values()])})
        return replace(self, recipe=recipe, sources=sources)


def settle(threads: int) -> None:
    """Give torch its threads, and keep what libraries tell each other from whoever waits."""
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")


def gathered(recipe: Recipe, console: Console) -> Material:
    """The model and the rows of `recipe`. CTError for whatever cannot be had, or does not fit together."""
    settle(recipe.threads)
    with waiting(console, f"loading {recipe.model}"):
        loaded = load_model(recipe.model, recipe.dtype)
        weights = fingerprint(loaded.model.named_parameters())
        if torch.cuda.is_available():
            loaded.model.to("cuda")  # type: ignore[arg-type]
    fits(loaded.tokenizer, loaded.model)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    longest = min(recipe.max_length, context or recipe.max_length)
    with waiting(console, f"reading {recipe.data}"):
        held = recipe.heldout if recipe.heldout < 1 else int(recipe.heldout)
        named = {"prompt_column": recipe.prompt_column, "completion_column": recipe.completion_column}
        corpus = load_corpus(recipe.data, seed=recipe.seed, heldout=held, limit=recipe.limit, **named)
        how = (loaded.tokenizer, corpus.kind, longest)
        train, cut = format_rows(corpus.train, *how, context=context, which="training row")
        scored = corpus.heldout.select(range(min(recipe.eval_rows, len(corpus.heldout))))
        kept, lost = format_rows(scored, *how, context=context, which="held-out row")
        heldout: list[Tokens] = list(kept)
        sources = Sources(
            recipe=hashed([recipe.values()]),
            data=hashed(row for part in (corpus.train, [None], corpus.heldout) for row in part),
            tokens=hashed(row for part in (train, [None], heldout) for row in part),
            weights=weights,
        )
    notes = [*corpus.notes, *cut.told("training row", longest), *lost.told("held-out row", longest)]
    for note in filter(None, (loaded.note, *notes)):
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    if (loaded.model.device.type, loaded.model.dtype) == ("cpu", torch.bfloat16) and longest_of(train) <= SHORT:
        loaded.model.set_attn_implementation("eager")
    return Material(recipe, loaded, parameters, corpus, train, heldout, cut, notes, sources)


def longest_of(train: datasets.Dataset) -> int:
    """Tokens of the longest row."""
    return max(map(len, train["input_ids"]))
