"""Laboratories and records made up for tests: no run is made, every number is chosen."""

from ctsft.lab.claims import Claim
from ctsft.lab.experiments import Experiment, Laboratory, Profile, arms
from ctsft.lab.records import Record

SHAPES = [[768, 256], [256, 256], [15007, 256]]
SERIES = {  # what each probe writes
    "": ("gradient_norm", "cosine", "amplitude_rms", "amplitude_max"),
    "coverage": (
        *("coverage_diagonal", "coverage_two_sided", "coverage_input", "coverage_output", "coverage_diagonal_null"),
    ),
    "gradient_rank": ("true_effective_rank", "true_stable_rank", "constrained_effective_rank"),
    "gradient_snr": ("snr_top", "snr_rest", "abs_mean_over_std_top", "abs_mean_over_std_rest"),
    "diversity": ("diversity",),
}
KEPT = (2, 4, 8, 20, 32, 64)


def record(spec, losses=None, heldout=None, **changes):
    """A whole record of `spec`, as the laboratory writes it: it holds what such a run measures, and nothing else."""
    count = spec.steps + (spec.batches == "fixed")
    losses = [8.0 - (0.01 + 0.0001 * spec.k) * i for i in range(count)] if losses is None else losses
    done = sorted({0, *spec.evaluate, spec.steps})
    names = [name for probe in ("", *spec.probes) for name in SERIES[probe]]
    updates = range(1, spec.steps + 1) or [0]
    probes = {name: [[t, 0.5 + 0.001 * t + 0.0001 * spec.k + 0.0001 * spec.seed] for t in updates] for name in names}
    measures = {"variance_explained": 0.2} if spec.method == "scores" else {}
    if spec.ablate:
        kept = {str(k): 7.0 - 0.01 * k for k in KEPT if k <= spec.k}
        measures["ablation"] = {"order": kept, "reverse": kept, "random": kept}
    per_k = {"diagonal": 3, "scores": 1024}.get(spec.method)
    made = {
        "spec": spec,
        "adapted": {"matrices": 3, "shapes": SHAPES},
        "trained": 5000 if per_k is None else per_k * spec.k,
        "counted": spec.k * sum(sum(shape) for shape in SHAPES) if per_k else None,
        "adapter_bytes": 4 * spec.k,
        "memory_bytes": 8 * spec.k,
        "tokens": 254 * spec.steps,
        "flops": 1e9 * spec.steps,
        "seconds": 0.2 * spec.steps,
        "train_loss": losses,
        "heldout": [[n, 8.0 - 0.002 * n] for n in done] if heldout is None else heldout,
        "probes": probes,
        "measures": measures,
        "diverged": False,
        "versions": {},
        "machine": {},
    }
    return Record(**made | changes)


def laboratory(*given, name="x", seeds=5, **more):
    """A laboratory of one experiment; an arm is a dict of fields, with one rate unless it names its own."""
    return Laboratory(
        base={},
        rates={"diagonal": 0.1, "full": 0.1, "scores": 0.1, "lora": 0.1},
        profiles={"full": Profile(seeds=seeds, tune_seeds=1, rates=3)},
        experiments={
            name: Experiment(
                name=name, title="", question="?", source="1", arms=[{"rates": [0.1]} | arm for arm in given], **more
            )
        },
    )


def run(lab, make=record, name="x"):
    """Records of all final runs, by key: `make(spec)` for each."""
    specs = [spec for arm in arms(lab, name) for spec in arm.final(arm.rates[0])]
    return {spec.key: make(spec) for spec in specs}


def claim(predicate, **values):
    given = {
        "id": "1",
        "source": "81",
        "text": "It is so.",
        "experiments": ["x"],
        "metric": "train_loss",
        "effect": 0.02,
    }
    return Claim(**given | {"predicate": predicate} | values)
