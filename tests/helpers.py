"""Tiny random models, and adapters on them with random trained numbers."""

import math

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ctsft import CTConfig, calibrate, export_adapter
from ctsft.adapter.layer import CTLayer
from ctsft.files import home
from ctsft.models.photonic import PhotonicGPTConfig, PhotonicGPTForCausalLM
from ctsft.spectral.kinds import needs_data
from ctsft.spectral.weights import matrices, matrix

SHAPES = ("llama", "gpt2", "photonic")
FORMS = ("diagonal", "core", "scores", "gains")
EVEN = 0.1  # the amplitudes of `gains` where its numbers are zero
BASES = ("weight", "random", "universal", "gradient", "activation", "file", "learned")
DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY = 37
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "photonic": "tok_emb"}
HEAD = {"llama": "lm_head", "gpt2": "lm_head", "photonic": "head"}


def tiny(shape="llama", dtype=torch.float32, seed=0, **changes):
    """A model of width 16 with 2 layers, the same weights for the same seed, large enough for attention to matter."""
    torch.manual_seed(seed)
    size = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0} | changes
    if shape == "llama":
        size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "tie_word_embeddings": True} | size
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **size))
    elif shape == "gpt2":
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=20, **dropouts, **size))
    else:
        model = PhotonicGPTForCausalLM(PhotonicGPTConfig(n_embd=16, n_layer=2, n_head=2, n_positions=20, **size))
    return model.to(dtype).eval()


def ids(rows=3, length=8, seed=1):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches():
    return [{"input_ids": ids(seed=s)} for s in (2, 3)]


def logits(model, input_ids=None):
    with torch.no_grad():
        return model(input_ids=ids() if input_ids is None else input_ids).logits


def directions(base, seed=0):
    """Seeded orthonormal `<module>.u` and `.vh` of every matrix of `base`, as many as there can be."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in matrices(base):
        d_out, d_in = matrix(module).shape
        k = min(d_out, d_in)
        found[f"{name}.u"] = torch.linalg.qr(torch.randn(d_out, k, generator=g))[0].contiguous()
        found[f"{name}.vh"] = torch.linalg.qr(torch.randn(d_in, k, generator=g))[0].T.contiguous()
    return found


def write_directions(base, path, seed=0):
    """`directions` in the safetensors file `path`; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(directions(base, seed), path)
    return path


def write_learned(base, path, seed=0, siblings=3):
    """Seeded directions of unit length and amplitudes of siblings in the file `path`, as if learned; returns it."""
    g, tensors = torch.Generator().manual_seed(seed), directions(base, seed)
    for name, t in directions(base, seed + 1).items():
        tensors[name] = F.normalize(tensors[name] + 0.3 * t, dim=0 if name.endswith(".u") else 1)
        tensors[f"{name.rpartition('.')[0]}.siblings"] = 0.1 * torch.randn(siblings, min(t.shape), generator=g)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def ready_config(base, **options):
    """A CTConfig, calibrated where its basis is made from data."""
    if options.get("basis") in ("file", "learned"):
        shapes = "-".join(sorted({"x".join(map(str, m.weight.shape)) for _, m in matrices(base)}))
        path = home() / options["basis"] / f"{type(base).__name__}-{shapes}"
        write = write_directions if options["basis"] == "file" else write_learned
        options = {"basis_file": str(write(base, path))} | options
    config = CTConfig(**{"k": 4, "task_type": "CAUSAL_LM"} | options)
    return calibrate(base, config, batches()) if needs_data(config.basis) else config


def adapt(base, **options):
    """`base` with a fresh adapter."""
    return get_peft_model(base, ready_config(base, **options)).eval()


def owners(model, adapter="default"):
    """The CTLayers that own `adapter`, by their name in the bare model."""
    bare = model.base_model.model if isinstance(model, PeftModel) else model
    return {
        n: m
        for n, m in bare.named_modules()
        if isinstance(m, CTLayer) and adapter in m.ctsft_coefficients and not m.ctsft_owner
    }


def coefficients(model, adapter="default"):
    return {n: m.ctsft_coefficients[adapter] for n, m in owners(model, adapter).items()}


def randomise(model, adapter="default", scale=0.3, seed=5):
    """Random trained numbers, as if after training; returns `model`."""
    generator = torch.Generator().manual_seed(seed)
    for c in coefficients(model, adapter).values():
        c.data = scale * torch.randn(c.shape, generator=generator)
    return model


def dense(layer, adapter="default"):
    """dW (d_out, d_in) of a layer, float64, written down from the formula and sharing no code with the product."""
    basis, c = layer.ctsft_basis[adapter], layer.ctsft_coefficients[adapter].detach().double()
    u, vh, start = (None if t is None else t.double() for t in (basis.u, basis.vh, basis.start))
    if start is not None:
        c = c + (torch.diag(start) if c.ndim == 2 and start.ndim == 1 else start)
    if layer.ctsft_config[adapter].form == "gains":
        w = torch.einsum("o,ok,k,ki->oi", c[: len(u)], u, c[len(u) :] + EVEN, vh)
    elif u is None:
        w = torch.einsum("ok,ki->oi", c, vh)
    elif vh is None:
        w = torch.einsum("ok,ik->oi", u, c)
    else:
        w = torch.einsum("ok,kl,li->oi", u, torch.diag(c) if c.ndim == 1 else c, vh)
    replaced = layer.ctsft_config[adapter].universal_mode == "replace"
    return w if not replaced else w - matrix(layer.get_base_layer()).detach().double()


def along(layer, g, adapter="default"):
    """The gradient of the trained numbers of a layer, from that of its dense weight `g` (d_out, d_in)."""
    form, basis, c = layer.ctsft_config[adapter].form, layer.ctsft_basis[adapter], layer.ctsft_coefficients[adapter]
    if form == "scores":
        return g @ basis.vh.T if basis.u is None else g.T @ basis.u
    seen = basis.u.T @ g @ basis.vh.T
    if form == "gains":
        gains, a = c.detach()[: len(basis.u)], c.detach()[len(basis.u) :] + EVEN
        own = basis.u.T @ (gains[:, None] * g) @ basis.vh.T
        return torch.cat([(g * (basis.u @ torch.diag(a) @ basis.vh)).sum(1), own.diagonal()])
    return seen.diagonal() if form == "diagonal" else seen


def twin(model, base, adapter="default"):
    """`base` (not adapted, float32 or float64) with dense weights W + dW; returns it."""
    for name, layer in owners(model, adapter).items():
        module = base.get_submodule(name)
        w = matrix(module)
        w.data += dense(layer, adapter).to(w.dtype)
    return base


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b), f"largest difference {(a.double() - b.double()).abs().max():.3g}"


def assert_close(a, b, tolerance):
    """Largest difference relative to the largest entry."""
    a, b = a.detach().double(), b.detach().double()
    difference = ((a - b).abs().max() / b.abs().max()).item()
    assert difference <= tolerance, f"relative difference {difference:.3g} > {tolerance:.3g}"


# ---- a model as if trained for a while, and a batch for it

BLOCKS = {
    "llama": ["q_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "photonic": ["qkv", "proj", "up", "down"],
}


def whole(shape="llama", k=6, **options):
    """A tiny model with its block matrices and its tied embedding adapted, as if trained for a while."""
    return randomise(adapt(tiny(shape), k=k, target_modules=[*BLOCKS[shape], EMBEDDING[shape]], **options), scale=0.1)


def rows(count=5, length=8, seed=1):
    """One batch (count, length) in which every token counts."""
    text = ids(count, length, seed)
    return {"input_ids": text, "labels": text}


def backward(model, batch):
    """Gradients of the loss on `batch`, from zero; returns the loss."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item()


def slow_loss(model, rows):
    """One row at a time, without padding, one token at a time."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().softmax(-1)
        for i in range(1, len(row["input_ids"])):
            if row["labels"][i] != -100:
                total, count = total - math.log(p[i - 1, row["labels"][i]]), count + 1
    return total, count


def assert_exports_do_the_same(model, folder):
    """The plain LoRA and the merged model that are written from the adapted tiny `model` give its logits."""
    adapted = logits(model)
    export_adapter(model, folder / "lora", "lora")
    assert_close(logits(PeftModel.from_pretrained(tiny(), folder / "lora").eval()), adapted, 1e-5)
    export_adapter(model, folder / "merged", "merged")
    assert_close(logits(type(tiny()).from_pretrained(folder / "merged").eval()), adapted, 1e-5)
