import tomllib
from collections import Counter
from pathlib import Path

import pytest

from ctsft.errors import CTError
from ctsft.lab.experiments import PAPERS, arms, left_out, on_own, read_laboratory
from ctsft.lab.own import Own
from ctsft.lab.rates import due
from ctsft.lab.schedule import counted_parameters, parse_schedule
from ctsft.lab.spec import PAPER_LR, Spec
from test_schedule import PHOTONIC

SETTINGS = [(profile, protocol) for profile in ("quick", "full") for protocol in ("honest", "paper")]
OURS = (
    "arena",
    "arena-long",
    "gains",
    "heldout",
    "lone",
    "rate",
    "rate-products",
    "rate-small",
    "refresh",
    "siblings",
    "siblings-ways",
    "spend",
    "strangers",
)
NO_K = ("full", "norms", "ia3")
WIDTH = {"photonic": 256, "stories260k": 64, "stories15m": 288, "smollm2-135m": 576, "tinyllama-1.1b": 2048}
NARROWEST = WIDTH | {"stories260k": 32, "smollm2-135m": 192, "tinyllama-1.1b": 256}  # of a matrix: keys and values

DEFAULTS = """
[base]
steps = 40
[rates]
diagonal = 0.05
"tiny.diagonal" = 0.4
lora = 0.005
full = 0.0005
[profiles.quick]
seeds = 2
tune_seeds = 1
rates = 3
[profiles.full]
seeds = 5
tune_seeds = 2
rates = 5
"""
PLAIN = 'title = "t"\nquestion = "q"\nsource = "ours"\n'


def write(folder, text="[[arms]]\nk = 2\n", defaults=DEFAULTS, head=PLAIN):
    """A folder of experiments with the single one "a"."""
    folder.mkdir(exist_ok=True)
    (folder / "defaults.toml").write_text(defaults)
    (folder / "a.toml").write_text(head + text)
    return folder


def read(folder, text="[[arms]]\nk = 2\n", profile="full", protocol="honest", **rest):
    return list(arms(read_laboratory(write(folder, text, **rest)), "a", profile, protocol))


@pytest.fixture(scope="module")
def laboratory():
    return read_laboratory()


# --------------------------------------------------------------------------------------------------------------- grids


def test_lists_multiply_out_but_those_of_a_run(tmp_path):
    text = '[[arms]]\nk = [2, 4]\nbatches = ["fixed", "fresh"]\nevaluate = [5, 10]\nprobes = ["coverage"]\n'
    found = [arm.spec for arm in read(tmp_path, text)]
    assert [(s.k, s.batches) for s in found] == [(2, "fixed"), (2, "fresh"), (4, "fixed"), (4, "fresh")]
    assert {(s.evaluate, s.probes) for s in found} == {((5, 10), ("coverage",))}


def test_an_arm_overrides_its_experiment_and_that_the_defaults(tmp_path):
    text = "[base]\nk = 8\nbatch = 3\n[[arms]]\n[[arms]]\nk = 16\nsteps = 7\n"
    assert [(a.spec.k, a.spec.batch, a.spec.steps) for a in read(tmp_path, text)] == [(8, 3, 40), (16, 3, 7)]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("k = [2, 4, 8, 16, 32, 64]\nk_steps = 1280", [640, 320, 160, 80, 40, 20]),
        ("k_steps = 1280", [40]),  # K is the default then
        ("k = 20\nk_steps = [100, 1280]", [5, 64]),
        ("k = 64\nk_steps = 10", [1]),
        ('schedule = "8>16@1/2"\nk_steps = 80', [10]),  # by its first K
    ],
)
def test_k_steps_stand_for_steps(tmp_path, text, steps):
    assert [arm.spec.steps for arm in read(tmp_path, f"[[arms]]\n{text}\n")] == steps


def test_a_schedule_brings_its_first_k(tmp_path):
    found = read(tmp_path, '[[arms]]\nk = 4\nschedule = ["", "8>16@1/2", "16>2@1/2"]\n')
    assert [(a.spec.schedule, a.spec.k) for a in found] == [("", 4), ("8>16@1/2", 8), ("16>2@1/2", 16)]


def test_profiles_and_protocols_choose(tmp_path):
    text = (
        '[[arms]]\nk = 2\nseeds = 3\n[[arms]]\nk = 4\nprofiles = ["full"]\n'
        '[[arms]]\nk = 8\nprotocols = ["honest"]\nbatches = "fresh"\n'
    )
    ks = {setting: [a.spec.k for a in read(tmp_path, text, *setting)] for setting in SETTINGS}
    assert ks == {
        ("quick", "honest"): [2, 8],
        ("quick", "paper"): [2],
        ("full", "honest"): [2, 4, 8],
        ("full", "paper"): [2, 4],
    }
    assert [a.seeds for a in read(tmp_path, text)] == [(0, 1, 2), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)]
    assert [a.seeds for a in read(tmp_path, text, "quick")] == [(0, 1), (0, 1)]
    assert [a.tune_seeds for a in read(tmp_path, text)] == [2, 2, 2]


def test_the_papers_protocol_is_one_seed_at_its_rate(tmp_path):
    (arm,) = read(
        tmp_path, '[[arms]]\nk = 2\nbatches = "fresh"\ndecay = "linear"\nrates = [1.0, 2.0]\n', "full", "paper"
    )
    assert arm.seeds == (0,) and arm.rates == (PAPER_LR,) and not arm.tunes
    assert (arm.spec.batches, arm.spec.decay) == ("fixed", "constant")
    assert due(arm, {}) == arm.final(PAPER_LR)


def test_where_a_grid_starts(tmp_path):
    text = '[[arms]]\nk = 2\n[[arms]]\nmodel = "~/m/tiny"\n[[arms]]\nrates = [0.1, 0.2]\n'
    quick = [arm.rates for arm in read(tmp_path, text, "quick")]
    assert quick == [(0.016, 0.05, 0.16), (0.13, 0.4, 1.3), (0.1, 0.2)]
    assert read(tmp_path, text)[0].rates == (0.005, 0.016, 0.05, 0.16, 0.5)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[arms]]\nkk = 2", r"experiment a, arm 'arm': kk: Extra inputs are not permitted\.$"),
        ('[[arms]]\nname = "b"\nk = -1', r"experiment a, arm 'b': k: Input should be greater than or equal to 0\.$"),
        ("[[arms]]\nk = [2, 0.5]", r"experiment a, arm 'arm': k: "),
        ("[[arms]]\nk = []", r"experiment a, arm 'arm': k is an empty list, so the arm has no runs\.$"),
        ('[[arms]]\nmethod = "dora"', r"experiment a, arm 'arm': method: Input should be 'diagonal'"),
        ('[[arms]]\nmethod = "core"', r"defaults\.toml names no learning rate for core: add it under \[rates\]\.$"),
        ('[[arms]]\nschedule = "8>16"', r"experiment a, arm 'arm': the schedule '8>16' is not like"),
        ("[[arms]]\nschedule = 8", r"experiment a, arm 'arm': schedule: Input should be a valid string\.$"),
        (
            "[[arms]]\nk = 0\nk_steps = 80",
            r"experiment a, arm 'arm': k_steps=80 needs a whole number and a k of at least 1\.$",
        ),
        ('[[arms]]\nk_steps = "80"', r"experiment a, arm 'arm': k_steps='80' needs a whole number"),
        ('[[arms]]\nprobes = ["coverrage"]', r"experiment a, arm 'arm': probes\.0: Input should be 'coverage'"),
        ('[[arms]]\nprofiles = ["ful"]', r"a\.toml is wrong: there is no profile 'ful'; there are quick, full\.$"),
        ('[[arms]]\nprofiles = "full"', r"a\.toml is wrong: arms\.0\.profiles: "),
        ('[[arms]]\nprotocols = ["honset"]', r"a\.toml is wrong: arms\.0\.protocols\.0: Input should be 'honest'"),
        ("[[arms]]\nseeds = 0", r"a\.toml is wrong: arms\.0\.seeds: "),
        ("[[arms]]\ntune_steps = 0", r"a\.toml is wrong: arms\.0\.tune_steps: "),
        ("[[arms]]\nrates = [0.1, -1.0]", r"a\.toml is wrong: arms\.0\.rates\.1: Input should be greater than 0\.$"),
        ("[base]\nkk = 1\n[[arms]]\nk = 2", r"experiment a, arm 'arm': kk: Extra inputs"),
        ("", r"a\.toml is wrong: arms: Field required\.$"),
        ("[[arms]]\n[[figure]]", r"a\.toml is wrong: figure: Extra inputs are not permitted\.$"),
        ('[[arms]]\n[[figures]]\ntitle = "t"\nx = "k"', r"a\.toml is wrong: figures\.0\.y: Field required\.$"),
        (
            '[[arms]]\n[[figures]]\ntitle = "t"\nx = "k"\ny = "trained"\nwhere = { kk = 1 }',
            r"a\.toml is wrong: 't': where names 'kk', which is no field of a run\.$",
        ),
        (
            '[[arms]]\n[[tables]]\ntitle = "t"\ncolumns = { K = "k" }\nwhere = { kk = 1 }',
            r"a\.toml is wrong: 't': where names 'kk', which is no field of a run\.$",
        ),
        (
            '[[arms]]\n[[tables]]\ntitle = "t"\ncolumns = { K = "k" }\npaper = [{ k = 2 }]',
            r"a\.toml is wrong: 't': the paper's row names 'k', which is no column\.$",
        ),
        ("k = ", r"a\.toml is no TOML: "),
    ],
)
def test_a_wrong_experiment_is_one_sentence(tmp_path, text, said):
    with pytest.raises(CTError, match=said):
        read_laboratory(write(tmp_path, text))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[base]", "[bass]", r"defaults\.toml is wrong: .*bass: Extra inputs"),
        ("[base]", "[base]\nkk = 1", r"experiment a, arm 'arm': kk: Extra inputs"),
        ("seeds = 2", "seeds = 0", r"defaults\.toml is wrong: profiles\.quick\.seeds: "),
        ("rates = 3", "rates = 2", r"defaults\.toml is wrong: profiles\.quick\.rates: "),
        ("seeds = 2", "sedes = 2", r"defaults\.toml is wrong: profiles\.quick\.seeds: Field required; .*sedes: Extra"),
        (
            "lora = 0.005",
            "lroa = 0.005",
            r"defaults\.toml is wrong: all: .*rates: lroa does not end in a method; take one of diagonal, ",
        ),
        ("lora = 0.005", "lora = 0", r"defaults\.toml is wrong: rates\.lora: Input should be greater than 0\.$"),
    ],
)
def test_wrong_defaults_are_one_sentence(tmp_path, old, new, said):
    assert old in DEFAULTS
    with pytest.raises(CTError, match=said):
        read_laboratory(write(tmp_path, defaults=DEFAULTS.replace(old, new, 1)))


def test_missing_files(tmp_path):
    with pytest.raises(CTError, match=r"defaults\.toml cannot be read \(No such file or directory\)\.$"):
        read_laboratory(tmp_path)
    (tmp_path / "defaults.toml").write_text(DEFAULTS)
    (tmp_path / "claims.toml").write_text("not an experiment")
    with pytest.raises(CTError, match=r"holds no experiment \(\*\.toml\)\.$"):
        read_laboratory(tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(CTError, match=r"b\.toml is no TOML: "):
        read_laboratory(tmp_path)


def test_what_is_not_there(laboratory):
    with pytest.raises(CTError, match=r"there is no experiment '90'; there are 76, 78, 81, .*, strangers\.$"):
        list(arms(laboratory, "90"))
    with pytest.raises(CTError, match=r"there is no profile 'ful'; there are quick, full\.$"):
        list(arms(laboratory, "81", "ful"))
    with pytest.raises(CTError, match=r"there is no protocol 'honset'; there are honest, paper\.$"):
        list(arms(laboratory, "81", "full", "honset"))


# ------------------------------------------------------------------------------------------- the experiments themselves


def test_every_paper_has_its_experiment(laboratory):
    assert set(laboratory.experiments) == {*map(str, (76, 78, *range(81, 90))), "88-rate", *OURS}
    for name, found in laboratory.experiments.items():
        assert found.source == ("ours" if name in OURS else name.partition("-")[0])
        assert found.question.endswith("?") and found.notes and found.tables and found.figures
        assert all(note.endswith(".") for note in found.notes)


@pytest.mark.parametrize(("profile", "protocol"), SETTINGS)
def test_arms_are_possible_and_differ(laboratory, profile, protocol):
    for name in laboratory.experiments:
        found = list(arms(laboratory, name, profile, protocol))
        assert found or (name in OURS and protocol == "paper") or (name == "arena-long" and profile == "quick")
        assert max(Counter((a.name, a.spec.key) for a in found).values(), default=1) == 1, f"{name} has an arm twice"
        for a in found:
            s = a.spec
            assert (s.k == 0) == (s.method in NO_K), a
            assert s.weight_from == "top" or s.basis == "weight", a
            assert s.universal_mode == "residual" or (s.basis, s.method) == ("universal", "scores"), a
            assert not s.probes or s.method == "diagonal", a
            assert all(0 < step < s.steps for step in s.evaluate), a
            one_sided = s.method == "scores" and s.basis == "universal"
            if s.method not in (*NO_K, "vera"):
                assert (
                    max(k for _, k in parse_schedule(s.schedule or str(s.k)))
                    <= (WIDTH if one_sided else NARROWEST)[s.model]
                ), a
            assert a.tunes == (protocol == "honest" and s.steps > 0 and name != "88-rate" and not s.rule), a


def test_quick_is_a_part_of_full(laboratory):
    """So that a quick run's records serve the full one, but for the budgets that quick tunes on fewer steps."""
    for name in laboratory.experiments:
        full = {a.spec.key for a in arms(laboratory, name, "full")}
        assert {a.spec.key for a in arms(laboratory, name, "quick")} <= full, name


def test_names_in_tables_and_figures_choose_something(laboratory):
    for name, found in laboratory.experiments.items():
        here = list(arms(laboratory, name, "full"))
        for shown in (*found.tables, *found.figures):
            chosen = [
                a
                for a in here
                if all(
                    (a.name if field == "name" else getattr(a.spec, field))
                    in (wanted if isinstance(wanted, list) else [wanted])
                    for field, wanted in shown.where.items()
                )
            ]
            assert chosen, f"{name}: nothing is in {shown.title!r}"


def test_runs_that_papers_share_are_computed_once(laboratory):
    def finals_of(name, arm_name, profile="full"):
        return {s.key for a in arms(laboratory, name, profile) if a.name == arm_name for s in a.final(0.05)}

    fixed = finals_of("88", "40 steps")
    assert finals_of("81", "fixed K") < fixed
    for name, arm_name in (("83", "fixed K"), ("86", "fixed K"), ("87", "W's top")):
        assert finals_of(name, arm_name) == fixed, name
    assert finals_of("84", "uniform") < fixed and len(finals_of("85", "fixed K") - fixed) == 5  # K=20 is 85's own
    for profile in ("quick", "full"):
        assert finals_of("82", "1x", profile) == finals_of("88", "budget", profile)


@pytest.mark.parametrize(("profile", "runs", "steps"), [("quick", 210, 6_300), ("full", 1_690, 147_000)])
def test_the_profiles_stay_small(laboratory, profile, runs, steps):
    """Runs on photonic if no grid has to grow; a step takes about 0.2 s on one core."""
    specs = {}
    for name in laboratory.experiments:
        for a in arms(laboratory, name, profile):
            tuning = [s for lr in a.rates for s in a.tuning(lr)] if a.tunes else []
            specs |= {s.key: s for s in (*tuning, *a.final(a.rates[len(a.rates) // 2])) if s.model == "photonic"}
    assert len(specs) <= runs
    assert sum(s.steps * s.batch // 2 for s in specs.values()) <= steps


def paper_rows(laboratory, name):
    return [row for table in laboratory.experiments[name].tables for row in table.paper]


def test_the_papers_tables_are_copied_right(laboratory):
    """Their own arithmetic: counted = 48,031 K, efficiency = loss drop per 10,000 counted, equal budgets."""
    rows = [row for row in paper_rows(laboratory, "81") if "K" in row]
    assert sorted({row["K"] for row in rows}) == [2, 4, 8, 16, 32]
    for row in rows:
        counted = row["Trainable params (counted)"]
        assert counted == 48_031 * row["K"] == counted_parameters(row["K"], PHOTONIC)
        drop = row["First loss"] - row["Final loss"]
        assert drop / counted * 10_000 == pytest.approx(row["Efficiency (per 10K counted)"], abs=6e-6)
    budgets = [row for row in paper_rows(laboratory, "82") if "Total param-steps" in row]
    assert len(budgets) == 6
    for row in budgets:
        assert row["Params (counted)"] == 48_031 * row["K"] and row["K"] * row["Steps"] == 1280
        assert row["Params (counted)"] * row["Steps"] == pytest.approx(row["Total param-steps"], rel=1e-3)
    assert all(row["K"] * row["Steps"] == 1280 for row in paper_rows(laboratory, "88") if "Steps" in row)
    for row in (row for row in paper_rows(laboratory, "78") if "Params" in row):
        assert row["Params"] == pytest.approx(43_008 * row["K"], rel=4e-3)  # rows of TinyLlama's last two layers x K


def test_the_papers_figures_are_in_their_papers():
    """Every number that is printed with four digits or more stands in a paper's text, where the texts are at hand."""
    folder = Path(__file__).parents[2] / "shared" / "papers"
    if not folder.is_dir():
        pytest.skip("the papers' texts are not here")
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.txt")).replace(",", "")
    found = 0
    for path in PAPERS.glob("8[12358].toml"):
        raw = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=str)
        for table in raw["tables"]:
            for row in table.get("paper", []):
                for value in row.values():
                    if isinstance(value, str) and value.replace(".", "", 1).isdigit() and len(value) > 5:
                        assert value in text, f"{path.name}: {value}"
                        found += 1
    assert found > 60


def test_arena_compares_equals(laboratory):
    """Numbers that train on photonic's 32 block matrices, by formula."""
    shapes = PHOTONIC[:-1]
    both, pieces = sum(map(sum, shapes)), len(shapes)
    for a in arms(laboratory, "arena", "full"):
        s = a.spec
        if s.model != "photonic":
            continue
        trained = {"diagonal": pieces * s.k, "core": pieces * s.k**2, "lora-xs": pieces * s.k**2, "lora": both * s.k}
        if a.name == "64 a matrix":
            assert trained[s.method] == 2_048
        elif a.name == "as many as LoRA r1":
            assert trained[s.method] == both == 32_768
        elif a.name == "as many as LoRA r8":
            assert trained[s.method] == pytest.approx(8 * both, rel=0.02)
        elif a.name == "as many as VeRA":
            assert (s.method, s.k) == ("gains", 256)
    models = {(a.spec.model, a.spec.text) for a in arms(laboratory, "arena", "full")}
    assert models == {("photonic", "sql"), ("stories15m", "shakespeare"), ("smollm2-135m", "sql")}
    for model, text in models:
        here = [a.spec for a in arms(laboratory, "arena", "full") if (a.spec.model, a.spec.text) == (model, text)]
        assert sum((s.method, s.k) == ("lora", 8) for s in here) == 1
        assert all((s.targets, s.batches, s.decay) == ("blocks", "fresh", "linear") for s in here)


def test_78_has_one_reference_for_every_setting(laboratory):
    found = [a.spec for name in ("76", "78") for a in arms(laboratory, name, "full")]
    for spec in found:
        same = {
            s.key
            for s in found
            if (s.method, s.targets) == ("full", "last2+head")
            and (s.model, s.steps, s.dtype) == (spec.model, spec.steps, spec.dtype)
        }
        assert len(same) == 1, spec
    assert {s.model for s in found} == set(WIDTH)


# -------------------------------------------------------------------------------------- on one's own model and text

OWN = Own(model="/m/mine", weights="xxh3-1", text="/t/my.txt", corpus="xxh3-2", narrowest=64, width=128)


def test_one_s_own_model_takes_the_place_of_the_laboratory_s(laboratory):
    mine = on_own(laboratory, OWN)
    for name in ("arena", "88", "78"):
        here = [a for a in arms(laboratory, name) if (a.spec.model, a.spec.text) == ("photonic", "sql")]
        there = list(arms(mine, name))
        assert {(a.spec.model, a.spec.text) for a in there} == {("/m/mine", "/t/my.txt")}
        kept = [a for a in here if not OWN.refusal(a.spec, laboratory.home)]
        assert [OWN.placed(a.spec).key for a in kept] == [a.spec.key for a in there]
        assert [a.rates for a in kept] == [a.rates for a in there]  # by method: it has none of its own
        assert left_out(laboratory, name) == {}
    assert laboratory.own is None and mine.own == OWN


@pytest.mark.parametrize(
    ("changes", "fields", "why"),
    [
        ({}, {}, ""),
        ({}, {"model": "stories15m"}, "runs of stories15m"),
        ({}, {"text": "shakespeare"}, "runs on shakespeare"),
        ({}, {"tied": False}, ""),
        ({"tied": False}, {"tied": False}, "runs with a random head in place of a tied one, which this model does not"),
        ({"tied": False}, {}, ""),
        ({"lacks": ("ia3",)}, {"method": "ia3", "k": 0}, "ia3, which peft does not know for this kind of model"),
        ({}, {"k": 64}, ""),
        ({}, {"k": 65}, "K above 64, which is all that this model's narrowest matrix has"),
        ({}, {"k": 8, "schedule": "8>65@1/2"}, "K above 64"),
        ({}, {"k": 128, "method": "scores", "basis": "universal"}, ""),
        ({}, {"k": 129, "method": "scores", "basis": "universal"}, "K above 128"),
        ({}, {"k": 256, "method": "vera"}, ""),
    ],
)
def test_what_cannot_be_placed_on_a_model(changes, fields, why):
    found = OWN.model_copy(update=changes).refusal(Spec(**fields), Spec())
    assert found.startswith(why) if why else found == ""


def test_arms_that_are_left_out_are_counted_by_their_reasons(tmp_path):
    text = '[[arms]]\nk = [2, 4, 100]\n[[arms]]\nmodel = ["photonic", "other"]\nk = [2, 4]\ntied = [true, false]\n'
    laboratory = read_laboratory(write(tmp_path, text))
    mine = on_own(laboratory, OWN.model_copy(update={"tied": False}))
    assert [(a.spec.k, a.spec.tied) for a in arms(mine, "a")] == [(2, True), (4, True)], "an arm twice is one"
    assert sorted(left_out(mine, "a").values()) == [1, 2, 4]
    assert left_out(mine, "a")["runs of other"] == 4


def test_tables_and_figures_of_the_laboratory_s_model_show_one_s_own(laboratory):
    shown = on_own(laboratory, OWN).experiments["arena"]
    titles = [t.title for t in laboratory.experiments["arena"].tables if t.where.get("model") == "photonic"]
    assert titles and {f"{title} (here: mine, my.txt)" for title in titles} < {t.title for t in shown.tables}
    assert "photonic" not in [t.where.get("model") for t in shown.tables]
    assert any(t.where.get("model") == "stories15m" for t in shown.tables)  # none of its arms is there
    assert "photonic" not in [f.where.get("model") for f in shown.figures]
