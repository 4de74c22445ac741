"""The benchmarks run, and what they count is right. No time is asserted: times drift."""

import adapter_file
import common
import methods
import per_sample
import pytest
import run
import saved_activations
import scaling
import torch
from torch import nn

import tiny
from ctsft.adapter import bases
from ctsft.choices import PROBES

TINY = ["--model", "tiny", "--layers", "1", "--k", "8", "--tokens", "32", "--repeats", "1"]
MATRICES = 7  # of one block
SHORT = {name: [TINY] for name in run.SCRIPTS}
SHORT |= {"adapter_file": [[*TINY, "--tinylora"]], "scaling": [["--largest", "16", "--repeats", "1"]]}
SHORT |= {"startup": [["--shape", "tiny", "--k", "8"]]}


def options(*more):
    return common.parse(common.parser("x"), [*TINY, *more])


def rows(text):
    """The cells of every table row, by their first."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """RESULTS.md of the tiny run, and what `run` returned."""
    path = tmp_path_factory.mktemp("results") / "RESULTS.md"
    with pytest.MonkeyPatch.context() as patch:
        folder = tiny.save_model(tmp_path_factory.mktemp("model") / "llama")
        patch.setattr(run, "SCRIPTS", SHORT | {"universal": [["--model", folder, "--repeats", "1"]]})
        patch.setattr(scaling, "AT_LEAST", 0.0)
        patch.setattr(bases, "WORTH_KEEPING", 0.0)
        code = run.main(["--out", str(path)])
    return path, code


def test_every_section_is_there_with_its_device(results):
    path, code = results
    found = run.read(path)
    assert code == 0 and list(found) == [f"{name} cpu" for name in run.SCRIPTS]
    for name, text in found.items():
        assert text.startswith(f"## {name.split()[0].replace('_', ' ')}, cpu")
        assert "cpu: " in text and "torch" in text and "\n| ---" in text
    assert (path.parent / "figures" / "scaling-cpu-float32.svg").stat().st_size < 60_000


def test_trained_numbers_and_missing_peers_in_the_tables(results):
    path, _ = results
    found = run.read(path)
    steps = rows(found["step_time cpu"])
    assert steps["frozen"][0] == "0" and steps["diagonal K=8"][0] == str(8 * MATRICES)
    assert steps["core K=8"][0] == str(64 * MATRICES)
    others = rows(found["methods cpu"])
    assert others["diagonal K=8"][0] == others["TinyLoRA r=2, u=8"][0] == others["FourierFT n=8"][0] == "8"
    assert [n for n, cells in others.items() if cells[0] == "not there"] == [
        "SVFT plain",
        "SVFT banded, 1 off",
        "SVFT rank 8",
        "LoRA-XS r=2",
        "EigenTune diagonal r=8",
    ]
    assert "does not run" not in found["per_sample cpu"]
    probes = rows(found["probes cpu"])
    assert [name for name, cells in probes.items() if cells[1] == "-"] == [
        "a training step",
        "none: norms and cosines alone",
        "diversity",
    ]
    assert {*PROBES, "all four in one pass"} <= set(probes)


def test_our_files_are_within_the_limit(results):
    found = rows(run.read(results[0])["adapter_file cpu"])
    assert {"LoRA r=8", "VeRA r=8, with projections", "TinyLoRA r=2, u=8, without projections"} <= set(found)
    for form, numbers in {"diagonal": 8, "core": 64}.items():
        *_, trained, size, rest, within = found[f"{form} K=8"]  # the last row, float16
        assert int(trained) == numbers * MATRICES and within == "yes"
        assert int(size.replace(",", "")) == 2 * int(trained) + int(rest)


def test_only_some_sections_are_run_again_and_a_failure_is_told(results, tmp_path, monkeypatch):
    path, before = tmp_path / "RESULTS.md", run.read(results[0])
    path.write_text(results[0].read_text())

    def broken(argv):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(run, "SCRIPTS", SHORT)
    monkeypatch.setattr(adapter_file, "main", broken)
    assert run.main(["--out", str(path), "--only", "adapter_file"]) == 1
    after = run.read(path)
    assert "**Failed**: RuntimeError: no such luck" in after.pop("adapter_file cpu")
    before.pop("adapter_file cpu")
    assert after == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_activations_stay_within_the_limit(dtype):
    args = options("--dtype", dtype)
    _, found = saved_activations.measure(args)
    extra = {n: (k.numbers - found["frozen"].numbers) / MATRICES / (args.tokens * args.k) for n, k in found.items()}
    copies = {n: k.copies - found["frozen"].copies for n, k in found.items()}
    for name in ("diagonal K=8", "core K=8", "scores K=8", "universal diagonal K=8"):
        assert 0 < extra[name] <= 2 and copies[name] == 0
    assert extra["LoRA r=8"] > 2
    if dtype == "bfloat16":
        assert copies["LoRA r=8, float32 adapter"] == MATRICES


def test_what_a_function_hides_in_its_context_is_found():
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mine = {"squared": x * x}
            return x.sum()

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.mine["squared"]

    x = torch.tensor([2.0, 3.0], requires_grad=True)
    assert [t.tolist() for t in saved_activations.hidden(Hiding.apply(x) * 2)] == [[4.0, 9.0]]


def test_arms_share_the_base_and_extra_bytes_are_those_of_the_adapter():
    args = options()
    base = common.load(args)
    model = common.adapt(base, common.ours(args))
    shapes = [m.weight.shape for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert len(shapes) == MATRICES
    assert common.extra_bytes(model, base) == sum(4 * 8 * (d_out + d_in + 1) for d_out, d_in in shapes)
    assert common.extra_bytes(common.twin(base), base) == 0


def test_rounds_are_interleaved_and_rotate():
    order = []
    times = common.interleaved({n: lambda n=n: order.append(n) for n in "abc"}, options("--repeats", "3"), warm_up=0)
    assert "".join(order[3:]) == "abcbcacab"
    assert {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_per_sample_gradients_agree_with_the_loop():
    args = options("--tokens", "24")
    base = common.load(args, inputs=False)
    model, batch = common.adapt(base, common.ours(args)), common.batch_for(base, 24, rows=3)
    for piece in common.trained(model):
        piece.data.normal_()
    for way in (per_sample.by_look, per_sample.by_vmap):
        for found, exact in zip(way(model, batch), per_sample.by_loop(model, batch), strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)


def test_the_stand_in_for_torch_sparse_is_a_sparse_matrix():
    i = torch.arange(4)
    a = methods.SparseTensor(i, i, torch.rand(4))
    b = methods.SparseTensor(torch.tensor([0, 0, 2]), torch.tensor([1, 3, 2]), torch.rand(3))
    dense = [torch.zeros(4, 4).index_put((m.row, m.col), m.value) for m in (a, b)]
    x = torch.rand(4, 5)
    torch.testing.assert_close((a + b) @ x, (dense[0] + dense[1]) @ x)
    torch.testing.assert_close((a + a) @ x, 2 * dense[0] @ x)
