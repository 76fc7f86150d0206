"""How often the Triton kernels are compiled for a model: once for each kind of tile, whatever the layers' shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_seven_shapes_of_layers_and_any_rows_of_x_share_six_kernels() -> None:
    """8, 16 and 32 rows of x a program, K split or not. 455 launches; sizes and strides are no part of the key."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("launch_keys.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["keys"] == [[tokens, split, 1] for tokens in (8, 16, 32) for split in (False, True)]
    assert found["launches"] == 7 * 65
