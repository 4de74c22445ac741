import statistics

import pytest

from ctsft.errors import CTError
from ctsft.lab.experiments import Table
from ctsft.lab.metrics import (
    Row,
    cell,
    chosen,
    known,
    mean,
    measured,
    relative,
    rows,
    sd,
    short,
    spread,
    table,
    value,
)
from ctsft.lab.spec import Spec
from synthetic import laboratory, record, run

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
    assert known(metric) == ""


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


SERIES = {
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
    found = record(FIXED, probes=SERIES, measures={"ablation": {"order": {"32": 6.9}}})
    assert value(found, metric) == (wanted if wanted is None else pytest.approx(wanted))
    assert known(metric) == ""


@pytest.mark.parametrize("metric", ["loss", "train_lossy@3", "ablate.order", "coverage"])
def test_a_name_that_no_record_has(metric):
    with pytest.raises(CTError, match=r"there is no metric .*train_loss"):
        value(record(FIXED), metric)
    assert "train_loss" in known(metric)


def test_a_name_of_more_than_a_number():
    found = record(FIXED, probes=SERIES, measures={"ablation": {"order": {"32": 6.9}}})
    for metric in ("gradient_snr", "ablation.order", "basis"):
        with pytest.raises(CTError, match="names no single number"):
            value(found, metric)
    for metric in ("train_loss@last", "gradient_norm@", "cosine@3/n"):
        with pytest.raises(CTError, match="needs a number of updates after the @"):
            value(found, metric)
        assert known(metric)


# ------------------------------------------------------------------------------------------------------------- rows


def losing(losses):
    """A maker of records whose last loss is losses[k] + seed / 100."""
    return lambda spec: record(spec, [9.0, losses[spec.k] + spec.seed / 100], [[0, 9.0], [40, 8.0]])


def test_rows_of_an_experiment():
    lab = laboratory({"name": "fixed K", "k": [2, 4]}, seeds=3)
    records = run(lab, losing({2: 8.0, 4: 7.0}))
    first, second = rows(lab, "x", records)
    assert (first.name, first.spec.k, first.lr, first.seeds, first.tuned) == ("fixed K", 2, 0.1, (0, 1, 2), False)
    assert first.complete
    assert first.values("train_loss") == pytest.approx([8.0, 8.01, 8.02])
    assert second.mean("train_loss") == pytest.approx(7.01)
    assert second.sd("train_loss") == pytest.approx(0.01)
    del records[next(key for key, r in records.items() if r.spec.seed == 1 and r.spec.k == 2)]
    first, second = rows(lab, "x", records)
    assert not first.complete and second.complete
    assert first.values("train_loss") == [pytest.approx(8.0), None, pytest.approx(8.02)]


def test_an_untuned_arm_has_no_rate_yet():
    lab = laboratory({"k": 2, "rates": [0.01, 0.1, 1.0]})
    (row,) = rows(lab, "x", {})
    assert (row.lr, row.tuned, row.bracketed, row.records) == (None, True, False, [])
    assert row.values("train_loss") == [None] * 5


def test_mean_and_sd_of_what_is_there():
    assert mean([1.0, None, 3.0]) == 2
    assert sd([1.0, None, 3.0]) == pytest.approx(statistics.stdev([1, 3]))
    assert (mean([None]), sd([1.0, None])) == (None, None)


def test_chosen_knows_a_model_by_its_folder():
    row = Row("a", Spec(model="some/where/stories15m", k=2), 0.1, True, (0,), [])
    assert chosen([row], {"model": "stories15m", "k": [2, 4], "name": "a"}) == [row]
    assert chosen([row], {"model": "some/where/stories15m"}) == [row]
    assert chosen([row], {"model": "stories"}) == []


def dropping(spec):
    drop = {"lora": 2.0, "full": 4.0}.get(spec.method, 1.0) + spec.seed
    return record(spec, [9.0, 9.0 - drop / 2], [[0, 9.0], [40, 9.0 - drop]])


def test_relative_to_the_reference_of_the_same_seed():
    lab = laboratory(
        {"k": 4, "model": ["photonic", "other"]},
        {"method": "lora", "k": [1, 8], "model": "photonic"},
        {"method": "full", "k": 0, "targets": ["last2", "last2+head"]},
        seeds=2,
    )
    found = rows(lab, "x", run(lab, dropping))
    assert relative(found[0], found, "fraction_of_lora_r8") == pytest.approx([1 / 2, 2 / 3])
    assert relative(found[0], found, "fraction_of_full_sft") == pytest.approx([1 / 4, 2 / 5])
    assert measured(found[0], found, "fraction_of_full_sft_train") == pytest.approx([1 / 4, 2 / 5])
    assert measured(found[0], found, "train_loss") == pytest.approx([8.5, 8.0])
    assert relative(found[1], found, "fraction_of_lora_r8") == [None, None]  # no LoRA on the other model
    with pytest.raises(CTError, match="is no relative metric"):
        relative(found[0], found, "train_loss")


def test_relative_needs_one_reference_and_a_drop():
    lab = laboratory({"k": 4}, {"method": "lora", "k": 8, "targets": ["blocks", "last2"]}, seeds=1)
    found = rows(lab, "x", run(lab, dropping))
    with pytest.raises(CTError, match="has 2 reference arms"):
        relative(found[0], found, "fraction_of_lora_r8")
    lab = laboratory({"k": 4}, {"method": "lora", "k": 8}, seeds=1)
    found = rows(lab, "x", run(lab, lambda spec: record(spec, None, [[0, 9.0], [40, 9.5]])))
    assert relative(found[0], found, "fraction_of_lora_r8") == [None]


CROSSING = {  # by K: the loss after every update
    2: [9.0, 8.9, 8.0, 7.9, 7.0, 6.9, 6.0, 5.9, 5.0],  # at budgets of 4, 8, 12 and 16 K-steps 8, 7, 6 and 5
    4: [9.0, 8.5, 6.5, 5.5, 4.5],  # 8.5, 6.5, 5.5 and 4.5: below K=2 from 8 on
    16: [9.0, 4.9],  # shares the budget 16 alone: below K=2 there, above K=4
}


def crossing(*given, **changed):
    lab = laboratory(*(given or [{"k": 2, "steps": 8}, {"k": 4, "steps": 4}, {"k": 16, "steps": 1}]), seeds=3)
    losses = CROSSING | {int(name[1:]): found for name, found in changed.items()}
    found = rows(lab, "x", run(lab, lambda spec: record(spec, losses[spec.k])))
    by_k = {row.spec.k: row for row in found}
    return lambda k, rival: measured(by_k[k], found, f"ahead_of_k{rival}")


def test_the_budget_from_which_an_arm_stays_ahead():
    ahead = crossing()
    assert ahead(4, 2) == [8.0] * 3 and ahead(16, 2) == [16.0] * 3 and ahead(4, 16) == [16.0] * 3
    for k, rival in [(2, 4), (16, 4), (4, 4), (2, 64)]:
        assert ahead(k, rival) == [None] * 3
    assert known("ahead_of_k2") == "" and "ahead_of_kN" in known("ahead_of_k")


def test_a_lead_that_is_lost_again_does_not_count():
    assert crossing(k4=[9.0, 7.5, 7.5, 5.5, 4.5])(4, 2) == [12.0] * 3  # ahead at 4, behind at 8, ahead from 12
    assert crossing(k4=[9.0, 7.5, 6.5, 5.5, 5.0])(4, 2) == [None] * 3  # level at the end
    assert crossing(k4=[9.0, 7.5, 6.5, 5.5, None])(4, 2) == [None] * 3  # diverged


def test_an_arm_of_another_setting_is_no_rival():
    assert crossing({"k": 2, "steps": 8, "tied": False}, {"k": 4, "steps": 4})(4, 2) == [None] * 3
    assert crossing({"k": 2, "steps": 8, "name": "other"}, {"k": 4, "steps": 4})(4, 2) == [None] * 3


# ------------------------------------------------------------------------------------------------------------ tables


def test_a_table_beside_the_papers_figures():
    wanted = Table(
        title="Fixed K",
        columns={"K": "k", "Params": "counted", "Final loss": "train_loss", "Rate": "lr"},
        paper=[{"K": 4, "Params": 192124, "Final loss": 9.5155}, {"K": 64, "Final loss": "none"}],
    )
    lab = laboratory({"k": [2, 4]}, seeds=3, tables=[wanted])
    records = run(lab, losing({2: 8.0, 4: 7.0}))
    heads, body = table(lab.experiments["x"], wanted, rows(lab, "x", records))
    assert heads == ["K", "Params", "Params (paper)", "Final loss", "Final loss (paper)", "Rate"]
    assert body == [
        ["2", "33,598", "–", "8.01 ± 0.01 (3)", "–", "0.1"],  # noqa: RUF001
        ["4", "67,196", "192,124", "7.01 ± 0.01 (3)", "9.5155", "0.1"],
        ["64", "–", "–", "–", "none", "–"],  # noqa: RUF001
    ]


def test_a_line_of_the_paper_alone_stands_in_its_place():
    lab = laboratory({"k": [2, 8]}, seeds=1)
    found = rows(lab, "x", run(lab))
    paper = [{"K": 4, "Loss": 7.5}, {"K": 16, "Loss": 7.0}]

    def first_cells(**columns):
        return [
            line[:2] for line in table(lab.experiments["x"], Table(title="", columns=columns, paper=paper), found)[1]
        ]

    assert [line[0] for line in first_cells(K="k", Loss="train_loss")] == ["2", "4", "8", "16"]
    dash = cell(None)
    assert first_cells(Arm="name", K="k", Loss="train_loss") == [["arm", "2"], ["arm", "8"], [dash, "4"], [dash, "16"]]


def test_a_field_that_a_method_does_not_read_is_not_shown():
    arms = [{"k": 4}, {"k": 4, "basis": "random"}, {"method": "lora-xs", "k": 4}, {"method": "lora", "k": 8}]
    lab = laboratory(*arms, {"method": "scores", "k": 4, "basis": "universal"}, seeds=1)
    columns = {"Method": "method", "Basis": "basis", "Of W": "weight_from", "Form": "universal_mode"}
    _, body = table(lab.experiments["x"], Table(title="", columns=columns), rows(lab, "x", run(lab)))
    dash = cell(None)
    assert body == [
        ["diagonal", "weight", "top", dash],
        ["diagonal", "random", dash, dash],
        ["lora-xs", "weight", dash, dash],
        ["lora", dash, dash, dash],
        ["scores", "universal", dash, "residual"],
    ]


def test_a_table_keeps_to_where_and_knows_its_metrics():
    lab = laboratory({"k": [2, 4]}, seeds=1)
    found = rows(lab, "x", run(lab))
    _, body = table(lab.experiments["x"], Table(title="", columns={"Arm": "name", "K": "k"}, where={"k": [4]}), found)
    assert body == [["arm", "4"]]
    with pytest.raises(CTError, match="experiment x, table 'T': no metric 'loss'"):
        table(lab.experiments["x"], Table(title="T", columns={"L": "loss"}), found)


def test_numbers_for_people():
    assert [short(x) for x in (6.12345, 1234.5, 2.0, 1.234e12, 0.00012)] == [
        "6.123",
        "1,234",
        "2",
        "1.23e+12",
        "0.00012",
    ]
    assert spread([6.0, None]) == "6 (1 of 2)"
    assert spread([3.0, 3.0]) == "3"
    assert spread([None]) == cell(None) == cell("")
    assert (cell(True), cell(False), cell(1000), cell("a")) == ("yes", "no", "1,000", "a")
