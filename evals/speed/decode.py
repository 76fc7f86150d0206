"""Whole models that decode on the CPU: quantkit, dense bfloat16, torchao and llama.cpp, with the same threads.

Each contestant is a process that stays and is asked in turn for some tokens. Before anything is timed, each gives its
logits on the same text, token by token, which must be near those of its own weights, dequantized, in float32: within
twice what bfloat16 costs the dense model in torch, measured in the same run, times how coarsely the program rounds
activations (``Contestant.rounding``). Times are process CPU time of a step, from a token to the logits of the next.
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
from speed.exact import exact_logits
from speed.frame import PlainRead, in_turn

WORKERS = Path(__file__).resolve().parent / "workers"
LENGTH = 256  # tokens that the caches have room for
PROMPT, FOLLOWED, TIMED = 32, 16, 24  # tokens given at once, given one by one, and timed in a round
BASE, READ, DENSE = "bfloat16", "plain read", "dense"
Logits = np.ndarray[Any, Any]
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
        rounding: how coarsely it rounds what it multiplies weights with: root mean square of the relative error, in
            bfloat16's.
        torchao: of a torch worker: none, int4 or int8.
        dtype: of a torch worker.
    """

    script: str
    model: str
    rounding: float = 1.0
    torchao: str = "none"
    dtype: str = "bfloat16"

    @property
    def is_torch(self) -> bool:
        return self.script == "torch_decode.py"


def torch_program(model: str, torchao: str = "none", dtype: str = "bfloat16") -> Contestant:
    return Contestant("torch_decode.py", model, torchao=torchao, dtype=dtype)


def llama_cpp(model: str) -> Contestant:
    return Contestant("llama_cpp_decode.py", model, BLOCKS_OF_8_BITS)


# Of normal numbers, 8 bits in blocks of 32, as llama.cpp's products round activations, lose 0.0054, bfloat16 0.0017.
BLOCKS_OF_8_BITS = 3.2
_DENSE_ERROR = 0.03  # the most that bfloat16 may cost the dense model
CONTESTANTS = {
    "bfloat16": torch_program(DENSE),
    "float32": torch_program(DENSE, dtype="float32"),
    "quantkit W4 g64": torch_program("w4_g64"),
    "quantkit W4 g64, head W8": torch_program("w4_g64-head_w8"),
    "quantkit W4 g32, head W8": torch_program("w4_g32-head_w8"),
    "quantkit W4 g32 asymmetric, head W8": torch_program("w4_g32_asym-head_w8"),
    "quantkit W8 g64, head W8": torch_program("w8_g64-head_w8"),
    "torchao int4 g64, head int8": torch_program(DENSE, "int4"),
    "torchao int8, head int8": torch_program(DENSE, "int8"),
    "llama.cpp Q4_0, head Q8_0": llama_cpp("Q4_0.gguf"),
    "llama.cpp Q4_1, head Q8_0": llama_cpp("Q4_1.gguf"),
    "llama.cpp Q8_0": llama_cpp("Q8_0.gguf"),
}


@dataclass(frozen=True)
class Setting:
    """What an invocation was given.

    Attributes:
        models: what speed/models.py wrote.
        llama_cpp: an interpreter with llama_cpp, or None.
        only: patterns of the lines of the table that are asked for.
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
    given = tokens(setting.models / DENSE)
    with running({name: partial(start, name, each, setting) for name, each in entered.items()}) as workers:
        told = {name: worker.ask({}) for name, worker in workers.items()}
        lines = {
            line: Line(contestant, workers[name], line != name)
            for name, contestant in entered.items()
            for line in asked_lines(name, contestant, setting)
        }
        errors, lost = checked(lines, given, setting.models)
        runs: dict[str, Callable[[], float]] = {READ: PlainRead()}
        runs.update({name: partial(step_time, one, given[:PROMPT]) for name, one in lines.items()})
        seconds = in_turn(runs, rounds)
    found = {
        name: {
            "seconds": seconds[name],
            "bytes": told[name.removesuffix(", compiled")]["bytes"],
            "error": errors[name],
            "lost": lost[name],
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
        and asked_lines(name, contestant, setting)
    }


def asked_lines(name: str, contestant: Contestant, setting: Setting) -> list[str]:
    """Of a contestant: its own name, and where it can compile its steps that name with ``, compiled``."""
    both = [name, f"{name}, compiled"] if contestant.is_torch else [name]
    return [line for line in both if any(fnmatch(line, pattern) for pattern in setting.only)]


def start(name: str, contestant: Contestant, setting: Setting) -> Worker:
    """Its process, on as many threads as this one."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    python = sys.executable if contestant.is_torch else setting.llama_cpp
    assert python is not None
    arguments = [str(setting.models / contestant.model), str(LENGTH), threads]
    if contestant.is_torch:
        arguments += [contestant.torchao, contestant.dtype]
    return Worker(name, python, WORKERS / contestant.script, arguments)


def tokens(model: Path) -> list[int]:
    """PROMPT + FOLLOWED of a text's."""
    tokenizer = open_tokenizer(model)
    found: list[int] = tokenizer(TEXT).input_ids
    assert len(found) >= PROMPT + FOLLOWED
    return found[: PROMPT + FOLLOWED]


def checked(lines: Mapping[str, Line], given: list[int], models: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Name -> relative error of a text's last logits against those of its own weights; name -> that of these weights,
    against the dense ones.

    What is the same for all tokens is left out of the logits, for it does not change what they say. Stops at a program
    that computes something else. BASE, which says how near is near, is the first line.
    """
    errors: dict[str, float] = {}
    lost: dict[str, float] = {}
    exact: dict[tuple[str, str], Logits] = {}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "logits.npy"
        for name, one in lines.items():
            of, bound = one.contestant, _DENSE_ERROR
            if BASE in errors:
                bound = 2 * of.rounding * errors[BASE]
            key = (of.model, of.torchao)
            if key not in exact:
                exact[key] = centred(exact_logits(models / of.model, of.torchao, given, FOLLOWED))
            one.ask(given[:PROMPT], given[PROMPT:], FOLLOWED, file)
            errors[name] = distance(centred(np.load(file)), exact[key])
            lost[name] = distance(exact[key], exact[(DENSE, "none")])
            print(f"{name}: error {errors[name]:.4f} (bound {bound:.4f}), weights {lost[name]:.4f}", flush=True)
            assert errors[name] < bound, name
    return errors, lost


def centred(logits: Logits) -> Logits:
    """float64, without what all tokens have."""
    wide = logits.astype(np.float64)
    wide -= wide.mean(-1, keepdims=True)
    return wide


def distance(found: Logits, wanted: Logits) -> float:
    """Relative, of all elements together."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


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
        rows.append([*row, f"{found['error']:.4f}", f"{found['lost']:.3f}"])
    heading = ["model", "ms a token", "times as fast", "MB of weights", "of read speed", "its error", "its weights"]
    where = results["where"]
    peers = ", ".join(f"{name} {where[name]}" for name in ("torchao", "llama-cpp-python") if name in where)
    return (
        f"CPU time of a decoding step, the median of {results['rounds']} rounds (its middle half), and times as fast "
        f"as {BASE} in eager mode; the weights that a step reads, and these by its time as a share of the speed of a "
        f"plain read of memory ({results['read_bytes_per_second'] / 1e9:.1f} GB/s). Its error: of the logits, "
        f"against those of the same weights dequantized, in float32; its weights: of those logits, against the dense "
        f"model's.\n\n"
        f"{markdown(heading, rows)}\n{about(where)}{f' {peers}.' if peers else ''}\n"
    )
