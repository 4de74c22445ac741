"""Figures of the laboratory: what is drawn of which runs, in which colours and words."""

import statistics

import pytest
from matplotlib.figure import Figure as MatplotlibFigure

from ctsft.lab.compare import arm_runs
from ctsft.lab.drawing import GLYPHS, LAWS, MARKERS, PLACES, axis, logarithmic, styles
from ctsft.lab.experiments import Figure
from ctsft.lab.figures import centre, curves, picture, points, told
from plausible import a_laboratory, changed, records_of


def figure_of(name, laboratory=None, **changes):
    """The first figure of an experiment, changed, with its rows."""
    laboratory = laboratory or a_laboratory()
    figure = Figure(**laboratory.experiments[name].figures[0].model_dump() | changes)
    return figure, arm_runs(laboratory, name, records_of(laboratory, [name]))


def test_points_are_means_with_t_intervals():
    figure, found = figure_of("82")
    (line,) = points(figure, found[:1], found, ["k"], [])
    losses = [record.train_loss[-1] for record in found[0].records]
    half = 2.7764451 * statistics.stdev(losses) / 5**0.5  # t of 4 degrees of freedom at 97.5%
    assert line.key == (2,) and len(line.points) == 1
    assert line.points[0] == pytest.approx((96062 * 10, statistics.fmean(losses), half))
    lines = points(figure, found, found, ["k"], [])
    assert [(line.key, len(line.points)) for line in lines] == [((2,), 4), ((16,), 4), ((32,), 4)]
    assert centre([1.5]) == (1.5, 0.0) and centre([1.5, 2.5]) == (2.0, 0.0)


def test_points_over_words_are_ticks():
    figure, found = figure_of("arena")
    ticks = []
    lines = points(figure, found, found, [], ticks)
    assert ticks == ["diagonal", "core", "lora", "norms"]
    (line,) = lines
    assert [x for x, _, _ in line.points] == [0, 1, 2, 3]
    assert line.points[2][1:] == (1.0, 0.0)  # LoRA r8 as a share of itself


def test_curves_are_means_where_all_seeds_have_numbers():
    figure, found = figure_of("81", x="step", y="train_loss")
    row = found[0]
    row.records[2].train_loss[30:] = [None] * 11
    (line,) = curves(figure, row, ["k"])
    assert [x for x, _, _ in line.points] == list(range(30)) and line.curve
    losses = [record.train_loss[7] for record in row.records]
    assert line.points[7][1:] == pytest.approx(centre(losses))


def test_curves_over_directions_kept_have_a_line_an_order():
    figure, found = figure_of("85")
    lines = curves(figure, found[0], [])
    assert [line.key for line in lines] == [("order",), ("reverse",), ("random",)]
    assert [x for x, _, _ in lines[0].points] == [0, 8, 16, 32, 48, 64]
    (one,) = curves(Figure(title="", x="kept", y="ablation.reverse"), found[0], [])
    assert one.points == lines[1].points
    assert curves(Figure(title="", x="kept", y="variance_explained"), found[0], []) == []


def test_long_curves_are_thinned_and_keep_their_end():
    figure, found = figure_of("82", x="step", y="heldout")
    changed(found[0], heldout=[(i, 1.0) for i in range(1001)])
    (line,) = curves(figure, found[0], [])
    assert len(line.points) <= 220 and [x for x, _, _ in line.points[:3]] == [0, 1, 2] and line.points[-1][0] == 1000


def test_the_law_of_coverage_is_the_papers_slope_times_k():
    shapes = [(4, 8), (16, 2)]
    assert LAWS["coverage"][1](3, shapes) == pytest.approx(3 / 32)
    figure, found = figure_of("87")
    legend = {text: line for text, _, line in picture("x", figure, found).legend}
    assert legend == {"top": "solid", "bottom": "solid", "random": "solid", LAWS["coverage"][0]: "dashed"}


def test_upright_lines_stand_at_shares_of_the_width():
    figure, found = figure_of("78")
    svg = picture("x", figure, found).svgs[0][1]
    assert "d/128" in svg and "d/32" in svg and len(PLACES["kmin"]) == 2


def test_numbers_take_the_ramp_and_names_the_series():
    figure, found = figure_of("81", x="step", y="train_loss", by="k", where={"name": "fixed"}, paper=[])
    colours = [colour for _, colour, _ in picture("x", figure, found).legend]
    assert colours[0] == "s0" and colours[-1] == "s7" and len(set(colours)) == 6
    assert [told("k", 4), told("tied", False), told("schedule", ""), told("model", "a/b"), told("steps", 3)] == [
        *("K = 4", "tied: no", "fixed K", "b", "steps = 3")
    ]


def test_lines_of_a_word_and_a_number_take_the_ramp_for_one_and_a_dash_for_the_other():
    looks = dict(zip(keys := [(w, k) for w in ("fixed", "fresh") for k in (2, 4, 8)], styles(keys), strict=True))
    assert [looks["fixed", k] for k in (2, 4, 8)] == [("s0", "solid"), ("s4", "solid"), ("s7", "solid")]
    assert [looks["fresh", k] for k in (2, 4, 8)] == [("s0", "dashed"), ("s4", "dashed"), ("s7", "dashed")]
    tied = styles([(k, tied) for k in (2, 4, 8) for tied in (True, False)])
    assert len(set(tied)) == 6 and {dash for _, dash in tied} == {"solid", "dashed"}
    many = styles([(f"arm {i}", k) for i in range(9) for k in (2, 4, 8)])  # more words than dashes
    assert {colour[0] for colour, _ in many} == {"c"}


def test_single_points_of_one_colour_differ_by_their_marker():
    looks = [(colour, MARKERS[dash], GLYPHS[dash]) for colour, dash in styles([(f"arm {i}",) for i in range(20)])]
    assert len({colour for colour, _, _ in looks}) < len(looks) == len({(colour, m) for colour, m, _ in looks})
    assert len({m for _, m, _ in looks}) == len({g for _, _, g in looks}) == 3


def test_a_line_looks_the_same_in_all_figures_of_its_kind():
    laboratory = a_laboratory()
    figure, found = figure_of("82", laboratory, x="k", by="k,tied", where={})
    ks = sorted({row.spec.k for row in found})
    some = Figure(**figure.model_dump() | {"where": {"k": ks[1:]}})
    other = Figure(**figure.model_dump() | {"by": "tied"})

    def looks(drawn, beside=()):
        return {text: look for text, *look in picture("x", drawn, found, beside).legend}

    whole, part = looks(figure), looks(some, [figure, other])
    assert set(part) < set(whole) and all(whole[text] == look for text, look in part.items())
    assert looks(some) != part  # alone it takes the colours from the start


def test_axes_are_told_in_words():
    assert axis("train_loss@1280/k") == "loss on the step's batch, nats per token, after 1280 K-steps"
    assert axis("heldout_loss@40") == "held-out loss, nats per token, after 40 updates"
    assert [axis("k"), axis("batch"), axis("gradient_norm")] == ["K", "batch", "norm of the gradient"]
    assert axis("true_effective_rank.max") == axis("true_effective_rank") + ", highest"
    assert axis("gradient_snr.rest.last") == axis("gradient_snr") + ", rest at the last update"
    assert axis("ablation.order.32") == axis("ablation")


@pytest.mark.parametrize("scale", [{"x": "step", "y": "cosine"}, {"x": "step", "y": "diversity"}])
def test_a_figure_without_numbers_says_so(scale):
    figure, found = figure_of("82", **scale)
    for row in found:
        changed(row, probes={})
    made = picture("x", figure, found)
    assert made.svgs == [] and "none has this number" in made.note


def test_runs_that_are_not_drawn_are_counted():
    figure, found = figure_of("82")
    found[0].records[1] = found[0].records[1].model_copy(update={"diverged": True})
    made = picture("x", figure, found)
    assert "without this number: 1." in made.note and "95% t interval" in made.note


@pytest.mark.parametrize(("xs", "scale"), [([0, 4, 8], "symlog"), ([1, 1e7], "log"), ([0], "linear")])
def test_logarithmic_axes_have_room_for_zero(xs, scale):
    ax = MatplotlibFigure().add_subplot()
    ax.plot(xs, xs)
    logarithmic(ax, xs)
    assert ax.get_xscale() == scale
