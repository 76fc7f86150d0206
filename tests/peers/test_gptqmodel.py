"""transformers with gptqmodel loads the GPTQ and AWQ checkpoints that quantkit writes: the same log-probabilities.

Run with an environment of gptqmodel: make test-peer-gptqmodel. Seen with gptqmodel 7.7, optimum 2.3, transformers 5.24.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_programs import TEXT, assert_close, interpreter, log_probabilities, run, words_after
from torch import Tensor

import quantkit
from quantkit.source import BUILTIN_PATH, open_tokenizer

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

_CLIENT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids = json.loads(sys.argv[1])
for name in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map="cpu")
        with torch.no_grad():
            found = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)[:-1]
        chosen = found.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    except RuntimeError as error:
        print("REFUSED", name, str(error).splitlines()[0], flush=True)
    else:
        print("LOGPROBS", name, json.dumps(chosen.tolist()), flush=True)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    interpreter("gptqmodel")
    found = tmp_path_factory.mktemp("written")
    for name, recipe in {**RECIPES, **REFUSED}.items():
        quantkit.quantize("builtin", found / name, recipe={"method": "rtn", **recipe})
    return found


@pytest.fixture(scope="module")
def ids() -> list[int]:
    found: list[int] = open_tokenizer(BUILTIN_PATH)(TEXT)["input_ids"][:64]
    return found


@pytest.fixture(scope="module")
def said(directory: Path, ids: list[int]) -> str:
    """One process for all: the program takes longer to import than to load these models."""
    return run("gptqmodel", "-c", _CLIENT, json.dumps(ids), *RECIPES, *REFUSED, cwd=directory)


def ours(path: Path, ids: list[int]) -> Tensor:
    model = quantkit.load(path, dtype="bfloat16")
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return found[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", RECIPES)
def test_same_log_probabilities(name: str, directory: Path, ids: list[int], said: str) -> None:
    assert_close(ours(directory / name, ids), log_probabilities(said)[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_run(name: str, said: str) -> None:
    assert "qGroupSize" in words_after("REFUSED", said)[name]
