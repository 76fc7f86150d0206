"""Run a command and measure what it cost: CPU time and peak resident memory of the whole process.

Standard library only, so that this process is small: the kernel counts what the parent held when the child started into
the child's peak.
"""

from __future__ import annotations

import datetime
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUANTKIT = (sys.executable, "-m", "quantkit")
_EVERY = 0.005  # seconds between two looks at a running process
_PACKAGES = ("quantkit", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Usage:
    """A finished command.

    Attributes:
        exit_code: 0 is success; negative is the signal that ended it.
        output: what it printed on both streams.
        cpu_seconds: user and system time, of all its threads.
        wall_seconds: from start to end.
        peak_bytes: the most memory that was resident at a time, mapped files counted (ru_maxrss). How much of torch's
            libraries is mapped at a time is the kernel's choice: the same command twice differed by 115 MB.
        peak_own_bytes: the most memory of its own (RssAnon: heap, stacks, anonymous mappings; no mapped files), seen
            every 5 ms, which may miss a shorter peak.
    """

    exit_code: int
    output: str
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    peak_own_bytes: int


def measure(command: Sequence[str], data_limit: int | None = None) -> Usage:
    """Run a command to its end.

    Args:
        command: program and arguments; no shell.
        data_limit: RLIMIT_DATA in bytes: the kernel refuses the process more private writable memory (heap, anonymous
            and private file mappings) than this. The shell's word for it is ``ulimit -d KIBIBYTES``.
    """

    def limit() -> None:
        if data_limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))

    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=limit)
        own = 0
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            own = max(own, _own_bytes(process.pid))
            time.sleep(_EVERY)
        _, status, used = ended
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Usage(process.returncode, text, used.ru_utime + used.ru_stime, wall, used.ru_maxrss * 1024, own)


def _own_bytes(pid: int) -> int:
    """Resident memory that no file stands behind; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def measure_success(command: Sequence[str], data_limit: int | None = None) -> Usage:
    """:func:`measure`, and the study ends here when the command fails."""
    print(f"$ {shown(command)}", flush=True)
    usage = measure(command, data_limit)
    if usage.exit_code != 0:
        sys.exit(f"exit code {usage.exit_code}:\n{usage.output}")
    return usage


def baseline() -> Usage:
    """An interpreter that imports what every quantkit run imports, and does nothing."""
    imports = "import torch, quantkit.run; from transformers import AutoTokenizer, LlamaForCausalLM"
    return measure_success((sys.executable, "-c", imports))


def shown(command: Sequence[str]) -> str:
    """A command as it is typed."""
    return shlex.join(command).replace(shlex.join(QUANTKIT), "quantkit")


def surroundings() -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": _of_cpu("model name") or platform.machine(),
        "instructions": _widest(_of_cpu("flags").split()),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
        "load_average_at_start": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def about(where: dict[str, Any]) -> str:
    """Surroundings in one sentence."""
    return (
        f"Measured on {where['date']} on {where['cores']} cores of {processor(where)}, "
        f"OMP_NUM_THREADS={where['threads']}, "
        f"load average {where['load_average_at_start']:.1f} at the start; torch {where['torch']}, "
        f"transformers {where['transformers']}, quantkit {where['quantkit']}."
    )


def processor(where: dict[str, Any]) -> str:
    """The processor of some surroundings, which may be called alike for years, and the instructions that it has."""
    return ", ".join(filter(None, (where["cpu"], where.get("instructions"))))


def _of_cpu(key: str) -> str:
    """What Linux says of the first core; nothing where it does not."""
    return next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.split(":")[0].strip() == key), "")


def _widest(flags: Sequence[str]) -> str:
    """Of the instructions for vectors and matrices that /proc/cpuinfo names."""
    kinds = (("amx_bf16", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
    return next((name for flag, name in kinds if flag in flags), "")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
