import json
import subprocess
import sys

import pytest
import torch

from ctsft.errors import CTError
from ctsft.lab import run as lab
from ctsft.lab import sources
from ctsft.lab.metrics import METRICS, value
from ctsft.lab.records import Records
from ctsft.lab.rules import RULES
from ctsft.lab.spec import Spec, replaced
from ctsft.models.load import load_model, resolve
from ctsft.models.photonic import PhotonicGPTConfig, PhotonicGPTForCausalLM
from ctsft.spectral.weights import fingerprint

METHODS = ("diagonal", "core", "scores", "gains", "full", "lora", "lora-fa", "lora-xs", "vera", "ia3", "norms")


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """A PhotonicGPT of 4 blocks and width 16 in the folder of models, under the name `small`; and a text."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = PhotonicGPTForCausalLM(PhotonicGPTConfig(n_embd=16, n_layer=4, n_head=2, eos_token_id=0, pad_token_id=0))
    model.save_pretrained(folder / "small")
    load_model("photonic").tokenizer.save_pretrained(folder / "small")
    (folder / "texts").mkdir()
    (folder / "texts" / "words.txt").write_text("\n\n".join(f"line {i} has the number {i * i}" for i in range(4000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTSFT_MODELS", str(folder))
        lab.FIRST_HELDOUT.clear()
        sources.base.cache_clear()
        sources.streams.cache_clear()
        yield folder
    sources.base.cache_clear()


def spec(**changes):
    return Spec(**{"model": "small", "text": "words", "k": 4, "steps": 4, "length": 12, "lr": 0.01} | changes)


def numbers(record):
    return record.model_dump(exclude={"seconds", "probe_seconds"})


def test_a_record_tells_all_and_is_the_same_every_time():
    wanted = spec(evaluate=(2,))
    record = lab.run(wanted)
    assert record.spec == wanted
    assert record.trained == 17 * 4 and record.adapted.matrices == 17
    assert record.counted == 4 * sum(a + b for a, b in record.adapted.shapes)
    assert len(record.train_loss) == 5 and [step for step, _ in record.heldout] == [0, 2, 4]
    assert record.tokens == 4 * 2 * 12 and record.flops > 0 and record.seconds > 0
    assert record.adapter_bytes > 17 * 4 * 4 and record.memory_bytes > 17 * 4 * 4
    assert [update for update, _ in record.probes["cosine"]] == [2, 3, 4]
    assert value(record, "loss_drop") > 0
    assert numbers(lab.run(wanted)) == numbers(record)


def test_a_fresh_process_that_imports_no_more_can_run():
    """As a worker does: nothing else has told peft of our method there."""
    code = "from ctsft.lab.run import run\nfrom ctsft.lab.spec import Spec\nprint(run(Spec(**%r)).trained)"
    words = [sys.executable, "-c", code % {"model": "small", "text": "words", "k": 4, "steps": 1, "length": 12}]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == f"{17 * 4}\n"


def test_a_record_names_the_weights_that_it_is_of(small):
    record = lab.run(spec(steps=1))
    assert record.weights == fingerprint(sources.base("small").model.named_parameters())
    mine = replaced(spec(steps=1), model=str(small / "small"), weights=record.weights)
    assert lab.run(mine).train_loss == record.train_loss
    with pytest.raises(CTError, match="small has other weights than when its runs began"):
        lab.run(replaced(mine, weights="xxh3-1"))


def test_one_s_own_model_and_text(small, tmp_path, monkeypatch):
    monkeypatch.chdir(small)
    text = small / "texts" / "words.txt"
    found = sources.own("small", "texts/words.txt", Spec())
    assert (found.model, found.text, found.tied) == (str(small / "small"), str(text), True)
    assert (found.narrowest, found.width, found.lacks) == (16, 16, ())
    assert found.weights == sources.weights_of(str(small / "small"))
    assert lab.run(replaced(found.placed(spec(steps=1)))).train_loss == lab.run(spec(steps=1)).train_loss
    alone = sources.own(None, str(text), spec())
    assert (alone.model, alone.weights, alone.corpus) == ("small", "", found.corpus)
    assert sources.own("small", None, spec()).text == "words"
    (tmp_path / "more.txt").write_text(text.read_text() + "\n\nmore")
    assert sources.own("small", str(tmp_path / "more.txt"), Spec()).corpus != found.corpus
    with pytest.raises(CTError, match="There is no model 'nowhere'"):
        sources.own("nowhere", None, Spec())
    with pytest.raises(CTError, match=r"There is no data 'nowhere\.txt'"):
        sources.own("small", "nowhere.txt", Spec())


def test_the_first_loss_is_the_bare_model_s_own():
    wanted = spec()
    train, _ = sources.streams("small", "words")
    ids = sources.windows(train, wanted, "batch", 0)
    with torch.no_grad():
        bare = sources.base("small").model(input_ids=ids, labels=ids).loss.item()
    for method in METHODS:
        record = lab.run(replaced(wanted, method=method, steps=1))
        assert record.train_loss[0] == pytest.approx(bare, abs=2e-6), method


def test_one_batch_or_new_text():
    fixed, fresh = sources.batches(spec()), sources.batches(spec(batches="fresh"))
    one, two = next(fixed), next(fixed)
    assert torch.equal(one, two)
    a, b = next(fresh), next(fresh)
    assert torch.equal(a, one) and not torch.equal(a, b)
    assert not torch.equal(next(sources.batches(spec(seed=1))), one)
    record = lab.run(spec(batches="fresh"))
    assert len(record.train_loss) == 4 and value(record, "monotonic_share") is None


def test_held_out_text_is_never_trained_on_and_the_same_for_all():
    held = sources.heldout_windows(spec())
    assert held.shape == (16, 12)
    assert torch.equal(held, sources.heldout_windows(spec(seed=3, k=2)))
    train, _ = sources.streams("small", "words")
    seen = {tuple(train[i : i + 12].tolist()) for i in range(len(train) - 12)}
    assert not seen & {tuple(row.tolist()) for row in held}


def test_more_held_out_windows_are_told_part_by_part():
    plain, more = lab.run(spec()), lab.run(spec(heldout_windows=126))
    assert more.train_loss == plain.train_loss and "heldout_parts" not in plain.measures
    parts = more.measures["heldout_parts"]
    for part, (_, loss) in zip((parts["first"], parts["last"]), more.heldout, strict=True):
        assert len(part) == 63 and sum(part) / 63 == pytest.approx(loss, abs=2e-6)
    assert [step for step, _ in more.heldout] == [0, 4] and more.heldout[0] != plain.heldout[0]
    replayed = lab.run(spec(heldout_windows=126, method="full", k=0, targets="last2"))
    assert replayed.heldout[0] == more.heldout[0]


def test_k_changes_in_mid_run():
    up, down = lab.run(spec(k=2, schedule="2>4@1/2")), lab.run(spec(k=4, schedule="4>2@1/2"))
    assert (up.trained, down.trained) == (17 * 4, 17 * 2)
    assert value(up, "k_steps") == value(down, "k_steps") == 12
    whole = lab.run(spec(k=2))
    assert up.train_loss[:3] == whole.train_loss[:3] != up.train_loss[-3:]
    carried = lab.run(spec(k=2, schedule="2>4@1/2", carry=True))
    assert carried.train_loss[:3] == up.train_loss[:3] and carried.train_loss != up.train_loss


def test_a_refreshed_run_trains_as_much_and_weighs_all_that_it_has_folded():
    fixed, refreshed = (lab.run(spec(basis="random", refreshes=n, batches="fresh", steps=6)) for n in (0, 2))
    assert refreshed.trained == fixed.trained and refreshed.adapter_bytes == 3 * fixed.adapter_bytes
    a, b = fixed.train_loss, refreshed.train_loss
    # a refresh before the steps 2 and 4 changes no loss by itself; the first loss along other directions is the next
    assert a[:3] == b[:3] and a[3] != b[3]
    few = lab.run(spec(allocation="one_down", targets="blocks"))
    assert few.adapted.matrices == 1 and few.trained == 16 and few.counted == 16 * sum(few.adapted.shapes[0])


def test_an_untied_head_is_random_and_worse():
    tied, untied = lab.run(spec()), lab.run(spec(tied=False))
    model = sources.fresh_model(spec(tied=False))
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    bare = sources.base("small").model
    assert torch.equal(model.get_input_embeddings().weight, bare.get_input_embeddings().weight)
    assert torch.equal(model.model.blocks[0].mlp.up.weight, bare.model.blocks[0].mlp.up.weight)
    assert tied.train_loss[0] != untied.train_loss[0]
    assert untied.train_loss[0] != lab.run(spec(tied=False, seed=1)).train_loss[0]


@pytest.mark.parametrize("method", ["scores", "full"])
def test_a_replayed_prefix_gives_the_numbers_of_the_whole_model(method, monkeypatch):
    wanted = spec(targets="last2", method=method, basis="universal" if method == "scores" else "weight")
    replayed = lab.run(wanted)
    monkeypatch.setattr(lab, "replay_prefix", lambda *_: None)
    monkeypatch.setattr(lab, "FLOPS", {})
    monkeypatch.setattr(lab, "FIRST_HELDOUT", {})
    whole = lab.run(wanted)
    assert replayed.train_loss == pytest.approx(whole.train_loss, abs=2e-6)
    assert [loss for _, loss in replayed.heldout] == pytest.approx([loss for _, loss in whole.heldout], abs=2e-6)
    assert replayed.flops < whole.flops
    if method == "scores":
        assert 0 < replayed.measures["variance_explained"] < 1


def test_replacing_weights_by_few_terms_changes_the_first_loss():
    same = lab.run(spec(targets="last2", method="scores", basis="universal"))
    replaced_ = lab.run(spec(targets="last2", method="scores", basis="universal", universal_mode="replace"))
    assert same.train_loss[0] != replaced_.train_loss[0]


def test_probes_are_recorded_and_change_nothing():
    names = ("coverage", "diversity", "gradient_rank", "gradient_snr")
    plain, probed = lab.run(spec()), lab.run(spec(probes=names, probe_every=2))
    assert probed.train_loss == plain.train_loss and probed.heldout == plain.heldout
    for metric in (
        "coverage_diagonal",
        "coverage_diagonal_null",
        "true_effective_rank",
        "snr_top",
        "diversity",
    ):
        assert value(probed, metric) is not None, metric
    assert {METRICS[name].kind for name in probed.probes} == {"series"}  # whatever a probe writes has its name
    assert probed.probe_seconds.keys() >= {"every step"}


def test_a_run_of_no_steps_measures_only():
    record = lab.run(spec(steps=0, probes=("coverage",)))
    assert len(record.train_loss) == len(record.heldout) == 1
    assert 0 < value(record, "coverage_diagonal") < value(record, "coverage_two_sided") < 1


def test_ablation_keeps_all_or_nothing():
    record = lab.run(spec(ablate=True))
    ablation = record.measures["ablation"]
    assert set(ablation) == set(lab.ABLATIONS)
    for order in lab.ABLATIONS:
        assert ablation[order]["4"] == pytest.approx(record.train_loss[-1], abs=2e-6)
        assert ablation[order]["0"] == pytest.approx(record.train_loss[0], abs=2e-6)


def test_a_rate_that_blows_up_is_recorded_as_diverged(tmp_path):
    record = lab.run(spec(method="full", lr=1e20, batches="fresh"))
    assert record.diverged
    records = Records(tmp_path)
    records.add(record)
    assert value(records[spec(method="full", lr=1e20, batches="fresh").key], "heldout_loss") is None


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_gives_the_rate(rule):
    """The run is that of the same rate given as a number, and the record tells it."""
    made = spec(rule=rule, batches="fresh", decay="linear")
    found = lab.run(made)
    rate = value(found, "rate")
    given = lab.run(replaced(made, rule="", lr=rate))
    assert found.train_loss == given.train_loss and found.heldout == given.heldout
    assert found.measures["rate"] == rate and "rate" not in given.measures and value(given, "rate") == rate


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    assert sources.absent(spec()) == ""
    assert "the model nothing is not in" in sources.absent(spec(model="nothing"))
    assert "the text nothing is not in" in sources.absent(spec(text="nothing"))
    with pytest.raises(CTError, match="too few for windows of 5000"):
        sources.windows(torch.arange(100), spec(length=5000), "batch", 0)


def test_the_laboratory_s_own_model_lies_in_its_package():
    assert sources.absent(Spec()) == "" and resolve("photonic").is_dir()
    assert json.loads((resolve("photonic") / "config.json").read_text())["vocab_size"] == 15_007


def test_the_first_held_out_loss_is_kept_only_for_the_untouched_model(monkeypatch):
    monkeypatch.setattr(lab, "FIRST_HELDOUT", {})
    scores = spec(targets="last2", method="scores", basis="universal")
    fresh = {m: lab.run(replaced(scores, universal_mode=m)).heldout[0][1] for m in ("residual", "replace")}
    kept = {m: lab.run(replaced(scores, universal_mode=m)).heldout[0][1] for m in ("replace", "residual")}
    assert fresh == kept and fresh["residual"] != fresh["replace"]
    assert len(lab.FIRST_HELDOUT) == 1
    one, other = (lab.run(spec(tied=False, seed=seed)).heldout[0][1] for seed in (0, 1))
    assert one != other
