"""Seeded changes to saved adapters: the same numbers, or one sentence. By hand: CTSFT_FUZZ=10000 pytest -s."""

import json
import os
import random
import resource
import shutil
import time
import warnings
from collections import Counter
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import assert_one_sentence
from ctsft import CTError, save_adapter
from ctsft.adapter.read import load_adapter
from fuzz import changed, outcome
from helpers import adapt, logits, randomise, tiny

FILE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
CASES = int(os.environ.get("CTSFT_FUZZ", "300"))
SECONDS = 20  # for one case, on a busy machine: an honest one takes hundredths

UNTIED = {"tie_word_embeddings": False}
ADAPTERS = {  # name -> (options of the adapter, of the base)
    "diagonal": ({}, {}),
    "core, stored": ({"form": "core", "store_basis": True}, {}),
    "scores in bfloat16": ({"form": "scores", "save_dtype": "bfloat16", "basis_dtype": "bfloat16"}, {}),
    "scores, universal": ({"form": "scores", "basis": "universal"}, {}),
    "replace": ({"form": "scores", "basis": "universal", "universal_mode": "replace"}, {}),
    "replace, stored": (
        {"form": "scores", "basis": "universal", "universal_mode": "replace", "store_basis": True},
        {},
    ),
    "gradient": ({"basis": "gradient", "k": {"q_proj": 2, ".*": 4}}, {}),
    "activation": ({"basis": "activation", "form": "core", "save_dtype": "float16"}, {}),
    "learned": ({"basis": "learned"}, {}),
    "learned, from the mean, stored": ({"basis": "learned", "start": "mean", "form": "core", "store_basis": True}, {}),
    "whole head": ({"basis": "random", "modules_to_save": ["lm_head"], "store_basis": True}, UNTIED),
    "tied head": ({"target_modules": ["q_proj", "lm_head"], "weight_from": "bottom"}, {}),
    "pattern": ({"target_modules": r".*layers\.\d+\..*_proj", "exclude_modules": ".*mlp.*", "form": "scores"}, {}),
}


# ---- what is changed


def some_bytes(rng, data):
    return changed(data, rng.getrandbits(63))


def parts(folder):
    """The header of the tensors' file and the numbers behind it."""
    data = (folder / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def join(folder, header, numbers, length=None):
    length = len(header) if length is None else length
    (folder / FILE).write_bytes(length.to_bytes(8, "little") + header + numbers)


def bytes_of_numbers(rng, folder):
    header, numbers = parts(folder)
    at = rng.randrange(len(numbers))
    flipped = bytes([numbers[at] ^ 1 << rng.randrange(8)])
    join(folder, header, numbers[:at] + flipped + numbers[at + 1 :])


def bytes_of_file(rng, folder):
    (folder / FILE).write_bytes(some_bytes(rng, (folder / FILE).read_bytes()))


def bytes_of_header(rng, folder):
    header, numbers = parts(folder)
    join(folder, some_bytes(rng, header), numbers)


def length_of_header(rng, folder):
    header, numbers = parts(folder)
    join(folder, header, numbers, rng.choice((0, 1, len(header) - 1, len(header) + 8, 1 << 40, (1 << 64) - 1)))


def entry_of_header(rng, folder):
    """One entry of the header: its dtype, shape, place or name, or one more, or one less."""
    header, numbers = parts(folder)
    entries = json.loads(header)
    name, other = (rng.choice([n for n in entries if n != "__metadata__"]) for _ in range(2))
    entry = entries[name]
    kind = rng.randrange(8)
    if kind == 0:
        entry["dtype"] = rng.choice(("I16", "BOOL", "F64", "F16", "BF16", "I32", "U8", "F8_E4M3", "X", 3))
    elif kind == 1:
        entry["shape"] = rng.choice(([1, *entry["shape"]], entry["shape"][::-1], [], [1 << 40], [-1], "x"))
    elif kind == 2:
        entry["data_offsets"], entries[other]["data_offsets"] = entries[other]["data_offsets"], entry["data_offsets"]
    elif kind == 3:
        entry["data_offsets"] = rng.choice(([0, 4], [4, 0], [0, 1 << 60], [-4, 0], []))
    elif kind == 4:
        del entries[name]
    elif kind == 5:
        entries[rng.choice(("ctsft.more", "x", name + "x", ""))] = entries.pop(name)
    elif kind == 6:
        entries["__metadata__"] = rng.choice(({"format": "tf"}, {"format": 3}, {}, [], {"a": "b" * 10_000}))
    else:
        entries[rng.choice(("ctsft.more", "model.norm.weight"))] = entry
    join(folder, json.dumps(entries).encode(), numbers)


def values(rng, folder):
    """The numbers of one tensor: in another order, of another type or sign, huge, or not finite."""
    tensors = load_file(folder / FILE)
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    at = rng.randrange(t.numel())

    def put(value):
        changed = t.clone()
        changed.view(-1)[at] = value
        return changed

    changes = (
        lambda: t.flatten()[torch.randperm(t.numel())].reshape(t.shape),
        lambda: t.flip(0),
        lambda: t.roll(1),
        lambda: -t,
        lambda: t * rng.choice((0.0, 1.001, 2.0)),
        lambda: t.to(rng.choice((torch.int16, torch.bool, torch.float64, torch.float16, torch.bfloat16, torch.int64))),
        lambda: put(rng.choice((float("nan"), float("inf"), -float("inf"), 1e38, 1e-45, -0.0))),
        lambda: t.flatten()[:-1],
        lambda: t[None],
        lambda: torch.cat([t, t]),
        lambda: t.flatten()[:0],
    )
    tensors[name] = rng.choice(changes)().contiguous()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


BASE = "base_model.model.model."
STRANGERS = (
    *("model.norm.weight", BASE + "norm.weight", BASE + "embed_tokens.weight", "base_model.model.lm_head.bias"),
    *(BASE + "layers.0.self_attn.q_proj.base_layer.weight", BASE + "layers.0.self_attn.q_proj.weight"),
    *(BASE + "layers.0.self_attn.q_proj.ctsft_coefficients.default", "ctsft.basis.model.layers.0.mlp.up_proj.u"),
    *(
        "ctsft.basis_universal",
        "ctsft.basis.x.start",
        "ctsft.more",
        "lm_head.weight",
        "base_model.model.lm_head.weight",
    ),
    "base_model.model.lm_head.modules_to_save.default.weight",
)


def names(rng, folder):
    """Tensors more, fewer, renamed or exchanged."""
    tensors = load_file(folder / FILE)
    name, other = (rng.choice(sorted(tensors)) for _ in range(2))
    kind = rng.randrange(4)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(STRANGERS)] = rng.choice((torch.ones(16), torch.ones(16, 16), torch.ones(37, 16)))
    elif kind == 2:
        tensors[rng.choice((*STRANGERS, name.replace("0", "1"), name.upper()))] = tensors.pop(name)
    else:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


ODD = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        5,
        100_000_000,
        10**30,
        0.5,
        1e308,
        "",
        "x",
        "(.+)+!",
        "(?:(?:.|\\w)+)+(?<=!)",
    ),
    *([], [1], ["q_proj"], [["q_proj", 3]], [["(.+)+!", 3], [".*", 4]], {}, {"a": 1}, [None], [[]], "lm_head", "auto"),
    *(
        "weight",
        "random",
        "universal",
        "file",
        "learned",
        "mean",
        "core",
        "scores",
        "replace",
        "bottom",
        "bfloat16",
        "float16",
        ["lm_head"],
    ),
    *("CAUSAL_LM", "SEQ_CLS", "LORA", ".*q_proj", "q_proj", [0], "../x", "/etc/passwd", "a" * 100_000),
)


def setting(rng, folder):
    settings = json.loads((folder / SETTINGS).read_text())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(settings))
        kind = rng.randrange(6)
        if kind == 0:
            del settings[name]
        elif kind == 1:
            settings[rng.choice(("colour", "runtime_config", "r", name.upper(), "calibrated", "self"))] = rng.choice(
                ODD
            )
        else:
            settings[name] = rng.choice(ODD)
    (folder / SETTINGS).write_text(json.dumps(settings))


def bytes_of_settings(rng, folder):
    (folder / SETTINGS).write_bytes(some_bytes(rng, (folder / SETTINGS).read_bytes()))


def text_of_settings(rng, folder):
    text = (folder / SETTINGS).read_text()
    (folder / SETTINGS).write_text(
        rng.choice(
            (
                *("[]", "3", "null", '"x"', "", "{}", "NaN", '{"peft_type": "CTSFT"}', '{"peft_type": NaN}'),
                *("[" * 100_000, '{"a":' * 50_000, "9" * 10_000, text + text, text.replace("4", "NaN")),
                *(text.replace("0", "1" + "0" * 5_000), text.replace("{", '{"k": 5, ', 1), text.replace('"', "'")),
                text.replace("null", "Infinity"),
            )
        )
    )


def files(rng, folder):
    """Files missing, empty, of another name, or of another adapter."""
    other = folder.parent.parent / "good" / rng.choice(sorted(ADAPTERS))
    kind, name = rng.randrange(5), rng.choice((FILE, SETTINGS))
    if kind == 0:
        (folder / name).unlink()
    elif kind == 1:
        (folder / name).write_bytes(b"")
    elif kind == 2:
        shutil.copy(other / name, folder / name)
    elif kind == 3:
        (folder / FILE).rename(folder / "adapter_model.bin")
    else:
        (folder / name).unlink()
        (folder / name).mkdir()


KINDS = {
    "bits of numbers": bytes_of_numbers,
    "bytes of the tensors' file": bytes_of_file,
    "bytes of its header": bytes_of_header,
    "length of its header": length_of_header,
    "entries of its header": entry_of_header,
    "values, types and shapes of tensors": values,
    "names of tensors": names,
    "settings": setting,
    "bytes of the settings": bytes_of_settings,
    "text of the settings": text_of_settings,
    "files": files,
}


# ---- what must hold


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Folder of the adapters' folders, and for each its base and its logits."""
    torch.manual_seed(0)
    folder, worlds = tmp_path_factory.mktemp("fuzz"), {}
    for seed, (name, (options, of_base)) in enumerate(ADAPTERS.items()):
        model = randomise(adapt(tiny(**of_base), **options), seed=seed)
        save_adapter(model, folder / "good" / name)
        worlds[name] = tiny(**of_base), logits(load_adapter(tiny(**of_base), folder / "good" / name))
    return folder, worlds


def unseal(folder):
    settings = json.loads((folder / SETTINGS).read_text())
    kept = {n: v for n, v in settings.items() if not n.endswith("_hash")}
    (folder / SETTINGS).write_text(json.dumps(kept))


def loaded(folder, base):
    """What loading gives: a CTError, or the logits, on a base whose own weights are left as they were."""
    model = deepcopy(base)
    before = [(p, p.detach().clone()) for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = outcome(lambda: logits(load_adapter(model, folder)), SECONDS)
    for parameter, own in before:
        assert torch.equal(parameter, own), "a weight of the base has changed"
    return result


@pytest.mark.parametrize("sealed", (True, False), ids=("sealed", "of an older ctsft"))
def test_the_same_numbers_or_one_sentence(good, sealed):
    """For a file of an older ctsft, without hashes, other numbers cannot be told: no traceback, no changed base."""
    folder, worlds = good
    counts, slowest, start = Counter(), (0.0, ""), time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(CASES if sealed else CASES // 4):
        rng = random.Random(seed)
        name, kind = rng.choice(sorted(ADAPTERS)), sorted(KINDS)[seed % len(KINDS)]
        base, wanted = worlds[name]
        case = folder / "case" / "x"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(folder / "good" / name, case)
        if not sealed:
            unseal(case)
        KINDS[kind](rng, case)
        began = time.monotonic()
        try:
            result = loaded(case, base)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {kind} of {name!r}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, (time.monotonic() - began, f"seed {seed}, {kind}"))
        refused = isinstance(result, CTError)
        same = not refused and result.shape == wanted.shape and torch.equal(result, wanted)
        assert refused or same or not sealed, f"seed {seed}: {kind} of {name!r} gave other numbers without a word"
        counts[kind, "refused" if refused else "same" if same else "other"] += 1
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    if "CTSFT_FUZZ" in os.environ:
        for kind in sorted(KINDS):
            print(f"\n{kind:40}", *(f"{counts[kind, w]:6} {w}" for w in ("refused", "same", "other")), end="")
        took = time.monotonic() - start
        print(f"\n{sum(counts.values())} cases in {took:.0f} s, slowest {slowest}, {more:.0f} MiB more")


def test_the_commands_say_one_sentence(ctsft, finished, tmp_path):
    """What `sample` says of a changed adapter: the same, or one sentence and exit code 2."""
    say = ("--prompt", "red green?", "--max-new-tokens", "4")
    wanted = ctsft("sample", finished, *say)[1]
    for seed in range(CASES // 20):
        rng, kind = random.Random(seed), sorted(KINDS)[seed % len(KINDS)]
        run = tmp_path / "case" / "x"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished, run)
        if kind == "files":
            continue
        KINDS[kind](rng, run / "adapter")
        result = ctsft("sample", run, *say)
        if result[0]:
            assert_one_sentence(result)
        else:
            assert result[1] == wanted, f"seed {seed}: {kind}"
