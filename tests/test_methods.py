import pytest
import torch
from peft import PsoftConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from ctsft import CTError, resize
from ctsft.adapter.layer import CTLayer
from ctsft.adapter.store import adapted
from ctsft.lab.methods import equip, refresh, targets
from ctsft.lab.schedule import counted_parameters
from ctsft.lab.spec import Spec
from ctsft.models.photonic import PhotonicGPTConfig, PhotonicGPTForCausalLM
from ctsft.spectral.weights import matrix
from helpers import EMBEDDING, HEAD, SHAPES, VOCABULARY, assert_close, assert_same_bits, batches, ids, logits, tiny

pytestmark = pytest.mark.filterwarnings("ignore:the first loss")  # tiny random models guess worse than uniform

METHODS = ("diagonal", "core", "scores", "gains", "lora", "lora-fa", "lora-xs", "vera", "ia3", "norms", "full")
WITH_K = METHODS[:7]
TARGETS = ("paper", "blocks", "last2", "last2+head")
BASES = ("weight", "random", "universal", "gradient", "activation")
BLOCK = {  # (d_out, d_in) of the matrices of one block of width 16
    "llama": [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)],
    "gpt2": [(48, 16), (16, 16), (64, 16), (16, 64)],
    "photonic": [(48, 16), (16, 16), (64, 16), (16, 64)],
}
TABLE = (VOCABULARY, 16)


def three(shape="llama", **changes):
    """A tiny model of three blocks, so that the last two are not all."""
    if shape == "llama":
        return tiny(num_hidden_layers=3, **changes)
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 20} | changes
    if shape == "photonic":
        return PhotonicGPTForCausalLM(PhotonicGPTConfig(initializer_range=0.3, **size)).eval()
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.3, **size, **dropouts)).eval()


def spec(method="diagonal", wanted="paper", **changes):
    return Spec(method=method, targets=wanted, **{"k": 3} | changes)


def expected_shapes(shape, method, wanted):
    if method == "norms":
        return []
    found = BLOCK[shape] * (2 if wanted.startswith("last2") else 3)
    embedding = wanted == "paper" and method not in ("ia3", "vera")
    return [TABLE] * embedding + found + [TABLE] * (wanted == "last2+head")


def expected_count(shape, method, wanted, k=3):
    shapes = expected_shapes(shape, method, wanted)
    outs, ins = sum(o for o, _ in shapes), sum(i for _, i in shapes)
    blocks = len([s for s in shapes if s != TABLE]) // len(BLOCK[shape])
    inner, d_model = {"llama": 24, "gpt2": 64, "photonic": 64}[shape], 16
    vectors = {
        "llama": 7 * 16,
        "gpt2": 3 * (48 + 16 + 64 + 16 + 4 * 16) + 32,
        "photonic": 3 * (48 + 16 + 64 + 64 + 16) + 32,
    }
    return {
        "diagonal": len(shapes) * k,
        "core": len(shapes) * k * k,
        "lora-xs": len(shapes) * k * k,
        "scores": k * outs,
        "lora-fa": k * outs,
        "lora": k * (outs + ins),
        "vera": len(shapes) * k + outs,
        "gains": len(shapes) * k + outs,
        "ia3": outs + blocks * (inner - d_model),  # the last matrix of an MLP is scaled at its input
        "full": sum(o * i for o, i in shapes),
        "norms": vectors[shape],
    }[method]


def step(model, lr=0.02):
    """One step of gradient descent on all that has a gradient."""
    model.train().zero_grad()
    model(input_ids=ids(), labels=ids()).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    model.eval()


def everything(model):
    """Copies of all parameters, buffers and bases of a model, by name."""
    found = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    for name, layer in model.named_modules():
        if isinstance(layer, CTLayer):
            found |= {f"{name}.{f}": t.clone() for f, t in layer.ctsft_basis["default"].tensors().items()}
    return found


CASES = [(s, w) for s in SHAPES for w in TARGETS if s != "gpt2" or w == "last2+head"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "wanted"), CASES)
def test_every_arm_starts_at_the_base_and_trains_what_it_names_and_no_more(shape, method, wanted):
    bare = logits(three(shape))
    equipped = equip(three(shape), spec(method, wanted), batches())
    assert_same_bits(logits(equipped.model.eval()), bare)

    assert equipped.shapes == expected_shapes(shape, method, wanted)
    assert equipped.trained == expected_count(shape, method, wanted)
    assert len(equipped.names) == len(equipped.shapes) == len(set(equipped.names))
    assert sum(n.endswith(EMBEDDING[shape]) for n in equipped.names) == equipped.shapes[:1].count(TABLE)
    assert (HEAD[shape] in equipped.names) == (wanted == "last2+head" and method != "norms")

    before = everything(equipped.model)
    trains = {n for n, p in equipped.model.named_parameters() if p.requires_grad}
    for _ in range(2):  # at the first, one factor of LoRA and VeRA has no gradient: the other is zero
        step(equipped.model)
    after = everything(equipped.model)
    assert {n for n, t in after.items() if not torch.equal(t, before[n])} == trains
    assert not torch.equal(logits(equipped.model), bare)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ("photonic", "llama"))
def test_a_head_of_its_own_is_no_target_unless_it_is_named(shape, method):
    bare = logits(three(shape, tie_word_embeddings=False))
    for wanted in ("paper", "last2+head"):
        equipped = equip(three(shape, tie_word_embeddings=False), spec(method, wanted), batches())
        assert_same_bits(logits(equipped.model.eval()), bare)
        assert equipped.shapes == expected_shapes(shape, method, wanted)
        assert equipped.trained == expected_count(shape, method, wanted)
        before = equipped.model.get_output_embeddings()
        before = getattr(before, "base_layer", before).weight.detach().clone()
        step(equipped.model)
        after = equipped.model.get_output_embeddings()
        moved = not torch.equal(getattr(after, "base_layer", after).weight, before)
        assert moved == (method == "full" and wanted == "last2+head")


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("method", ("diagonal", "core", "scores"))
@pytest.mark.parametrize("shape", ("photonic", "llama"))
def test_every_basis_starts_at_the_base(shape, method, basis):
    equipped = equip(three(shape), spec(method, basis=basis), batches())
    assert_same_bits(logits(equipped.model.eval()), logits(three(shape)))
    embedding = basis != "activation"  # an embedding's inputs are ids
    assert any(n.endswith(EMBEDDING[shape]) for n in equipped.names) == embedding
    assert len(equipped.shapes) == 3 * len(BLOCK[shape]) + embedding


def test_replace_is_the_one_that_does_not_start_at_the_base():
    equipped = equip(three(), spec("scores", basis="universal", universal_mode="replace"), batches())
    assert not torch.allclose(logits(equipped.model), logits(three()), atol=0.1)


def test_the_papers_model_has_33_matrices_and_the_papers_counts():
    modules = targets(PhotonicGPTForCausalLM(PhotonicGPTConfig()), spec())
    shapes = [tuple(m.weight.shape) for m in modules.values()]
    assert len(shapes) == 33 and shapes[0] == (15_007, 256)
    assert counted_parameters(1, shapes) == 48_031


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tied_head_gets_its_own_copy_only_when_it_is_a_target(shape):
    model = three(shape)
    equip(model, spec("full", "last2+head"), batches())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert head is not embedding and head.requires_grad and not embedding.requires_grad
    assert not model.config.tie_word_embeddings

    for method in ("diagonal", "scores", "lora"):
        equipped = equip(three(shape), spec(method, "last2+head"), batches())
        step(equipped.model)
        step(equipped.model)
        assert_same_bits(equipped.model.get_input_embeddings()(ids()), three(shape).get_input_embeddings()(ids()))

    model = three(shape)
    equip(model, spec("full", "paper"), batches())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("method", ("lora", "lora-fa"))
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_of_a_tied_embedding_is_a_change_of_the_one_matrix(shape, method):
    """The twin: the same dW added to the dense weights, the tied one once."""
    equipped = equip(three(shape), spec(method), batches())
    generator = torch.Generator().manual_seed(3)
    for p in equipped.trainable:
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    base = three(shape)
    for name in equipped.names:
        layer = equipped.model.base_model.model.get_submodule(name)
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        else:
            delta = (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T
        matrix(base.get_submodule(name)).data += delta.detach()
    assert_close(logits(equipped.model), logits(base), 1e-4)


def test_lora_fa_differs_from_lora_by_its_frozen_factor_alone():
    lora, fa = (equip(three(), spec(method), batches()) for method in ("lora", "lora-fa"))
    for (name, p), (_, q) in zip(lora.model.named_parameters(), fa.model.named_parameters(), strict=True):
        assert_same_bits(p, q)
        assert p.requires_grad == (q.requires_grad or ".lora_A." in name or ".lora_embedding_B." in name)


def test_lora_xs_trains_like_a_free_psoft():
    """peft's PSOFT without its orthogonality is U_K S_K (R - 1) Vh_K: the same function, written by others."""
    ours = equip(three(), spec("lora-xs", "blocks"), batches())
    options = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False}
    theirs = get_peft_model(three(), PsoftConfig(r=3, psoft_alpha=3, target_modules=ours.names, **options))
    assert ours.trained == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    for _ in range(2):
        for model in (ours.model, theirs):
            step(model)
    assert_close(logits(ours.model), logits(theirs), 1e-4)
    assert not torch.allclose(logits(theirs), logits(three()), atol=0.01)


def test_ia3_scales_what_its_paper_scales():
    """Outputs of all matrices, but of the MLP's last one the inputs."""
    for shape, last in (("llama", "down_proj"), ("gpt2", "mlp.c_proj"), ("photonic", "mlp.down")):
        model = equip(three(shape), spec("ia3", "blocks"), batches()).model
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "is_feedforward")}
        assert len(layers) == 3 * len(BLOCK[shape])
        assert all(m.is_feedforward == n.endswith(last) for n, m in layers.items())


def test_the_seed_decides_what_is_random():
    for method in ("lora", "lora-fa", "vera"):
        a, b, c = (everything(equip(three(), spec(method, seed=s), batches()).model) for s in (1, 1, 2))
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert any(not torch.equal(a[n], c[n]) for n in a)
    model = three()
    torch.manual_seed(5)
    equip(model, spec("lora"), batches())
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # the caller's own randomness is left alone


# ------------------------------------------------------------------------------------------------- counts and bytes


@pytest.mark.parametrize("shape", ("photonic", "llama"))
def test_counted_is_the_papers_count_where_there_is_a_k(shape):
    for method in METHODS:
        equipped = equip(three(shape), spec(method, "blocks"), batches())
        per_k = 3 * sum(o + i for o, i in BLOCK[shape])
        has_k = method in WITH_K
        assert equipped.counted() == (3 * per_k if has_k else None)
        assert equipped.counted(5) == (5 * per_k if has_k else None)


def test_counts_follow_a_change_of_k():
    equipped = equip(three(), spec("diagonal", "blocks"), batches())
    resize(equipped.model, 5)
    assert equipped.trained == 5 * 21 and equipped.ks == [5] * 21
    assert equipped.counted() == equipped.counted(5) == 5 * 3 * sum(o + i for o, i in BLOCK["llama"])


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_weighs_its_numbers_and_a_header(method):
    stored = {"lora-fa": "lora"}.get(method, method)  # peft writes the frozen factor too
    headers = []
    for k in (3, 8):
        equipped = equip(three("photonic"), spec(method, k=k), batches())
        headers.append(equipped.adapter_bytes() - 4 * expected_count("photonic", stored, "paper", k))
    assert 0 < headers[0] < 9_000 and abs(headers[1] - headers[0]) < 200


@pytest.mark.parametrize("method", ("diagonal", "lora", "full"))
def test_a_diverged_adapter_weighs_the_same_and_keeps_its_numbers(method):
    equipped = equip(three(), spec(method), batches())
    weight = equipped.adapter_bytes()
    equipped.trainable[0].data.fill_(float("nan"))
    assert equipped.adapter_bytes() == weight
    assert equipped.trainable[0].isnan().all()


def test_a_basis_from_data_is_part_of_the_adapter():
    plain, stored = (equip(three(), spec(basis=b), batches()) for b in ("weight", "gradient"))
    assert stored.adapter_bytes() - plain.adapter_bytes() > 4 * 3 * sum(o + i for o, i in stored.shapes)


def test_memory_is_the_frozen_bases_and_what_trains():
    def numbers(method, wanted="blocks", **changes):
        equipped = equip(three(), spec(method, wanted, **changes), batches())
        assert equipped.memory_bytes % 4 == 0
        return equipped.memory_bytes // 4

    n, both = 21, 3 * sum(o + i for o, i in BLOCK["llama"])
    outs = 3 * sum(o for o, _ in BLOCK["llama"])
    assert numbers("diagonal") == 3 * both + 3 * n
    assert numbers("diagonal", "paper") == 3 * (both + VOCABULARY + 16) + 3 * (n + 1)  # the tied head adds nothing
    assert numbers("core") == numbers("lora-xs") == 3 * both + 9 * n
    assert numbers("scores") == 3 * (both - outs) + 3 * outs
    assert numbers("lora") == numbers("lora-fa") == 3 * both
    assert numbers("vera") == 3 * (24 + 24) + 3 * n + outs  # one pair of projections for all
    assert numbers("ia3") == outs + 3 * (24 - 16)
    assert numbers("norms") == 7 * 16
    assert numbers("full") == 3 * sum(o * i for o, i in BLOCK["llama"])
    heads = VOCABULARY * 16
    assert numbers("full", "last2+head") == 2 * sum(o * i for o, i in BLOCK["llama"]) + heads
    assert numbers("diagonal", "last2+head") - numbers("diagonal", "last2") == heads + 3 * (VOCABULARY + 16) + 3
    # one basis of K rows of the residual stream for all; scores on the side that is not the residual stream's
    scores = 3 * 3 * sum(max(s) if 24 in s else s[0] for s in BLOCK["llama"])
    assert numbers("scores", basis="universal") <= 16 * 16 + scores


# ----------------------------------------------------------------------------------------------------------- refresh


@pytest.mark.parametrize("method", ("diagonal", "core", "scores"))
def test_a_refresh_folds_what_was_learned_and_trains_as_much_along_other_directions(method):
    equipped = equip(three("gpt2"), spec(method, basis="random", wanted="blocks", refreshes=2), batches())
    model, layers = equipped.model.eval(), dict(adapted(equipped.model, "default"))
    optimizer = torch.optim.Adam(equipped.trainable)
    model(**batches()[0], labels=batches()[0]["input_ids"]).loss.backward()
    for p in equipped.trainable:
        torch.nn.init.normal_(p, std=0.1)
    optimizer.step()
    before, first = logits(model), {n: m.ready("default") for n, m in layers.items()}
    assert len({float((logits(three("gpt2")) - before).abs().max()) > 0.01, True}) == 1
    for _ in range(2):
        refresh(model, optimizer)
        assert_close(logits(model), before, 1e-4)
        assert all(float(p.detach().abs().max()) == 0 for p in equipped.trainable) and not optimizer.state
        assert all(not torch.equal(m.ready("default").vh, first[n].vh) for n, m in layers.items())
        first = {n: m.ready("default") for n, m in layers.items()}
    fixed = equip(three("gpt2"), spec(method, basis="random", wanted="blocks"), batches())
    assert equipped.trained == fixed.trained and equipped.ks == fixed.ks


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_a_method_cannot_do_is_said():
    for changes in ({"dropout": 0.1}, {"schedule": "3>4@1/2"}, {"refreshes": 1}, {"allocation": "gora"}):
        for method in ("lora", "lora-xs", "full"):
            with pytest.raises(CTError, match=f"{method} has no dropout, schedule, refresh or allocation"):
                equip(three(), spec(method, **changes), batches())
    with pytest.raises(CTError, match="cannot follow a schedule"):
        equip(three(), spec(schedule="3>4@1/2", allocation="effective_rank"), batches())
    for changes in ({"basis": "weight"}, {"method": "gains"}, {"schedule": "3>4@1/2"}):
        with pytest.raises(CTError, match="refreshes take new random directions"):
            equip(three(), spec(**{"basis": "random", "refreshes": 1} | changes), batches())
    for method in (*WITH_K, "vera"):
        with pytest.raises(CTError, match=f"{method} needs k of at least 1"):
            equip(three(), spec(method, k=0), batches())
    with pytest.raises(CTError, match="more than the 8 directions"):
        equip(three(), spec(k=9), batches())
    model = three()
    model.config.model_type = "unheard"
    with pytest.raises(CTError, match="names no feed-forward matrix of unheard models"):
        equip(model, spec("ia3"), batches())
    assert targets(three(), spec("norms")) == {}
