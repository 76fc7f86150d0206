"""vLLM (its CPU build) loads what quantkit writes and gives the same log-probabilities.

Run in an environment of its own: make test-peer-vllm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.source import BUILTIN_PATH, open_tokenizer

pytestmark = pytest.mark.peer
pytest.importorskip("vllm")

TEXT = (
    "The built-in function returns a new list that contains the same items as the argument, in the order of "
    "iteration. If the argument is missing, an exception is raised."
)
# bf16 clients lie within 0.01 of the negative log-likelihood and 0.05 of the mean difference on a trained model.
NLL_BOUND, MEAN_BOUND = 0.01, 0.05

_CLIENT = """
import json, sys
from vllm import LLM, SamplingParams
path, ids = sys.argv[1], json.loads(sys.argv[2])
model = LLM(path, dtype="bfloat16", enforce_eager=True, max_model_len=256, disable_log_stats=True)
sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
found = model.generate({"prompt_token_ids": ids}, sampling)[0].prompt_logprobs
print("LOGPROBS", json.dumps([found[i][ids[i]].logprob for i in range(1, len(ids))]))
"""

MIXED = [{"match": "*.down_proj", "scheme": "w4a16_g64"}, {"match": "*.0.self_attn.o_proj", "skip": True}]


def vllm_logprobs(path: Path, ids: list[int]) -> torch.Tensor:
    done = run_vllm(path, ids)
    line = next((line for line in done.stdout.splitlines() if "LOGPROBS" in line), None)
    assert line is not None, done.stderr[-2000:]
    return torch.tensor(json.loads(line.partition("LOGPROBS ")[2]))


def run_vllm(path: Path, ids: list[int]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: vLLM opens one model a process."""
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", _CLIENT, str(path), json.dumps(ids)], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    "recipe",
    [
        {"scheme": "w4a16_g128", "calibration": {"num_samples": 8, "sequence_length": 256}},
        {"scheme": "w4a16_g64_asym", "method": "rtn"},
        {"scheme": "w4a16_channel", "method": "rtn"},
        {"scheme": "w4a16_g128", "method": "rtn", "rules": MIXED},
        {"scheme": "w4a16_g64", "method": "rtn", "format": "gptq"},
        {"scheme": "w4a16_g64", "method": "rtn", "format": "gptq", "rules": [{"match": "*.o_proj", "skip": True}]},
        {"scheme": "w4a16_g64_asym", "method": "rtn", "format": "awq"},
    ],
    ids=["gptq-g128", "asym-g64", "channel", "mixed", "format-gptq", "format-gptq-skipped", "format-awq"],
)
def test_same_log_probabilities(recipe: dict[str, Any], tmp_path: Path) -> None:
    _assert_same(recipe, tmp_path, NLL_BOUND, MEAN_BOUND)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static"])
def test_same_log_probabilities_with_8_bit_activations(scheme: str, tmp_path: Path) -> None:
    """Activations are rounded in bfloat16 there, in float32 here: 0.03 and 0.25 on a trained model."""
    recipe = {"scheme": scheme, "method": "rtn", "calibration": {"num_samples": 4, "sequence_length": 256}}
    _assert_same(recipe, tmp_path, nll=0.03, mean=0.25)


def _assert_same(recipe: dict[str, Any], tmp_path: Path, nll: float, mean: float) -> None:
    quantkit.quantize("builtin", tmp_path / "q", recipe=recipe)
    ids = open_tokenizer(BUILTIN_PATH)(TEXT)["input_ids"][:64]
    model = quantkit.load(tmp_path / "q", dtype="bfloat16")
    with torch.no_grad():
        all_logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    ours = all_logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    theirs = vllm_logprobs(tmp_path / "q", ids)
    assert abs(float(ours.mean() - theirs.mean())) < nll
    assert float((ours - theirs).abs().mean()) < mean


REORDERED = {"name": "gptq", "act_order": "group"}


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"scheme": "w4a16_g64_asym", "method": "rtn", "format": "gptq"}, "bits=4, sym=False"),
        ({"scheme": "w3a16_g64_sym", "method": "rtn", "format": "gptq"}, "bits=3, sym=True"),
        ({"scheme": "w4a16_g64_sym", "method": REORDERED, "format": "gptq"}, "desc_act=True"),
    ],
    ids=["asymmetric", "3-bit", "reordered"],
)
def test_gptq_checkpoints_that_it_refuses(recipe: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """What the plan notes say, so that the day it loads them shows."""
    calibration = {"num_samples": 4, "sequence_length": 256}
    quantkit.quantize("builtin", tmp_path / "q", recipe={**recipe, "calibration": calibration})
    done = run_vllm(tmp_path / "q", [5, 6, 7])
    assert "LOGPROBS" not in done.stdout
    assert reason in done.stderr + done.stdout
