import math
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from ctsft.errors import CTError
from ctsft.models.photonic import PhotonicGPTConfig, PhotonicGPTForCausalLM, PhotonicGPTModel

SHAPE = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}


def tiny(**changes):
    """A small PhotonicGPT whose attention is not nearly uniform, as it would be with the usual small weights."""
    return PhotonicGPTForCausalLM(PhotonicGPTConfig(**SHAPE | {"initializer_range": 0.3} | changes)).eval()


def tokens(batch=2, length=10):
    return torch.randint(0, SHAPE["vocab_size"], (batch, length))


def slow_loss(logits, labels):
    """The shifted cross-entropy, one token at a time: sum in nats, and how many tokens."""
    total, count = 0.0, 0
    for row, row_labels in zip(logits.double(), labels, strict=True):
        for t in range(len(row_labels) - 1):
            if row_labels[t + 1] != -100:
                total += -(row[t].exp() / row[t].exp().sum()).log()[row_labels[t + 1]].item()
                count += 1
    return total, count


def test_the_default_is_the_papers_10_193_152_parameters():
    model = PhotonicGPTForCausalLM(PhotonicGPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 10_193_152
    assert model.head.weight is model.model.tok_emb.weight
    untied = PhotonicGPTForCausalLM(PhotonicGPTConfig(tie_word_embeddings=False))
    assert sum(p.numel() for p in untied.parameters()) == 10_193_152 + 15_007 * 256


def test_initial_weights_are_gpt2s():
    model = PhotonicGPTForCausalLM(PhotonicGPTConfig())
    residual = 0.02 / math.sqrt(2 * 8)
    for name, p in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            expected = residual if name.endswith(("attn.proj.weight", "mlp.down.weight")) else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name


def test_names():
    block = {"ln_1", "ln_2", "attn.qkv", "attn.proj", "mlp.up", "mlp.down"}
    expected = {"model.tok_emb", "model.pos_emb", "model.ln_f", "head"}
    expected |= {f"model.blocks.{n}.{name}" for n in range(2) for name in block}
    leaves = {name for name, module in tiny().named_modules() if not list(module.children())}
    assert leaves == expected


def test_auto_classes_know_it():
    config = AutoConfig.for_model("photonic_gpt", **SHAPE)
    assert type(config) is PhotonicGPTConfig
    assert type(AutoModelForCausalLM.from_config(config)) is PhotonicGPTForCausalLM
    assert type(AutoModel.from_config(config)) is PhotonicGPTModel


def test_a_second_import_is_harmless():
    # In another process, since a reload leaves two of each class behind.
    code = "import importlib, ctsft.models.photonic as p; importlib.reload(p); print(p.PhotonicGPTConfig())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "photonic_gpt" in run.stdout


def test_heads_must_divide_the_width():
    with pytest.raises(CTError, match="n_head=5 does not divide n_embd=32"):
        PhotonicGPTConfig(**SHAPE | {"n_head": 5})


def test_a_block_is_the_written_out_formula():
    model = tiny(n_layer=1)
    ids = tokens(1, 5)
    state = {name: p.double() for name, p in model.model.named_parameters()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"blocks.0.{name}.weight"].T + state[f"blocks.0.{name}.bias"]

    x = state["tok_emb.weight"][ids[0]] + state["pos_emb.weight"][:5]
    q, k, v = linear(norm(x, "blocks.0.ln_1"), "attn.qkv").split(32, dim=-1)
    heads = []
    for h in range(4):
        cols = slice(8 * h, 8 * h + 8)
        scores = q[:, cols] @ k[:, cols].T / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, cols])
    x = x + linear(torch.cat(heads, -1), "attn.proj")
    up = linear(norm(x, "blocks.0.ln_2"), "mlp.up")
    x = x + linear(up * 0.5 * (1 + torch.erf(up / math.sqrt(2))), "mlp.down")
    expected = norm(x, "ln_f") @ state["tok_emb.weight"].T
    torch.testing.assert_close(model(ids).logits[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_future_tokens_do_not_change_past_logits():
    model, ids = tiny(), tokens()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % SHAPE["vocab_size"]
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_does_not_change_logits(side, attention):
    model, ids = tiny(), tokens(2, 7)
    model.set_attn_implementation(attention)
    pad = 4
    mask = torch.ones(2, 7 + pad, dtype=torch.long)
    padded = tokens(2, 7 + pad)
    inside = slice(pad, None) if side == "left" else slice(None, 7)
    mask[1] = 0
    mask[1, inside] = 1
    padded[1, inside] = ids[1]
    logits = model(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1, inside], model(ids[1:]).logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[0], model(padded[:1]).logits[0], rtol=1e-5, atol=1e-5)


def test_packed_texts_do_not_see_each_other():
    model = tiny()
    first, second = tokens(1, 6), tokens(1, 9)
    # 30 tokens in all: each text fits in the 24 positions, the row need not.
    packed = torch.cat([first, second, second, first], dim=1)
    positions = torch.cat([torch.arange(n) for n in (6, 9, 9, 6)])[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, :6], model(first).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, 15:24], model(second).logits, rtol=1e-5, atol=1e-5)


def test_cached_steps_give_the_logits_of_one_pass():
    model, ids = tiny(), tokens()
    whole = model(ids, use_cache=False)
    assert whole.past_key_values is None
    cache = DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in ids.split([4, 1, 3, 1, 1], dim=1)]
    assert cache.get_seq_length() == 10
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, rtol=1e-5, atol=1e-5)


def test_greedy_generation_is_the_same_cached_and_uncached_and_batched_with_left_padding():
    model = tiny()
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=mask, **options)
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, uncached)
    alone = model.generate(ids[1:, 3:], attention_mask=mask[1:, 3:], **options)
    assert torch.equal(cached[1, 3:], alone[0])
    by_hand = ids[:1]
    for _ in range(12):
        by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached[:1], by_hand)
    assert len(set(by_hand[0, 8:].tolist())) > 1


def test_text_longer_than_the_positions_is_refused():
    model = tiny()
    assert model(tokens(1, 24)).logits.shape == (1, 24, 61)
    with pytest.raises(CTError, match="The text of 25 tokens is longer than the 24 positions"):
        model(tokens(1, 25))
    with pytest.raises(CTError, match="generate fewer new tokens"):
        model.generate(tokens(1, 20), max_new_tokens=6, do_sample=False, pad_token_id=0)
    with pytest.raises(CTError, match="exactly one"):
        model()


def test_left_padding_takes_no_positions():
    ids, mask = tokens(1, 30), torch.ones(1, 30, dtype=torch.long)
    mask[0, :6] = 0
    model = tiny()
    expected = model(ids[:, 6:]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 6:], expected, rtol=1e-5, atol=1e-5)


def test_loss_is_the_slow_cross_entropy_in_nats_per_token():
    model, ids = tiny(), tokens(3, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[2, 7:] = -100
    output = model(ids, labels=labels)
    total, count = slow_loss(output.logits, labels)
    assert count == 4 + 8 + 6
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert model(ids, labels=labels, num_items_in_batch=40).loss.item() == pytest.approx(total / 40, rel=1e-5)
    as_tuple = model(ids, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])


def test_the_tied_weight_gets_the_gradients_of_both_uses():
    tied, ids = tiny(), tokens()
    untied = tiny(tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    tied(ids, labels=ids).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        untied(ids, labels=ids).loss.backward()
    embedding, head = untied.model.tok_emb.weight.grad, untied.head.weight.grad
    assert embedding.abs().max() > 0 and head.abs().max() > 0
    torch.testing.assert_close(tied.head.weight.grad, embedding + head, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded_bit_for_bit(tmp_path, tie):
    model, ids = tiny(tie_word_embeddings=tie), tokens()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert ("head.weight" in saved) is (not tie)
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is PhotonicGPTForCausalLM
    assert (again.head.weight is again.model.tok_emb.weight) is tie
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again(ids).logits, model(ids).logits)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)


def trained_on(text, steps=60):
    model = tiny(initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_untying_a_tied_checkpoint_is_the_papers_random_head_bug_and_warns_once(tmp_path):
    text, uniform = torch.arange(20)[None], math.log(SHAPE["vocab_size"])
    good = trained_on(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert good(text, labels=text).loss < 0.5 * uniform
    good.save_pretrained(tmp_path)
    bad = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False).eval()
    assert torch.equal(bad.model.tok_emb.weight, good.model.tok_emb.weight)
    assert bad.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():
        bad.head.weight.mul_(20)
    message = r"the first loss \d+\.\d\d nats per token is above ln\(61\) = 4\.11, worse than uniform"
    with pytest.warns(UserWarning, match=message) as caught:
        first = bad(text, labels=text, num_items_in_batch=10_000).loss
        second = bad(text, labels=text).loss
    assert len(caught) == 1
    assert second > uniform > first, "the mean counts, not the share of a larger batch"


def test_an_untied_head_that_is_good_is_silent():
    text = torch.arange(20)[None]
    good = trained_on(text)
    untied = tiny(tie_word_embeddings=False)
    untied.load_state_dict(good.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untied(text, labels=text)


def test_a_tied_model_is_silent_even_when_worse_than_uniform():
    model, ids = tiny(), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(ids, labels=ids).loss > math.log(SHAPE["vocab_size"])


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = tiny().train(), tokens()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    calls = []
    model.model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 2, "the block must be run again in the backward pass"
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-5, atol=1e-7)


def test_hidden_states_are_returned_on_request():
    model, ids = tiny(), tokens()
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 1 + SHAPE["n_layer"]
    positions = model.model.pos_emb(torch.arange(10))
    assert torch.equal(states[0], model.model.tok_emb(ids) + positions)
    assert torch.equal(model.head(states[-1]), model(ids).logits)
    assert isinstance(model.base_model, PhotonicGPTModel)


def test_peft_lora_attaches_and_trains():
    model, ids = tiny(), tokens()
    base = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv"], task_type="CAUSAL_LM"))
    assert adapted.get_nb_trainable_parameters()[0] == 2 * 2 * (32 + 96)
    assert torch.equal(adapted(ids).logits, base)
    adapted(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    assert model.head.weight.grad is None
