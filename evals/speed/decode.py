"""Whole models that decode on the CPU: quantkit, dense bfloat16, torchao and llama.cpp, with the same threads.

Each contestant is a process that stays and is asked in turn for some tokens. Before anything is timed, each gives its
logits on the same text, token by token, which must be near the dense model's, and compiled steps must choose the same
tokens as eager ones. Times are process CPU time of a step, from a token to the logits of the next.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from measure import about, surroundings
from table import markdown
from worker import Worker, running

from quantkit.source import open_tokenizer
from speed.frame import PlainRead, in_turn

WORKERS = Path(__file__).resolve().parent / "workers"
LENGTH = 256  # tokens that the caches have room for
PROMPT, FOLLOWED, TIMED = 32, 16, 24  # tokens given at once, given one by one, and timed in a round
BASE, READ = "bfloat16", "plain read"
TEXT = (
    "The lighthouse stands on a rock two miles from the harbour. It was built in 1874, after three ships had been lost "
    "there in one winter, and for ninety years its keepers lived in it with their families, rowed ashore for bread and "
    "letters, and wrote down the weather four times a day."
)


@dataclass(frozen=True)
class Contestant:
    """A program with a model.

    Attributes:
        script: its worker.
        model: in the directory of models.
        allowed: the largest relative error of its logits, against the dense model's.
        torchao: of a torch worker: none, int4 or int8.
    """

    script: str
    model: str
    allowed: float
    torchao: str = "none"

    @property
    def is_torch(self) -> bool:
        return self.script == "torch_decode.py"


_DENSE_ERROR, _W8_ERROR, _W4_ERROR = 0.03, 0.06, 0.5
CONTESTANTS = {
    "bfloat16": Contestant("torch_decode.py", "dense", _DENSE_ERROR),
    "quantkit W4 g64": Contestant("torch_decode.py", "w4_g64", _W4_ERROR),
    "quantkit W4 g64, head W8": Contestant("torch_decode.py", "w4_g64-head_w8", _W4_ERROR),
    "quantkit W4 g32, head W8": Contestant("torch_decode.py", "w4_g32-head_w8", _W4_ERROR),
    "quantkit W4 g32 asymmetric, head W8": Contestant("torch_decode.py", "w4_g32_asym-head_w8", _W4_ERROR),
    "quantkit W8 g64, head W8": Contestant("torch_decode.py", "w8_g64-head_w8", _W8_ERROR),
    "torchao int4 g64, head int8": Contestant("torch_decode.py", "dense", _W4_ERROR, "int4"),
    "torchao int8, head int8": Contestant("torch_decode.py", "dense", _W8_ERROR, "int8"),
    "llama.cpp Q4_0, head Q8_0": Contestant("llama_cpp_decode.py", "Q4_0.gguf", _W4_ERROR),
    "llama.cpp Q4_1, head Q8_0": Contestant("llama_cpp_decode.py", "Q4_1.gguf", _W4_ERROR),
    "llama.cpp Q8_0": Contestant("llama_cpp_decode.py", "Q8_0.gguf", _W8_ERROR),
}


@dataclass(frozen=True)
class Setting:
    """What an invocation was given.

    Attributes:
        models: what speed/models.py wrote.
        llama_cpp: an interpreter with llama_cpp, or None.
        only: patterns of the names of those that take part.
    """

    models: Path
    llama_cpp: str | None
    only: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Line:
    """A line of the table: a contestant with its steps compiled or not.

    Attributes:
        contestant: of the process.
        worker: that process.
        compiled: what it is asked for.
    """

    contestant: Contestant
    worker: Worker
    compiled: bool

    def ask(self, prompt: list[int], follow: list[int] | None, steps: int, logits: Path | None = None) -> Any:
        """Seconds and tokens of some steps, see workers/decoding.py."""
        request = {"prompt": prompt, "follow": follow, "steps": steps, "compiled": self.compiled}
        return self.worker.ask({**request, "logits": None if logits is None else str(logits)})


def study(setting: Setting, rounds: int) -> dict[str, Any]:
    """The results of one model."""
    where = surroundings()
    entered = contestants(setting)
    given = tokens(setting.models / "dense")
    with running({name: partial(start, name, each, setting) for name, each in entered.items()}) as workers:
        told = {name: worker.ask({}) for name, worker in workers.items()}
        lines = {
            f"{name}, compiled" if compiled else name: Line(contestant, workers[name], compiled)
            for name, contestant in entered.items()
            for compiled in ((False, True) if contestant.is_torch else (False,))
        }
        errors = checked(lines, given)
        runs: dict[str, Callable[[], float]] = {READ: PlainRead()}
        runs.update({name: partial(step_time, one, given[:PROMPT]) for name, one in lines.items()})
        seconds = in_turn(runs, rounds)
    found = {
        name: {
            "seconds": seconds[name],
            "bytes": told[name.removesuffix(", compiled")]["bytes"],
            "error": errors[name],
        }
        for name in lines
    }
    versions = {name: value for each in told.values() for name, value in each["versions"].items()}
    read = PlainRead.nbytes / seconds[READ][1]
    return {"where": {**where, **versions}, "rounds": rounds, "read_bytes_per_second": read, "lines": found}


def contestants(setting: Setting) -> dict[str, Contestant]:
    """Those that can take part here."""
    return {
        name: contestant
        for name, contestant in CONTESTANTS.items()
        if (contestant.is_torch or setting.llama_cpp is not None)
        and (contestant.torchao == "none" or find_spec("torchao") is not None)
        and any(fnmatch(name, pattern) for pattern in setting.only)
    }


def start(name: str, contestant: Contestant, setting: Setting) -> Worker:
    """Its process, on as many threads as this one."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    python = sys.executable if contestant.is_torch else setting.llama_cpp
    assert python is not None
    arguments = [str(setting.models / contestant.model), str(LENGTH), threads]
    if contestant.is_torch:
        arguments.append(contestant.torchao)
    return Worker(name, python, WORKERS / contestant.script, arguments)


def tokens(model: Path) -> list[int]:
    """PROMPT + FOLLOWED of a text's."""
    tokenizer = open_tokenizer(model)
    found: list[int] = tokenizer(TEXT).input_ids
    assert len(found) >= PROMPT + FOLLOWED
    return found[: PROMPT + FOLLOWED]


def checked(lines: Mapping[str, Line], given: list[int]) -> dict[str, float]:
    """Name -> relative error of the logits of a text's last tokens, against the dense model's in eager mode.

    What is the same for all tokens is left out of the logits, for it does not change what they say. Stops at a program
    that computes something else.
    """
    errors: dict[str, float] = {}
    exact: dict[str, np.ndarray[Any, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "logits.npy"
        for name, one in lines.items():
            one.ask(given[:PROMPT], given[PROMPT:], FOLLOWED, file)
            logits = np.load(file).astype(np.float64)
            logits -= logits.mean(-1, keepdims=True)
            against = exact.setdefault(BASE, logits)
            errors[name] = float(np.linalg.norm(logits - against) / np.linalg.norm(against))
            print(f"{name}: relative error of the logits {errors[name]:.4f}", flush=True)
            assert errors[name] < one.contestant.allowed, name
    return errors


def step_time(one: Line, prompt: list[int]) -> float:
    """Median CPU seconds of a step, the first left out."""
    return float(statistics.median(one.ask(prompt, None, TIMED)["seconds"][1:]))


def render(results: dict[str, Any]) -> str:
    lines = results["lines"]
    base = lines[BASE]["seconds"][1]
    rows = []
    for name, found in lines.items():
        low, middle, high = found["seconds"]
        share = found["bytes"] / middle / results["read_bytes_per_second"]
        times = f"{1e3 * middle:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"
        row = [name, times, f"{base / middle:.2f}", f"{found['bytes'] / 1e6:.0f}", f"{share:.0%}"]
        rows.append([*row, f"{found['error']:.3f}"])
    heading = ["model", "ms a token", "times as fast", "MB of weights", "of read speed", "error of logits"]
    where = results["where"]
    peers = ", ".join(f"{name} {where[name]}" for name in ("torchao", "llama-cpp-python") if name in where)
    return (
        f"CPU time of a decoding step, the median of {results['rounds']} rounds (its middle half), and times as fast "
        f"as {BASE} in eager mode; the weights that a step reads, and these by its time as a share of the speed of a "
        f"plain read of memory ({results['read_bytes_per_second'] / 1e9:.1f} GB/s).\n\n"
        f"{markdown(heading, rows)}\n{about(where)}{f' {peers}.' if peers else ''}\n"
    )
