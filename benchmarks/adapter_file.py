"""Bytes of adapter_model.safetensors: at most 2 bytes a trained number (4 where it is saved in float32) and 2 KB.

python benchmarks/adapter_file.py
"""

import tempfile
from pathlib import Path
from typing import Any

import common as c
from peft import TinyLoraConfig, VeraConfig
from torch import nn

LIMIT = 2048
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def file_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def main(argv: list[str] | None = None) -> str:
    p = c.parser(__doc__, model="smollm2-135m")
    p.add_argument("--tinylora", action="store_true", help="with TinyLoRA, whose full SVDs take a minute")
    args = c.parse(p, argv)
    base = c.load(args)
    rows = []

    def add(name: str, dtype: str, model: nn.Module) -> None:
        numbers, size = sum(q.numel() for q in c.trained(model)), file_bytes(model)
        rest = size - BYTES[dtype] * numbers
        rows.append([name, dtype, f"{numbers:,}", f"{size:,}", f"{rest:,}", "yes" if rest <= LIMIT else "no"])

    for form in ("diagonal", "core", "scores"):
        c.say(f"making {form}")
        for dtype in BYTES:
            add(f"{form} K={args.k}", dtype, c.adapt(base, c.ours(args, form=form, save_dtype=dtype)))
    wide: Any = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for rank in (1, 8):
        add(f"LoRA r={rank}", "float32", c.adapt(base, c.lora(rank)))
    for saved in (True, False):
        kind = "with" if saved else "without"
        config: Any = VeraConfig(r=args.k, save_projection=saved, **wide)
        add(f"VeRA r={args.k}, {kind} projections", "float32", c.adapt(base, config))
        if args.tinylora:
            config = TinyLoraConfig(u=args.k, save_projection=saved, **wide)
            add(f"TinyLoRA r=2, u={args.k}, {kind} projections", "float32", c.adapt(base, config))
    head = ["arm", "saved as", "trained numbers", "bytes", "beyond the numbers", f"within {LIMIT}"]
    return c.show(c.setting(args, base, timed=False), c.table(head, rows))


if __name__ == "__main__":
    main()
