"""What runs are made of: where models and texts lie, the bare model, and the windows of text that a spec trains on."""

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

import ctsft.models.photonic  # noqa: F401  (registers the model)
from ctsft.adapter.config import CTConfig
from ctsft.adapter.targets import find_targets
from ctsft.data.read import READABLE
from ctsft.data.rows import BUILTIN as BUILTIN_TEXTS
from ctsft.data.rows import load_corpus
from ctsft.errors import CTError
from ctsft.files import HUB_ID
from ctsft.lab.allocations import FEEDFORWARD
from ctsft.lab.own import Own
from ctsft.lab.spec import Spec
from ctsft.models.load import BUILTIN as BUILTIN_MODELS
from ctsft.models.load import Loaded, load_model, resolve
from ctsft.spectral.basis import generator
from ctsft.spectral.weights import fingerprint, matrix


def models_folder() -> Path:
    """Where models that are not built in lie, by name: `$CTSFT_MODELS`, else `~/.cache/ctsft-models`."""
    return Path(os.environ.get("CTSFT_MODELS") or Path.home() / ".cache" / "ctsft-models").expanduser()


def texts_folder() -> Path:
    """Where texts that are not built in lie, by name: `$CTSFT_TEXTS`, else the folder `texts` beside the models."""
    return Path(os.environ.get("CTSFT_TEXTS") or models_folder() / "texts").expanduser()


def model_source(name: str) -> str:
    """What `load_model` takes for a spec's model; CTError if it is not on this machine."""
    if name in BUILTIN_MODELS or Path(name).is_absolute() or ("/" in name and HUB_ID.fullmatch(name)):
        return name
    if not (models_folder() / name / "config.json").exists():
        raise CTError(f"the model {name} is not in {models_folder()}; fetch it there, or set CTSFT_MODELS.")
    return str(models_folder() / name)


def text_source(name: str) -> str:
    """What `load_corpus` takes for a spec's text; CTError if it is not on this machine."""
    if name in BUILTIN_TEXTS or "/" in name:
        return name
    for suffix in READABLE:
        if (path := texts_folder() / f"{name}{suffix}").exists():
            return str(path)
    raise CTError(
        f"the text {name} is not in {texts_folder()} ({name}.txt or .jsonl); put it there, or set CTSFT_TEXTS."
    )


def absent(spec: Spec) -> str:
    """Why this machine cannot run `spec` for want of a model or text; empty if it can."""
    try:
        model_source(spec.model)
        for text in (spec.text, *spec.siblings):
            text_source(text)
    except CTError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------ model and text


@lru_cache(maxsize=1)
def base(name: str) -> Loaded:
    """The bare model in float32. Never trained: every run takes a copy."""
    return load_model(model_source(name), "float32")


@lru_cache(maxsize=1)
def weights_of(name: str) -> str:
    """The fingerprint of the bare model's weights, each tied one once."""
    return fingerprint(base(name).model.named_parameters())


def own(model: str | None, data: str | None, home: Spec) -> Own:
    """What `--model` and `--data` name, in place of those of `home`. CTError where they cannot be had."""
    name, text, corpus = home.model, home.text, ""
    if model is not None:
        found = resolve(model)
        name = model if model in BUILTIN_MODELS or isinstance(found, str) else str(Path(model).expanduser().absolute())
    if data is not None:
        text = data
        if (path := Path(data).expanduser()).is_file():
            text, corpus = str(path.absolute()), f"xxh3-{xxhash.xxh3_128_hexdigest(path.read_bytes())}"
        load_corpus(text)  # what is wrong with it is told before anything is run
    bare = base(name).model
    shapes = [matrix(module).shape for module in find_targets(bare, CTConfig())[0].values()]
    return Own(
        model=name,
        weights="" if model is None else weights_of(name),
        text=text,
        corpus=corpus,
        tied=bool(bare.all_tied_weights_keys),
        narrowest=min(map(min, shapes)),
        width=int(bare.get_input_embeddings().weight.shape[1]),  # type: ignore[index,arg-type]
        lacks=() if bare.config.model_type in FEEDFORWARD else ("ia3",),
    )


def fresh_model(spec: Spec) -> PreTrainedModel:
    """A copy of the base; with a random head of its own, drawn by the seed, where the spec unties it.

    Blocks that the spec never trains are shared with the base, not copied.
    """
    model = base(spec.model).model
    if spec.tied:
        frozen = blocks(model)[:-2].parameters() if spec.targets.startswith("last2") else ()
        return copy.deepcopy(model, {id(p): p for p in frozen})
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        untied = type(model)(config)
    shared = set(model.all_tied_weights_keys)  # the head's weight, under its own name
    missing, unexpected = untied.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if name not in shared}, strict=False
    )
    assert set(missing) == shared and not unexpected, (missing, unexpected)
    return untied.eval()


@lru_cache(maxsize=4)
def streams(model: str, text: str) -> tuple[Tensor, Tensor]:
    """Token ids of the text to train on and of the held-out text, each one stream, rows ended by the end token."""
    tokenizer = base(model).tokenizer
    corpus = load_corpus(text_source(text), seed=0, heldout=0.1)

    def stream(rows: Any) -> Tensor:
        texts = [r["text"] if corpus.kind == "text" else joined(r["prompt"]) + joined(r["completion"]) for r in rows]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([i for row in ids for i in [*row, tokenizer.eos_token_id]])

    return stream(corpus.train), stream(corpus.heldout)


def joined(turns: Any) -> str:
    return turns if isinstance(turns, str) else "\n".join(turn["content"] for turn in turns)


def windows(ids: Tensor, spec: Spec, *words: object) -> Tensor:
    """A batch (batch, length) of windows of the stream `ids`, drawn by the seed and `words`."""
    if len(ids) <= spec.length:
        raise CTError(f"the text {spec.text} has {len(ids)} tokens, too few for windows of {spec.length}.")
    starts = torch.randint(len(ids) - spec.length, (spec.batch, 1), generator=generator(spec.seed, *words))
    return ids[starts + torch.arange(spec.length)]


def batches(spec: Spec) -> Iterator[Tensor]:
    """What every step trains on: always the same windows, or new ones."""
    train, _ = streams(spec.model, spec.text)
    step = 0
    while True:
        yield windows(train, spec, "batch", step if spec.batches == "fresh" else 0)
        step += 1


def heldout_windows(spec: Spec) -> Tensor:
    """(spec.heldout_windows, length): evenly spread over the held-out stream, the same for every arm and seed."""
    _, ids = streams(spec.model, spec.text)
    starts = torch.linspace(0, len(ids) - spec.length, spec.heldout_windows).long()[:, None]
    return ids[starts + torch.arange(spec.length)]


def named_batch(spec: Spec, *name: object) -> Tensor:
    """The fixed batch, ("batch",), or part i of the held-out windows, ("heldout", i)."""
    if name[0] == "heldout":
        return heldout_windows(spec).split(spec.batch)[int(str(name[1]))]
    return windows(streams(spec.model, spec.text)[0], spec, "batch", 0)


def tokens_of(spec: Spec, *name: object) -> Spec:
    """`spec` without all that does not decide the tokens of the batch `name`: runs that share tokens share this."""
    seed = 0 if name else spec.seed
    same = {name: getattr(spec, name) for name in ("model", "text", "batch", "length", "heldout_windows")}
    return Spec(**same, seed=seed)


def autocast(spec: Spec) -> AbstractContextManager[Any]:
    """bfloat16 products over float32 weights where the spec says so."""
    return torch.autocast("cpu", torch.bfloat16) if spec.dtype == "bfloat16" else nullcontext()


def inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of blocks of a causal language model: the longest ModuleList in it."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
