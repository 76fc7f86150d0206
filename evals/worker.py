"""A program that a study keeps running and asks in turn: a line of JSON in, a line of JSON out.

Requests come from the standard input. Answers go to the file descriptor that the command line's first word names, since
programs print what they like on the standard output, when they are imported already. Standard library only: each
worker runs in its program's own environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

EVALS = Path(__file__).resolve().parent


class Worker:
    """The study's side.

    Args:
        name: what messages call it.
        python: the interpreter of its environment.
        script: what it runs.
        arguments: after the descriptor.
        environment: added to this process's.
    """

    def __init__(
        self,
        name: str,
        python: str,
        script: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        paths = [str(EVALS), *([os.environ.get("PYTHONPATH", "")] if python == sys.executable else [])]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        read, write = os.pipe()
        self.answers = os.fdopen(read)
        self.process = subprocess.Popen(
            [python, str(script), str(write), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            pass_fds=(write,),
            env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
        )
        os.close(write)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer; the study ends here when the worker has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.answers.readline()
        if not answer:
            code = self.process.wait()
            self.errors.seek(0)
            last = self.errors.read().decode(errors="replace")[-2000:]
            sys.exit(f"{self.name}: its worker ended with exit code {code} at {request}\n{last}")
        found: dict[str, Any] = json.loads(answer)
        return found


@contextmanager
def running(workers: Mapping[str, Callable[[], Worker]]) -> Iterator[dict[str, Worker]]:
    """Start workers, and end them when the study does."""
    with ExitStack() as stack:
        found = {}
        for name, start in workers.items():
            found[name] = start()
            stack.callback(found[name].process.kill)
        yield found


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The program's side: answer requests until the input ends."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
