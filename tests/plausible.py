"""A laboratory with every kind of figure, and plausible records of its runs, for the figures and the page."""

import math
import random

from ctsft.lab.experiments import Experiment, Laboratory, arms
from ctsft.lab.rates import due
from ctsft.lab.records import Record

SHAPES = [[768, 256], [256, 256], [1024, 256], [256, 1024]] * 8 + [[15007, 256]]
KINDS = ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
NAMES = [f"blocks.{i}.{kind}" for i in range(8) for kind in KINDS] + ["tok_emb"]


def experiment(name, title, **rest):
    sentences = {"question": f"What does {title} say?", "source": "ours" if name == "arena" else name}
    return {"name": name, "title": title} | sentences | rest


def a_laboratory(**changes):
    """Experiments of every kind of figure; `changes` replace whole experiments."""
    ks = [2, 4, 8, 16, 32, 64]
    paper = [(2, 9.5846), (4, 9.5155), (8, 9.2927), (16, 8.98), (32, 8.4622)]
    loss_columns = {
        "K": "k",
        "trained": "trained",
        "final loss, nats per token": "train_loss",
        "held-out": "heldout_loss",
    }
    experiments = [
        experiment(
            "81",
            "Fixed K against K that moves",
            base={"k": ks},
            arms=[{"name": "fixed"}, {"name": "moving", "k": 8, "schedule": ["8>16@1/2", "2>8@1/2"]}],
            notes=["The paper's count of trained numbers is LoRA's."],
            tables=[
                {
                    "title": "Fixed K",
                    "columns": loss_columns,
                    "where": {"name": "fixed"},
                    "paper": [{"K": k, "final loss, nats per token": loss, "trained": 48031 * k} for k, loss in paper],
                }
            ],
            figures=[
                {
                    "title": "Final loss against K",
                    "x": "k",
                    "y": "train_loss",
                    "log_x": True,
                    "paper": paper,
                    "where": {"name": "fixed"},
                },
                {
                    "title": "Training with a fixed K",
                    "x": "step",
                    "y": "train_loss",
                    "by": "k",
                    "where": {"name": "fixed"},
                },
                {
                    "title": "K that moves",
                    "x": "step",
                    "y": "train_loss",
                    "by": "schedule",
                    "where": {"schedule": ["8>16@1/2", "2>8@1/2"]},
                },
            ],
        ),
        experiment(
            "82",
            "Equal budgets, and where the curves cross",
            arms=[{"name": "budget", "k": [2, 16, 32], "steps": [10, 20, 40, 80]}],
            figures=[{"title": "Loss by budget", "x": "param_steps", "y": "train_loss", "by": "k", "log_x": True}],
        ),
        experiment(
            "85",
            "Are directions 33 to 64 noise?",
            arms=[{"name": "ablated", "k": 64, "ablate": True}],
            figures=[{"title": "Loss by directions kept", "x": "kept", "y": "ablation", "log_x": True}],
        ),
        experiment(
            "86",
            "The rank of the true gradient over training",
            arms=[{"name": "probe", "k": 32, "probes": ["gradient_rank"]}],
            figures=[
                {"title": "Effective rank by matrix", "x": "step", "y": "true_effective_rank_by_matrix"},
                {"title": "Its mean", "x": "step", "y": "true_effective_rank", "paper": [(0, 5), (20, 19), (40, 9)]},
            ],
        ),
        experiment(
            "87",
            "What share of the gradient K directions cover",
            arms=[{"name": "cover", "k": ks, "weight_from": ["top", "bottom", "random"], "probes": ["coverage"]}],
            figures=[
                {
                    "title": "Coverage against its law",
                    "x": "k",
                    "y": "coverage_diagonal",
                    "by": "weight_from",
                    "law": "coverage",
                }
            ],
        ),
        experiment(
            "78",
            "The K frontier of amplitude-only tuning",
            base={"method": "scores", "basis": "universal", "targets": "last2"},
            arms=[
                {"name": "scores", "k": [4, 8, 16, 32, 64], "universal_mode": ["residual", "replace"]},
                {"name": "full", "method": "full", "k": 0, "basis": "weight", "targets": "last2+head"},
            ],
            figures=[
                {
                    "title": "The regimes",
                    "x": "k",
                    "y": "fraction_of_full_sft",
                    "by": "universal_mode",
                    "log_x": True,
                    "law": "one,zero,kmin",
                    "where": {"method": "scores"},
                    "paper": [(4, -0.35), (8, -0.125), (16, 0.008), (32, 0.456), (64, 1.077)],
                }
            ],
        ),
        experiment(
            "arena",
            "Every method at equal cost",
            arms=[
                {"name": "ours", "method": ["diagonal", "core"], "k": 64},
                {"name": "LoRA r8", "method": "lora", "k": 8},
                {"name": "norms only", "method": "norms", "k": 0},
            ],
            figures=[{"title": "Share of LoRA r8's drop", "x": "method", "y": "fraction_of_lora_r8"}],
        ),
        experiment("89", "Are more directions more diverse?", arms=[{"name": "none", "k": 32, "steps": 21}]),
    ]
    return Laboratory(
        base={"steps": 40},
        rates=dict.fromkeys(("diagonal", "core", "scores", "full", "lora", "norms"), 0.01),
        profiles={
            "full": {"seeds": 5, "tune_seeds": 1, "rates": 3},
            "quick": {"seeds": 2, "tune_seeds": 1, "rates": 3},
        },
        experiments={e["name"]: e for e in experiments} | changes,
    )


def a_record(spec):
    """A run's record with plausible numbers, the same for the same spec."""
    noise = random.Random(spec.key)
    k = spec.k or 100
    rate = math.exp(-0.5 * (math.log10(spec.lr) + 1.6 + 0.2 * math.log2(k) / 6) ** 2)
    scale = {"full": 2.0, "lora": 1.6, "scores": 0.2 * (math.log2(k) - 2.5)}.get(spec.method, 0.35 * math.log2(k))
    scale *= -0.3 if spec.universal_mode == "replace" and k < 16 else 1
    drop, tilt = scale * rate * (1 + noise.gauss(0, 0.04)), noise.gauss(0, 0.01)
    train = [7.8 - drop * (1 - math.exp(-i / 25)) + tilt + noise.gauss(0, 0.006) for i in range(spec.steps + 1)]
    probes = {"cosine": [[i, 0.99] for i in range(2, spec.steps)]}
    updates = [1, *range(10, spec.steps + 1, 10)]
    for i in updates if "coverage" in spec.probes else []:
        law = k * sum(1 / (o * n) for o, n in SHAPES) / len(SHAPES)
        probes.setdefault("coverage_diagonal", []).append([i, law * (1 + noise.gauss(0, 0.1))])
    for i in updates if "gradient_rank" in spec.probes else []:
        values = {n: 5 + 14 * math.sin(i / 13) ** 2 * (1 + j % 4) / 4 + noise.random() for j, n in enumerate(NAMES)}
        probes.setdefault("true_effective_rank_by_matrix", []).append([i, values])
        probes.setdefault("true_effective_rank", []).append([i, sum(values.values()) / len(values)])
    measures = {}
    if spec.ablate:
        curve = {"order": 0.5, "reverse": 2.5, "random": 1.0}
        kept = (0, 8, 16, 32, 48, 64)
        measures["ablation"] = {
            order: {str(n): 7.8 - drop * (n / k) ** power + noise.gauss(0, 0.02) for n in kept}
            for order, power in curve.items()
        }
    return Record(
        spec=spec,
        adapted={"matrices": 33, "shapes": SHAPES},
        trained=33 * k,
        counted=48031 * k,
        adapter_bytes=1000 + 132 * k,
        memory_bytes=192_000 * k,
        tokens=254 * spec.steps,
        flops=1.2e12,
        seconds=0.2 * spec.steps + noise.random(),
        train_loss=train,
        heldout=[(0, 7.9), (spec.steps, train[-1] + 0.15 + noise.gauss(0, 0.02))],
        probes=probes,
        measures=measures,
        diverged=False,
        versions={"ctsft": "0.1.0"},
        machine={"cpu": "a small one", "threads": 2},
    )


def changed(row, **values):
    """Give all records of `row` these values."""
    row.records[:] = [record.model_copy(update=values) for record in row.records]


def records_of(laboratory, names=None, profile="full", protocol="honest"):
    """Every run that the experiments need, the tuning runs too."""
    records = {}
    for name in names or laboratory.experiments:
        for arm in arms(laboratory, name, profile, protocol):
            while needed := due(arm, records):
                records |= {spec.key: a_record(spec) for spec in needed}
    return records


def only(name, **changes):
    """The laboratory with one experiment, changed."""
    whole = a_laboratory()
    one = Experiment(**whole.experiments[name].model_dump() | changes)
    return whole.model_copy(update={"experiments": {name: one}})
