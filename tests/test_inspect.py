"""Inspection against decompositions written out directly."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ctsft.errors import CTError
from ctsft.tune import inspect as inspection
from ctsft.tune.inspect import (
    inspect_model,
    inspect_universal,
    inspection_table,
    plot_spectra,
    spectra_of,
    universal_table,
)


@pytest.fixture
def llama():
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=24,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=70, n_positions=16, n_embd=24, n_layer=2, n_head=2))


def text_of(table):
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    return file.getvalue()


def test_every_matrix_once_with_the_numbers_of_its_svd(llama):
    result = inspect_model(llama, k=5)
    assert [m["name"] for m in result["matrices"]][:2] == ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    assert len(result["matrices"]) == 1 + 2 * 7  # the tied head is the embedding
    for entry in result["matrices"]:
        w = llama.get_submodule(entry["name"]).weight.detach().double()
        s = torch.linalg.svd(w, full_matrices=False).S
        p = s / s.sum()
        assert entry["shape"] == list(w.shape) and entry["k"] == 5
        assert entry["largest"] == pytest.approx(torch.linalg.matrix_norm(w, 2).item())
        assert entry["effective_rank"] == pytest.approx((-(p * p.log()).sum()).exp().item())
        assert entry["stable_rank"] == pytest.approx((w.norm() / s[0]).item() ** 2)
        u, top, vh = torch.linalg.svd(w, full_matrices=False)
        best = u[:, :5] * top[:5] @ vh[:5]
        assert entry["energy_top_k"] == pytest.approx(1 - ((w - best).norm() / w.norm()).item() ** 2)
        assert entry["spectrum"] == pytest.approx((s / s[0]).tolist())  # fewer than 40, so all of them


def test_the_universal_basis_is_that_of_all_rows_together(llama):
    rows = []
    for name, module in llama.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and name != "lm_head":
            rows.append(module.weight.T if name.endswith(("o_proj", "down_proj")) else module.weight)
    squares = torch.linalg.svdvals(torch.cat(rows).detach().double()) ** 2
    share = squares.cumsum(0) / squares.sum()
    result = inspect_model(llama, k=6)
    assert result["d_model"] == 24 and result["universal"]["k"] == 6 and result["universal"]["members"] == len(rows)
    assert result["universal"]["explained"] == pytest.approx(share[5].item(), rel=1e-5)
    assert [k for k, _ in result["universal"]["curve"]] == [1, 2, 4, 8, 16, 24]
    assert [e for _, e in result["universal"]["curve"]] == pytest.approx(
        [share[k - 1].item() for k in (1, 2, 4, 8, 16, 24)], rel=1e-5
    )


def test_the_universal_basis_of_a_folder_is_that_of_the_loaded_model(llama, gpt2, tmp_path):
    for name, model in {"llama": llama, "gpt2": gpt2}.items():
        model.save_pretrained(tmp_path / name)
        told = inspect_universal(str(tmp_path / name), k=6)
        assert told == {
            "model": str(tmp_path / name),
            "d_model": 24,
            "k": 6,
            "universal": inspect_model(model, k=6)["universal"],
        }
        text = text_of(universal_table(told))
        assert f"{told['universal']['members']} matrices of width 24" in text
        assert ["6", f"{told['universal']['explained']:.1%}"] in [line.split() for line in text.splitlines()]
    assert inspect_universal(str(tmp_path / "llama"), k=100)["universal"]["k"] == 24
    with pytest.raises(CTError, match="k=0 must be"):
        inspect_universal(str(tmp_path / "llama"), k=0)


def test_conv1d_is_seen_as_d_out_by_d_in_and_k_stops_at_the_smaller_side(gpt2):
    result = inspect_model(gpt2, k=1000)
    entry = next(m for m in result["matrices"] if m["name"] == "transformer.h.1.attn.c_attn")
    assert entry["shape"] == [72, 24] and entry["k"] == 24 and entry["energy_top_k"] == pytest.approx(1)
    assert result["universal"]["k"] == 24 and result["universal"]["explained"] == pytest.approx(1)
    assert result["parameters"] == sum(p.numel() for p in gpt2.parameters())


def test_a_tall_matrix_is_taken_in_chunks_with_full_accuracy(monkeypatch):
    monkeypatch.setattr(inspection, "ROWS", 50)
    small = torch.logspace(0, -9, 12, dtype=torch.float64)  # the Gram matrix would lose the last ones
    u = torch.linalg.qr(torch.randn(170, 12, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    for w in (u * small @ v, (u * small @ v).T):
        assert inspection.all_singular_values(w).tolist() == pytest.approx(small.tolist(), rel=1e-5)


def test_spectra_of_some_names_with_their_own_k(llama):
    seen = []
    names = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"]
    rows = spectra_of(llama, names, {names[0]: 3, names[1]: 99}, progress=lambda *step: seen.append(step))
    assert [(row["name"], row["k"]) for row in rows] == [(names[1], 12), (names[0], 3)]
    assert seen == [(0, 2, names[1]), (1, 2, names[0])]
    every = {row["name"]: row for row in inspect_model(llama, k=3)["matrices"]}
    assert rows[1] == every[names[0]]


def test_a_long_spectrum_is_sampled_from_first_to_last():
    w = torch.diag(torch.linspace(1, 0.01, 100))
    values = inspection.spectrum_of("w", w, 10)["spectrum"]
    assert len(values) == 40 and values[0] == 1 and values[-1] == pytest.approx(0.01)
    assert values == sorted(values, reverse=True)


def test_a_matrix_of_zeros_has_zeros(llama):
    llama.model.layers[0].mlp.up_proj.weight.data.zero_()
    entry = spectra_of(llama, ["model.layers.0.mlp.up_proj"])[0]
    assert [entry[key] for key in ("effective_rank", "stable_rank", "energy_top_k", "largest")] == [0, 0, 0, 0]
    assert set(entry["spectrum"]) == {0}


def test_what_a_user_gets_wrong_is_told(llama, tmp_path):
    with pytest.raises(CTError, match=r"has no matrix model\.layers\.7\.mlp"):
        spectra_of(llama, ["model.layers.7.mlp"])
    with pytest.raises(CTError, match="k=0 must be"):
        inspect_model(llama, k=0)
    with pytest.raises(CTError, match=r"must end in \.svg or \.png"):
        plot_spectra(inspect_model(llama), tmp_path / "plot.gif")
    llama.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CTError, match="NaN"):
        inspect_model(llama)


def test_table_has_a_row_per_kind_and_fits_80_columns(llama, monkeypatch):
    result = json.loads(json.dumps(inspect_model(llama, k=5)))
    text = text_of(inspection_table(result))
    ranks = [m["effective_rank"] for m in result["matrices"] if m["name"].endswith("gate_proj")]
    assert f"{sum(ranks) / 2:.0f}" in text and "2 of 52 x 24" in text and "mlp.gate_proj" in text
    assert f"{result['universal']['explained']:.1%}" in text and f"{result['parameters']:,}" in text
    assert max(map(len, text.splitlines())) <= 80
    monkeypatch.setattr(inspection, "KINDS", 3)
    assert "5 more kinds" in text_of(inspection_table(result))


def test_experts_are_one_kind():
    names = [f"model.layers.{i}.mlp.experts.{e}.down_proj" for i in (0, 11) for e in range(3)]
    result = {"matrices": [{"name": name, "shape": [4, 3]} for name in names]}
    groups = inspection.by_kind(result)
    assert list(groups) == [("mlp.experts.*.down_proj", (4, 3))]
    assert [block for block, _ in groups["mlp.experts.*.down_proj", (4, 3)]] == [0, 0, 0, 11, 11, 11]


def test_plot_as_svg_and_png(gpt2, tmp_path):
    result = inspect_model(gpt2, k=5)
    plot_spectra(result, tmp_path / "new" / "spectra.svg")
    plot_spectra(result, tmp_path / "spectra.PNG")
    svg = (tmp_path / "new" / "spectra.svg").read_text()
    assert "attn.c_attn  72 x 24" in svg and f"K = 5: {result['universal']['explained']:.0%}" in svg
    assert (tmp_path / "spectra.PNG").read_bytes().startswith(b"\x89PNG")
