import json

from command import assert_one_sentence


def test_inspect(ctsft, files, tmp_path):
    code, out, _ = ctsft("inspect", files[0], "--k", "4", "--json", "--plot", tmp_path / "s.svg")
    found = json.loads(out)
    assert code == 0 and found["k"] == 4 and len(found["matrices"]) == 16
    assert (tmp_path / "s.svg").read_text().count("<svg")
    code, out, _ = ctsft("inspect", files[0], "--k", "4")
    assert code == 0 and "q_proj" in out
    assert_one_sentence(ctsft("inspect", files[0], "--k", "0"), "must be at least 1")
    assert_one_sentence(ctsft("inspect", files[0], "--plot", tmp_path / "s.doc"), ".svg")


def test_inspect_universal_does_not_load_the_model(ctsft, files, tmp_path, monkeypatch):
    whole = json.loads(ctsft("inspect", files[0], "--k", "5", "--json")[1])["universal"]
    monkeypatch.setattr("ctsft.models.load.load_model", None)
    code, out, _ = ctsft("inspect", files[0], "--universal", "--k", "5", "--json")
    assert code == 0 and json.loads(out) == {"model": files[0], "d_model": 32, "k": 5, "universal": whole}
    code, out, _ = ctsft("inspect", files[0], "--universal", "--k", "5")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and ["5", f"{whole['explained']:.1%}"] in lines and ["32", "100.0%"] in lines
    for arguments, message in (
        ((files[0], "--k", "0"), "must be at least 1"),
        ((files[0], "--plot", tmp_path / "s.svg"), "nothing to --plot"),
        ((tmp_path,), "has no config.json"),
    ):
        assert_one_sentence(ctsft("inspect", *arguments, "--universal"), message)
