"""Build the wheels and source archives into dist/, and try them as a stranger would: in an empty environment, from an
empty folder. First the plugin alone, then with the extras tune and lab. Called by `make dist`; needs the package index.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
PROJECTS = (ROOT, ROOT / "packages" / "ctsft-photonic")
NOT_IN_THE_PLUGIN = ("trl", "datasets", "matplotlib", "scipy", "jinja2", "gguf", "ctsft_photonic")

PLUGIN = f"""
import importlib.util, torch, ctsft
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
assert "site-packages" in ctsft.__file__, ctsft.__file__
found = [name for name in {NOT_IN_THE_PLUGIN} if importlib.util.find_spec(name) and name != "jinja2"]
assert not found, f"the plugin brought {{found}}"
ids = torch.arange(8)[None]
model = get_peft_model(AutoModelForCausalLM.from_pretrained("tiny"), ctsft.CTConfig(k=4))
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], ctsft.learning_rate(model))
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
ctsft.save_adapter(model, "adapter")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny"), "adapter")
with torch.no_grad():
    wanted, got = (m.eval()(ids).logits for m in (model, again))
    with model.disable_adapter():
        assert not torch.equal(model(ids).logits, wanted), "training changed nothing"
assert torch.equal(wanted, got), "the loaded adapter is another one"
print("adapter trained, saved and loaded:", (wanted - got).abs().max().item())
"""


def run(*command: object, fails: str = "", **options: object) -> str:
    """Run a command and return what it printed; with `fails`, it must exit with 2 and say that."""
    words = [str(word) for word in command]
    print("$", " ".join(word if "\n" not in word else "..." for word in words), flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    right = done.returncode == 2 and fails in done.stdout if fails else done.returncode == 0
    if not right:
        sys.exit(f"{done.stdout}\nexit status {done.returncode}" + (f", wanted 2 and {fails!r}" if fails else ""))
    return str(done.stdout).strip()


def build() -> list[Path]:
    """Source archives, and wheels made from those; the wheels."""
    shutil.rmtree(DIST, ignore_errors=True)
    for project in PROJECTS:
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, project)
    for file in sorted(DIST.iterdir()):
        print(f"{file.stat().st_size:>12,} bytes  {file.name}")
    return sorted(DIST.glob("*.whl"))


def main() -> None:
    plugin = next(wheel for wheel in build() if not wheel.name.startswith("ctsft_photonic"))
    with tempfile.TemporaryDirectory(prefix="ctsft-dist-") as folder:
        here = {"cwd": folder, "env": {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}}
        run(sys.executable, "-m", "venv", "empty", **here)
        python = Path(folder, "empty", "bin", "python")
        ctsft = python.with_name("ctsft")

        def install(extra: str) -> None:
            pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
            run(*pip, "--find-links", DIST, f"ctsft{extra} @ {plugin.as_uri()}", **here)

        install("")
        make = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import tiny; tiny.save_model('tiny'); "
        run(python, "-c", make + "tiny.save_rows(pathlib.Path('my.jsonl'))", ROOT / "tests", **here)
        print(run(python, "-c", PLUGIN, **here))
        run(ctsft, "--help", **here)
        run(ctsft, "export", "adapter", "--model", "tiny", "--to", "lora", "--out", "lora", **here)
        quickstart = (ctsft, "tune", "--model", "tiny", "--data", "my.jsonl", "--k", 4, "--steps", 4)
        run(*quickstart, fails="pip install 'ctsft[tune]'", **here)
        run(ctsft, "lab", "report", fails="pip install 'ctsft[", **here)

        install("[tune]")
        run(*quickstart, "--out", "runs/mine", **here)
        run(ctsft, "sample", "runs/mine", "--prompt", "red green blue?", "--base", **here)
        run(ctsft, "export", "runs/mine", "--to", "merged", **here)
        run(ctsft, "inspect", "tiny", "--k", 4, "--plot", "spectra.svg", **here)
        for name in ("adapter/adapter_model.safetensors", "run.json", "report.html"):
            assert Path(folder, "runs", "mine", name).exists(), name
        run(ctsft, "inspect", "photonic", fails="pip install 'ctsft[lab]'", **here)

        install("[lab]")
        run(ctsft, "inspect", "photonic", **here)
        run(ctsft, "lab", "list", **here)
    print("the plugin, ctsft[tune] and ctsft[lab] work from their wheels")


if __name__ == "__main__":
    main()
