import pytest
import torch
from torch.testing import assert_close

from ctsft.adapter.learned import Learned
from ctsft.adapter.store import layers_of
from ctsft.errors import CTError
from ctsft.lab import run as lab
from ctsft.lab import siblings, sources
from ctsft.lab.methods import equip
from ctsft.lab.siblings import LEARNINGS, deciding, directions, hosvd, merge_mean, of_mean, pairs
from ctsft.lab.spec import Spec, replaced
from ctsft.models.load import load_model
from ctsft.models.photonic import PhotonicGPTConfig, PhotonicGPTForCausalLM
from ctsft.spectral.weights import clean_name, matrix


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """A PhotonicGPT of 2 blocks and width 16, and three texts, the last of which was held out."""
    folder = tmp_path_factory.mktemp("siblings")
    torch.manual_seed(0)
    model = PhotonicGPTForCausalLM(PhotonicGPTConfig(n_embd=16, n_layer=2, n_head=2, eos_token_id=0, pad_token_id=0))
    model.save_pretrained(folder / "small")
    load_model("photonic").tokenizer.save_pretrained(folder / "small")
    (folder / "texts").mkdir()
    for name, power in (("squares", 2), ("cubes", 3), ("fourth", 4)):
        lines = (f"the {name} of {i} is {i**power}" for i in range(2000))
        (folder / "texts" / f"{name}.txt").write_text("\n\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTSFT_MODELS", str(folder))
        patch.setenv("CTSFT_TEXTS", str(folder / "texts"))
        patch.setenv("CTSFT_CACHE", str(folder / "cache"))
        for cached in (sources.base, sources.weights_of, sources.streams):
            cached.cache_clear()
        lab.FIRST_HELDOUT.clear()
        yield folder
    for cached in (sources.base, sources.weights_of, sources.streams):
        cached.cache_clear()


def spec(**changes):
    given = {"model": "small", "text": "fourth", "siblings": ("squares", "cubes"), "basis": "learned", "k": 4}
    given |= {"learned_steps": 8, "targets": "blocks", "batches": "fresh", "steps": 2, "length": 12, "lr": 0.01}
    return Spec(**given | changes)


def deltas(rank=3, count=2, shape=(8, 6)):
    torch.manual_seed(0)
    return [torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) for _ in range(count)]


def test_all_pairs_of_a_sibling_are_its_change(monkeypatch):
    monkeypatch.setattr(siblings, "LORA_RANK", 3)
    found = deltas()
    u, vh, a = pairs(found, 6)
    for i, w in enumerate(found):
        assert_close(u @ torch.diag(a[i]) @ vh, w)
    first = pairs(found, 2)
    assert_close(first[0], u[:, :2])
    s = [torch.linalg.svdvals(w)[0] for w in found]
    assert_close(first[2], torch.diag(torch.stack(s)))
    with pytest.raises(CTError, match="5 pairs cannot be shared by 2 siblings"):
        pairs(found, 5)
    with pytest.raises(CTError, match="8 pairs cannot be shared"):
        pairs(found, 8)


def test_pairs_of_the_mean_are_its_best_approximation():
    found = deltas()
    mean = (found[0] + found[1]) / 2
    u, vh, a = of_mean(found, 2)
    s = torch.linalg.svdvals(mean)
    assert_close(a.mean(0), s[:2])
    assert float((mean - u @ torch.diag(a.mean(0)) @ vh).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-4)


def test_hosvd_spans_all_that_siblings_have_in_common():
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(8, 3))[0], torch.linalg.qr(torch.randn(6, 3))[0].T
    found = [left @ torch.randn(3, 3) @ right for _ in range(2)]
    u, vh, a = hosvd(found, 3)
    for i, w in enumerate(found):
        assert_close(u @ u.T @ w @ vh.T @ vh, w)
        assert_close(a[i], (u.T @ w @ vh.T).diagonal())


@pytest.mark.parametrize("learning", LEARNINGS)
def test_every_way_gives_unit_directions_once(learning, monkeypatch):
    wanted = spec(learning=learning)
    folder, cost = directions(wanted)
    learned = Learned.read(folder)
    assert len(learned.u) == 8 and {len(a) for a in learned.siblings.values()} == {2}
    for name in learned.u:
        assert_close(learned.u[name].norm(dim=0), torch.ones(4))
        assert_close(learned.vh[name].norm(dim=1), torch.ones(4))
    assert cost["tokens"] == 8 * 2 * 11 and cost["bytes"] > 8 * 4 * 16 * 2 * 4 and cost["seconds"] >= 0
    monkeypatch.setitem(LEARNINGS, learning, None)
    assert directions(replaced(wanted, seed=3, lr=0.1, text="squares", steps=7, start="mean")) == (folder, cost)


def test_what_decides_the_directions():
    wanted = spec()
    same = {"seed": 3, "lr": 0.1, "text": "squares", "steps": 7, "start": "mean", "learned_k": 4, "method": "lora"}
    other = {"siblings": ("squares",), "learning": "pairs", "learned_steps": 9, "k": 5, "length": 13, "learned_k": 5}
    other |= {"learned_batch": 1, "learned_pace": 2.0}
    for name, value in same.items():
        assert deciding(replaced(wanted, **{name: value})) == deciding(wanted), name
    for name, value in other.items():
        assert deciding(replaced(wanted, **{name: value})) != deciding(wanted), name


@pytest.mark.parametrize("learning", ["joint", "mean"])
def test_siblings_share_the_windows_of_a_step(learning):
    """Eight steps of one window, of two siblings in turn: half of what a window of each gives."""
    assert directions(spec(learning=learning, learned_batch=1))[1]["tokens"] == 8 * 11
    assert directions(spec(learning=learning, learned_batch=2))[1]["tokens"] == 8 * 2 * 11


def test_fixed_directions_stay_as_they_are_drawn():
    few, more = (Learned.read(directions(spec(learning="fixed", learned_steps=n))[0]) for n in (8, 9))
    faster = Learned.read(directions(spec(learning="fixed", learned_pace=3.0))[0])
    for name, u in few.u.items():
        for other in (more, faster):  # the most used come first, so the order may differ
            same = (u.T @ other.u[name]).abs().sort(1, descending=True).values
            assert_close(same[:, 0], torch.ones(4))
    sizes = [sum(float(a.norm()) for a in found.siblings.values()) for found in (few, faster)]
    assert sizes[1] > 2 * sizes[0] > 0


def test_components_train_on_top_of_the_mean():
    few = spec(method="components", start="mean", k=1, learned_k=4)
    found, mean = lab.run(few), lab.run(spec(start="mean", steps=0))
    assert found.trained == 1 and found.heldout[0][1] == pytest.approx(mean.heldout[0][1], abs=1e-5)
    assert found.heldout[0][1] != found.heldout[-1][1]
    zero = lab.run(replaced(few, start="zero"))
    assert zero.heldout[0] == lab.run(spec(method="lora", basis="weight", siblings=())).heldout[0]


def test_the_directions_that_siblings_use_most_remain():
    wanted = spec(learned_k=4, k=2, allocation="energy", start="mean")
    learned = Learned.read(directions(wanted)[0])
    energy = {(n, i): float((a[:, i] ** 2).mean()) for n, a in learned.siblings.items() for i in range(4)}
    kept = {(n, 0) for n in learned.u}
    for one in sorted(energy, key=energy.get, reverse=True):
        if len(kept) < 2 * len(learned.u):
            kept.add(one)
    equipped = equip(sources.fresh_model(wanted), wanted, [], directions(wanted)[0])
    ks = dict(zip(map(clean_name, equipped.names), equipped.ks, strict=True))
    assert {(n, i) for n, k in ks.items() for i in range(k)} == kept and len(set(ks.values())) > 1
    for k, match in ((9, "fewer learned directions; learn more"), (2, "it needs basis='learned'")):
        place = directions(wanted)[0] if k == 9 else None
        with pytest.raises(CTError, match=match):
            equip(
                sources.fresh_model(wanted), replaced(wanted, k=k, basis="random" if k == 2 else "learned"), [], place
            )


def test_another_text_under_the_same_name_is_learned_anew(small):
    folder, _ = directions(spec())
    path = small / "texts" / "cubes.txt"
    text = path.read_text()
    path.write_text(text + "\n\nmore")
    assert directions(spec())[0] != folder
    path.write_text(text)
    assert directions(spec())[0] == folder


def test_siblings_have_windows_and_random_factors_of_their_own():
    what = deciding(spec(siblings=("squares", "squares"), learning="pairs"))
    one, two = (next(siblings.feed(what, i, 3))["input_ids"] for i in range(2))
    assert one.shape == (3, 12) and not torch.equal(one, two)
    first, second = (siblings.lora(what, i) for i in range(2))
    spans = [torch.linalg.svd(next(iter(w.values())), full_matrices=False)[2][0] for w in (first, second)]
    assert abs(float(spans[0] @ spans[1])) < 0.9


def test_a_run_begins_at_the_mean_and_says_what_it_cost():
    zero, mean = (lab.run(spec(start=start, learning="mean")) for start in ("zero", "mean"))
    bare = lab.run(spec(method="lora", basis="weight", siblings=()))
    assert zero.heldout[0] == bare.heldout[0] != mean.heldout[0]
    assert zero.measures["learned"] == mean.measures["learned"] == directions(spec(learning="mean"))[1]
    assert "learned" not in bare.measures
    assert zero.trained == 8 * 4 and zero.adapter_bytes < 8 * 4 * 16


def test_a_method_without_directions_begins_at_the_same_mean():
    """LoRA on the merged mean is, before training, what amplitudes at the mean are."""
    amplitudes = lab.run(spec(start="mean", learning="mean", steps=0))
    lora = lab.run(spec(start="mean", learning="mean", steps=0, method="lora", basis="weight", learned_k=4))
    assert amplitudes.heldout[0][1] == pytest.approx(lora.heldout[0][1], abs=1e-5)
    bare, merged = sources.fresh_model(spec()), sources.fresh_model(spec())
    folder, _ = directions(spec(learning="mean"))
    merge_mean(merged, folder)
    learned = Learned.read(folder)
    before = {clean_name(n): m for n, m in bare.named_modules()}
    after = {clean_name(n): m for n, m in merged.named_modules()}
    for name, u in learned.u.items():
        dense = sum(u[:, k : k + 1] * learned.siblings[name][:, k].mean() * learned.vh[name][k] for k in range(4))
        assert_close(matrix(after[name]) - matrix(before[name]), dense)


def test_strength_and_shuffled_sides():
    folder, cost = directions(spec(learning="mean"))
    plain = Learned.read(folder)
    strong_folder, same_cost = directions(spec(learning="mean", strength=3.0))
    strong, shuffled = (Learned.read(f) for f in (strong_folder, directions(spec(learning="mean", shuffled=True))[0]))
    assert same_cost == cost
    for name, u in plain.u.items():
        assert_close(strong.siblings[name], 3 * plain.siblings[name])
        assert_close(strong.u[name], u)
        assert_close(shuffled.vh[name], plain.vh[name])
        for k in range(4):
            assert_close(shuffled.u[name][:, k], u[:, (k - 1) % 4])
    model = equip(sources.fresh_model(spec()), spec(start="mean"), [], strong_folder).model
    for name, layer in layers_of(model).items():
        assert_close(layer.coefficients("default"), strong.siblings[name].mean(0))


def test_what_cannot_be_learned_is_one_sentence(small):
    with pytest.raises(CTError, match="name their texts in the arm's `siblings`"):
        lab.run(spec(siblings=()))
    with pytest.raises(CTError, match="the text nowhere is not in"):
        directions(spec(siblings=("squares", "nowhere")))
    assert sources.absent(spec(siblings=("squares", "nowhere"))).startswith("the text nowhere is not in")
    assert not sources.absent(spec())
