"""The weight that a program uses in its own forward pass, for dense.py to be checked against; in its own environment.

    python forward.py CHECKPOINT LAYER OUTPUT

Loads the checkpoint as transformers does with that program installed, gives the layer the identity matrix, and writes
what comes out, ``weight`` [out, in] in bfloat16.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    checkpoint, name, output = sys.argv[1:]

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="cpu")
    layer = model.get_submodule(name)
    with torch.no_grad():
        model(torch.arange(4)[None])  # some unpack at the first forward pass
        size: Any = layer.infeatures if hasattr(layer, "infeatures") else layer.in_features
        found = layer(torch.eye(size, dtype=torch.bfloat16))
    save_file({"weight": found.T.contiguous()}, Path(output))


if __name__ == "__main__":
    main()
