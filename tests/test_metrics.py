import pytest

from ctsft.errors import CTError
from ctsft.lab.metrics import METRICS, check_metric, value
from ctsft.lab.spec import Spec
from synthetic import KEPT, SERIES, record

FIXED = Spec(k=4, steps=3)
LOSSES = [9.0, 8.5, 8.7, 8.0]


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        ("k", 4),
        ("tied", 1),
        ("first_loss", 9.0),
        ("train_loss", 8.0),
        ("train_loss@1", 8.5),
        ("train_loss@3", 8.0),
        ("train_loss@4", None),
        ("train_loss@8/k", 8.7),
        ("best_loss", 8.0),
        ("loss_drop", 1.0),
        ("first_heldout", 8.0),
        ("heldout_loss", 7.5),
        ("heldout_loss@2", 7.7),
        ("heldout_loss@1", None),
        ("heldout_drop", 0.5),
        ("monotonic_share", 2 / 3),
        ("matrices", 3),
        ("trained", 12),
        ("tokens", 254 * 3),
        ("seconds_per_step", 0.2),
        ("k_steps", 12),
        ("counted", 4 * 16799),
        ("param_steps", 4 * 16799 * 3),
        ("drop_per_10k_counted", 1 / (4 * 16799 / 10_000)),
        ("drop_per_10k_trained", 1 / (12 / 10_000)),
    ],
)
def test_a_metric_of_a_record(metric, wanted):
    found = value(record(FIXED, LOSSES, [[0, 8.0], [2, 7.7], [3, 7.5]]), metric)
    assert found is None if wanted is None else found == pytest.approx(wanted)
    check_metric(metric)


def test_paper_81s_efficiency():
    """K=2: 9.6866 to 9.5846 with 96,062 counted parameters is 0.01062 per 10,000."""
    found = record(Spec(k=2), [9.6866, 9.5846], counted=96062)
    assert round(value(found, "drop_per_10k_counted"), 5) == 0.01062


def test_a_schedule_pays_for_the_k_in_force():
    found = record(Spec(k=2, schedule="2>4@1/4>8@1/2>16@3/4"), counted=16 * 16799)
    assert value(found, "k_steps") == 10 * (2 + 4 + 8 + 16)
    assert value(found, "param_steps") == 16799 * 300


def test_fresh_batches_have_no_loss_after_the_last_update():
    found = record(Spec(steps=3, batches="fresh"), [9.0, 8.0, 7.0])
    assert value(found, "train_loss") == 7.0
    assert value(found, "train_loss@3") is None
    assert value(found, "monotonic_share") is None


def test_a_diverged_run_has_no_end():
    found = record(FIXED, [9.0, 8.0, None], [[0, 8.0], [3, None]], diverged=True)
    for metric in ("train_loss", "heldout_loss", "loss_drop", "heldout_drop", "drop_per_10k_trained"):
        assert value(found, metric) is None
    assert value(found, "best_loss") == 8.0
    assert value(found, "monotonic_share") is None


def test_no_step_and_no_count():
    still = record(Spec(steps=0), [8.0])
    assert (value(still, "loss_drop"), value(still, "k_steps"), value(still, "seconds_per_step")) == (0, 0, None)
    norms = record(Spec(method="norms", k=0))
    assert value(norms, "counted") is None
    assert value(norms, "param_steps") is None
    assert value(norms, "drop_per_10k_counted") is None


PROBED = {
    "gradient_norm": [[1, 4.0], [2, None], [3, 1.0], [4, 2.0]],
    "gradient_snr": [[1, {"top": 1.0, "rest": 3.0}], [2, {"top": 2.0, "rest": 5.0}]],
    "true_effective_rank_by_matrix": [[1, {"h.0.attn": 5.0}], [3, {"h.0.attn": 7.0}]],
    "snr_top": [],
}


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        ("gradient_norm", 7 / 3),
        ("gradient_norm@3", 1.0),
        ("gradient_norm@2", None),
        ("gradient_norm@9", None),
        ("gradient_norm@12/k", 1.0),
        ("gradient_norm.first", 4.0),
        ("gradient_norm.last", 2.0),
        ("gradient_norm.min", 1.0),
        ("gradient_norm.max", 4.0),
        ("gradient_snr.top", 1.5),
        ("gradient_snr.rest.last", 5.0),
        ("gradient_snr.rest@1", 3.0),
        ("true_effective_rank_by_matrix.h.0.attn", 6.0),
        ("true_effective_rank_by_matrix.h.0.attn.first", 5.0),
        ("true_effective_rank_by_matrix.h.9.attn", None),
        ("snr_top", None),
        ("diversity.last", None),
        ("ablation.order.32", 6.9),
        ("ablation.order.3", None),
        ("ablation.reverse.32", None),
        ("variance_explained", None),
    ],
)
def test_a_probe_or_a_measure(metric, wanted):
    found = record(FIXED, probes=PROBED, measures={"ablation": {"order": {"32": 6.9}}})
    assert value(found, metric) == (wanted if wanted is None else pytest.approx(wanted))
    check_metric(metric)


@pytest.mark.parametrize("metric", ["loss", "train_lossy@3", "ablate.order", "coverage"])
def test_a_name_that_no_record_has(metric):
    with pytest.raises(CTError, match=r"there is no metric .*train_loss"):
        value(record(FIXED), metric)
    with pytest.raises(CTError, match=r"there is no metric .*train_loss"):
        check_metric(metric)


def test_a_name_of_more_than_a_number():
    found = record(FIXED, probes=PROBED, measures={"ablation": {"order": {"32": 6.9}}})
    for metric in ("gradient_snr", "ablation.order", "basis"):
        with pytest.raises(CTError, match="names no single number"):
            value(found, metric)
    for metric in ("train_loss@last", "gradient_norm@", "cosine@3/n"):
        with pytest.raises(CTError, match="needs a number of updates after the @"):
            value(found, metric)
        with pytest.raises(CTError, match="needs a number of updates after the @"):
            check_metric(metric)


def test_every_series_and_measure_of_a_record_has_its_name():
    for name in [name for names in SERIES.values() for name in names]:
        assert METRICS[name].kind == "series", name
    found = record(Spec(method="scores", k=32, ablate=True))
    assert {METRICS[name].kind for name in found.measures} == {"measure"} and 20 in KEPT
    assert value(found, "ablation.order.20") == pytest.approx(6.8)


def test_a_relative_metric_is_of_no_record_alone():
    for metric in ("fraction_of_lora_r8", "ahead_of_k2"):
        with pytest.raises(CTError, match="is relative to another arm"):
            value(record(FIXED), metric)
