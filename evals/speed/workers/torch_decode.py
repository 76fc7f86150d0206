"""Models in torch: as ``quantkit bench`` opens them, with torchao's weights in the place of dense ones where asked."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.generation import Decoder
from quantkit.opening import open_for_decoding
from speed.frame import stored_bytes
from speed.workers.decoding import serve


class TorchProgram:
    """Eager steps and compiled ones, of one model."""

    def __init__(self, model: str, length: int, torchao: str, dtype: str) -> None:
        self.model, notes = open_for_decoding(model, device="cpu", dtype=dtype)
        assert not notes, notes
        if torchao != "none":
            put_torchao(self.model, torchao)
        self.decoders = {compiled: Decoder(self.model, length, compiled=compiled) for compiled in (False, True)}
        self.decoder = self.decoders[False]

    def about(self) -> dict[str, Any]:
        packages = ("quantkit", "torch", "torchao") if "torchao" in sys.modules else ("quantkit", "torch")
        return {"bytes": read_bytes(self.model), "versions": {name: version(name) for name in packages}}

    def start(self, prompt: list[int], compiled: bool) -> Tensor:
        self.decoder = self.decoders[compiled]
        return self.decoder.prefill(torch.tensor(prompt))

    def step(self, token: int) -> Tensor:
        return self.decoder.step(token)

    def numbers(self, logits: Tensor) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = logits.float().numpy()
        return found


def put_torchao(model: nn.Module, kind: str) -> None:
    """All linears in int8, or those of the blocks in int4, groups of 64, and the head in int8."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_head(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name == "lm_head"

    def is_inside(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_head)
    int4 = PrototypeInt4WeightOnlyConfig(group_size=64)
    quantize_(model, int4 if kind == "int4" else Int8WeightOnlyConfig(), filter_fn=is_inside)


def read_bytes(model: nn.Module) -> int:
    """Of the weights that a step reads: all, of an embedding that is no head only one row."""
    total = 0
    head = model.get_output_embeddings()._parameters.get("weight")  # type: ignore[operator]
    for module in model.modules():
        size = stored_bytes(t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
        if isinstance(module, nn.Embedding):
            size = 0 if module.weight is head else size // module.num_embeddings
        total += size
    return total


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    serve(TorchProgram(sys.argv[2], int(sys.argv[3]), *sys.argv[5:]))
