"""llama.cpp by the bindings of llama-cpp-python, or with its library from elsewhere (LLAMA_CPP_LIB_PATH)."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import __version__
from llama_cpp import llama_cpp as lib

from speed.workers.decoding import serve


def load_backends() -> None:
    """A library from elsewhere may have its kernels in files beside it, one a kind of CPU; ggml takes the best."""
    where = os.environ.get("LLAMA_CPP_LIB_PATH")
    if where is not None and list(Path(where).glob("libggml-cpu-*")):
        ggml = next(path for path in Path(where).glob("libggml*.so") if not path.name.startswith("libggml-"))
        ctypes.CDLL(str(ggml)).ggml_backend_load_all_from_path(where.encode())


class LlamaCpp:
    def __init__(self, path: str, length: int, threads: int) -> None:
        load_backends()
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        assert self.model, path
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = length, threads, threads
        self.context = lib.llama_init_from_model(self.model, options)
        assert self.context, path
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.bytes = Path(path).stat().st_size

    def about(self) -> dict[str, Any]:
        told = lib.llama_print_system_info().decode()
        return {"bytes": self.bytes, "versions": {"llama-cpp-python": __version__, "llama.cpp": told}}

    def start(self, prompt: list[int], compiled: bool) -> Any:
        assert not compiled
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        return self._decode(prompt)

    def step(self, token: int) -> Any:
        return self._decode([token])

    def _decode(self, tokens: list[int]) -> Any:
        given = (lib.llama_token * len(tokens))(*tokens)
        code = lib.llama_decode(self.context, lib.llama_batch_get_one(given, len(tokens)))
        assert code == 0, code
        return lib.llama_get_logits_ith(self.context, -1)

    def numbers(self, logits: Any) -> np.ndarray[Any, Any]:
        return np.ctypeslib.as_array(logits, (self.vocabulary,)).copy()


if __name__ == "__main__":
    serve(LlamaCpp(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
