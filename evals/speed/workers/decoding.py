"""What a worker of the decoding study is asked and answers; how it talks is evals/worker.py.

In:  {"prompt": [...], "follow": [...] or null, "steps": 8, "compiled": false, "logits": FILE or null}
Out: {"seconds": [...], "tokens": [...]}, of each step CPU seconds of all threads and the most likely token after it
In:  {} Out: {"bytes": ..., "versions": {...}}, of the weights that a step reads

Tokens after the prompt are those of ``follow``, or the most likely ones. The file gets the logits after the prompt and
after each step, float32 [1 + steps, vocabulary]. Standard library and numpy only.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import worker


class Program(Protocol):
    def about(self) -> dict[str, Any]: ...

    def start(self, prompt: list[int], compiled: bool) -> Any:
        """The logits after a prompt; steps are compiled or not from now on."""

    def step(self, token: int) -> Any:
        """The logits after one more token: what is timed."""

    def numbers(self, logits: Any) -> np.ndarray[Any, Any]:
        """float32 [vocabulary]."""


def serve(program: Program) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return program.about() if not request else decode(program, request)

    worker.serve(answer)


def decode(program: Program, request: dict[str, Any]) -> dict[str, Any]:
    seconds, tokens = [], []
    found = [program.numbers(program.start(request["prompt"], request["compiled"]))]
    for i in range(request["steps"]):
        token = int(found[-1].argmax()) if request["follow"] is None else request["follow"][i]
        started = time.process_time()
        logits = program.step(token)
        seconds.append(time.process_time() - started)
        found.append(program.numbers(logits))
        tokens.append(int(found[-1].argmax()))
    if request["logits"] is not None:
        np.save(request["logits"], np.stack(found))
    return {"seconds": seconds, "tokens": tokens}
