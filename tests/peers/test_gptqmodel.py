"""transformers with gptqmodel loads the GPTQ and AWQ checkpoints that quantkit writes: the same log-probabilities.

Run with an environment of gptqmodel: make test-peer-gptqmodel. Seen with gptqmodel 7.7, optimum 2.3, transformers 5.24.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peer_clients import GPTQMODEL, Answers, ask, builtin_ids, own_logprobs
from peer_programs import assert_close, interpreter

import quantkit

pytestmark = pytest.mark.peer

CALIBRATION = {"num_samples": 4, "sequence_length": 256}
REORDERED = {"method": {"name": "gptq", "act_order": "group"}, "calibration": CALIBRATION}
SKIPPED = [{"match": "*.down_proj", "skip": True}]
RECIPES: dict[str, dict[str, Any]] = {
    "gptq-sym": {"scheme": "w4a16_g64_sym", "format": "gptq"},
    "gptq-asym": {"scheme": "w4a16_g64_asym", "format": "gptq"},
    "gptq_v2-asym": {"scheme": "w4a16_g64_asym", "format": "gptq_v2"},
    "gptq-2": {"scheme": "w2a16_g64_asym", "format": "gptq"},
    "gptq-3": {"scheme": "w3a16_g64_asym", "format": "gptq"},
    "gptq-8": {"scheme": "w8a16_g64_sym", "format": "gptq"},
    "gptq-reordered": {"scheme": "w4a16_g64_sym", "format": "gptq", **REORDERED},
    "gptq-skipped": {"scheme": "w4a16_g64_sym", "format": "gptq", "rules": SKIPPED},
    "awq": {"scheme": "w4a16_g64_asym", "format": "awq"},
    "awq-skipped": {"scheme": "w4a16_g64_asym", "format": "awq", "rules": SKIPPED},
}
# What it does not run on the CPU, so that the day it does shows: torch's int4 product has groups of at most 256.
REFUSED = {"gptq-channel": {"scheme": "w4a16_channel_sym", "format": "gptq"}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    interpreter("gptqmodel")
    found = tmp_path_factory.mktemp("written")
    for name, recipe in {**RECIPES, **REFUSED}.items():
        quantkit.quantize("builtin", found / name, recipe={"method": "rtn", **recipe})
    return found


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return builtin_ids()


@pytest.fixture(scope="module")
def said(directory: Path, ids: list[int]) -> Answers:
    return ask(GPTQMODEL, dict.fromkeys((*RECIPES, *REFUSED), ids), directory)


@pytest.mark.parametrize("name", RECIPES)
def test_same_log_probabilities(name: str, directory: Path, ids: list[int], said: Answers) -> None:
    assert_close(own_logprobs(directory / name, ids), said.given(name))


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_run(name: str, said: Answers) -> None:
    assert "qGroupSize" in said.refused[name]
