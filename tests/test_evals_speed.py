"""The speed studies' own code: products are checked before they are timed, files hold what their names say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

EVALS = Path(__file__).resolve().parent.parent / "evals"
WHERE = {
    "date": "d",
    "cores": 1,
    "cpu": "c",
    "instructions": "AMX",
    "threads": "1",
    "load_average_at_start": 0.0,
    "torch": "t",
}
WHERE |= {"transformers": "t", "quantkit": "q"}


@pytest.fixture(autouse=True)
def evals_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EVALS))


def test_contestants_run_in_every_round_and_the_middle_counts() -> None:
    from speed.frame import in_turn

    order: list[str] = []

    def contestant(name: str, times: list[float]) -> Any:
        left = iter(times)

        def run() -> float:
            order.append(name)
            return next(left)

        return run

    found = in_turn({"a": contestant("a", [1, 9, 2, 3, 4]), "b": contestant("b", [5, 5, 5, 5, 5])}, rounds=5)
    assert found == {"a": [2.0, 3.0, 4.0], "b": [5.0, 5.0, 5.0]}
    assert [set(order[i : i + 2]) for i in range(0, 10, 2)] == [{"a", "b"}] * 5
    assert len({tuple(order[i : i + 2]) for i in range(0, 10, 2)}) == 2  # not always in one order


def test_cpu_products_are_checked_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from speed import linear

    monkeypatch.setattr(linear, "POOL_BYTES", 1)
    monkeypatch.setattr(linear, "TOKENS", (1, 3))
    cases = linear.one_shape(48, 64, rounds=2)
    assert [case["tokens"] for case in cases] == [1, 3]
    assert all(low <= middle <= high for low, middle, high in cases[0]["seconds"].values())
    assert all(low > 0 for low, _, _ in cases[0]["seconds"].values())
    assert cases[0]["nbytes"][linear.BASE] == 2 * 48 * 64
    table = linear.render({"cases": cases, "rounds": 2, "where": WHERE})
    assert "| 1 token | 48x64 |" in table
    assert "| 3 tokens | 48x64 |" in table
    with pytest.raises(AssertionError, match=r"w8a8.*relative error"):
        linear.check("w8a8", torch.ones(3), torch.full((3,), 1.1, dtype=torch.float64), 0.025)


def test_every_backend_of_this_cpu_takes_part() -> None:
    from speed import linear

    from quantkit import parse_scheme
    from quantkit.kernels import LinearSpec, choose_backend

    entered = linear.contestants(64, 128)
    for name in linear.SCHEMES:
        first = choose_backend(LinearSpec(128, 64, parse_scheme(name), torch.bfloat16, "cpu")).name
        assert f"{name}, {first}" in entered or first in linear.FALLBACKS


def test_the_ratio_is_that_of_the_medians() -> None:
    from speed import linear

    seconds = {linear.BASE: [1.0, 2.0, 3.0], "other": [0.4, 0.5, 0.8]}
    case = {"shape": [2, 3], "tokens": 1, "seconds": seconds, "read_bytes_per_second": 100.0}
    table = linear.render({"cases": [{**case, "nbytes": {linear.BASE: 20, "other": 40}}], "rounds": 3, "where": WHERE})
    assert "| other | 4.00 (2.50-5.00); 80% |" in table
    assert f"| {linear.BASE} | 2000.000 ms (1000.000-3000.000); 10% |" in table


def test_bytes_of_tensors_that_hold_others() -> None:
    from speed.frame import stored_bytes

    class Holder(torch.Tensor):
        held: Tensor

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["held"], None

    holder = torch.zeros(100).as_subclass(Holder)
    holder.held = torch.zeros(3, dtype=torch.int8)
    assert stored_bytes([holder, torch.zeros(2, dtype=torch.bfloat16)]) == 3 + 4


def test_a_gguf_names_and_arranges_what_the_model_has(tmp_path: Path) -> None:
    from speed.gguf_file import arranged, gguf_name

    model = save_tiny("llama", tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(model).named_parameters()]
    found = [gguf_name(name) for name in names]
    assert len(set(found)) == len(names)
    assert {"token_embd.weight", "output_norm.weight", "blk.2.ffn_up.weight", "blk.0.attn_q.weight"} <= set(found)

    heads = config["num_attention_heads"]
    rows = torch.arange(config["hidden_size"], dtype=torch.float32)[:, None]
    size = config["hidden_size"] // heads
    q = arranged("model.layers.0.self_attn.q_proj.weight", rows, config)[:, 0].view(heads, size)
    # llama.cpp rotates neighbours, transformers a head's halves: rows i and i + size/2 become 2i and 2i + 1.
    for i in range(size // 2):
        assert q[1, 2 * i : 2 * i + 2].tolist() == [size + i, size + i + size // 2]
    assert arranged("model.layers.0.self_attn.v_proj.weight", rows, config) is rows


class Counting:
    """A program whose next token is always one more, and whose logits say so."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def about(self) -> dict[str, Any]:
        return {"bytes": 1, "versions": {}}

    def start(self, prompt: list[int], compiled: bool) -> int:
        assert not compiled
        return prompt[-1]

    def step(self, token: int) -> int:
        return token

    def numbers(self, logits: int) -> np.ndarray[Any, Any]:
        found = np.zeros(100, dtype=np.float32)
        found[logits + 1] = 1 + self.noise
        return found


def test_decoding_takes_the_likeliest_token_or_the_given_one(tmp_path: Path) -> None:
    from speed.workers.decoding import decode

    request: dict[str, Any] = {"prompt": [3, 7], "follow": None, "steps": 3, "compiled": False, "logits": None}
    answer = decode(Counting(), request)
    assert answer["tokens"] == [9, 10, 11]
    assert len(answer["seconds"]) == 3
    file = tmp_path / "logits.npy"
    followed = decode(Counting(), {**request, "follow": [20, 30, 40], "logits": str(file)})
    assert followed["tokens"] == [21, 31, 41]
    assert np.load(file).argmax(-1).tolist() == [8, 21, 31, 41]


class InProcess:
    """A worker that is no process."""

    def __init__(self, program: Counting) -> None:
        self.program = program

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        from speed.workers.decoding import decode

        return decode(self.program, request)


def test_a_program_that_computes_something_else_stops_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its own weights; how near is near is what BASE has, twice, times the program's own rounding."""
    from speed import decode
    from speed.decode import BASE, FOLLOWED, PROMPT, Contestant, Line, checked, step_time

    given = list(range(PROMPT + FOLLOWED))
    exact = np.zeros((FOLLOWED + 1, 100))
    exact[np.arange(FOLLOWED + 1), np.arange(PROMPT, PROMPT + FOLLOWED + 1)] = 1
    monkeypatch.setattr(decode, "exact_logits", lambda path, *_: exact * (2 if path.name == "coarse" else 1))

    def line(noise: float, rounding: float = 1.0, model: str = "dense") -> Any:
        worker: Any = InProcess(Counting(noise))
        return Line(Contestant("torch_decode.py", model, rounding), worker, compiled=False)

    base = {BASE: line(0.02)}
    near = {"near": line(0.03), "coarser": line(0.1, 3), "weights": line(1.02, model="coarse")}
    errors, lost = checked({**base, **near}, given, Path())
    assert errors == pytest.approx({BASE: 0.02, "near": 0.03, "coarser": 0.1, "weights": 0.01})
    assert lost == pytest.approx({BASE: 0, "near": 0, "coarser": 0, "weights": 1})
    for name, far in {"far": line(0.05), "coarser": line(0.13, 3), "weights": line(0, model="coarse")}.items():
        with pytest.raises(AssertionError, match=name):
            checked({**base, name: far}, given, Path())
    with pytest.raises(AssertionError, match=BASE):
        checked({BASE: line(0.04)}, given, Path())
    assert step_time(line(0), given[:PROMPT]) > 0


def test_how_coarse_blocks_of_8_bits_are() -> None:
    """The root mean squares that the bound for llama.cpp stands on, from normal numbers."""
    from speed.decode import BLOCKS_OF_8_BITS

    x = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(1, keepdim=True) / 127
    errors = [(rounded - x).square().mean().sqrt() for rounded in ((x / scale).round() * scale, x.bfloat16().float())]
    assert float(errors[0] / errors[1]) == pytest.approx(BLOCKS_OF_8_BITS, rel=0.03)


def test_rows_of_a_gguf_come_back() -> None:
    from speed.gguf_file import arranged, in_order

    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    weight = torch.randn(32, 5)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(in_order(name, arranged(name, weight, config), config), weight)


def test_the_exact_logits_are_those_of_the_dequantized_weights(tmp_path: Path) -> None:
    from speed.exact import exact_logits

    import quantkit

    dense = save_tiny("llama", tmp_path / "dense")
    quantkit.quantize(dense, tmp_path / "w4", recipe={"scheme": "w4a16_g32", "method": "rtn"})
    given, found = list(range(10, 26)), {}
    for name in ("dense", "w4"):
        found[name] = exact_logits(tmp_path / name, "none", given, 3)
        assert found[name].shape[0] == 4
        model = quantkit.load(tmp_path / name, dtype="float32", backend=None if name == "dense" else "reference")
        with torch.inference_mode():
            wanted = model(torch.tensor([given])).logits[0, -4:]
        np.testing.assert_allclose(found[name], wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert not np.allclose(found["dense"], found["w4"], rtol=1e-2)


def test_the_torch_worker_decodes_a_quantized_model(tmp_path: Path) -> None:
    """In a process of its own, by the protocol."""
    from memory.random_model import Shape, write_model
    from speed.decode import Contestant, Line, Setting, start

    import quantkit

    write_model(tmp_path / "dense", Shape(blocks=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=2048), 0)
    quantkit.quantize(tmp_path / "dense", tmp_path / "w4", recipe={"scheme": "w4a16_g32", "method": "rtn"})
    setting = Setting(tmp_path, None)
    given, found = list(range(10, 26)), {}
    for name in ("dense", "w4"):
        worker = start(name, Contestant("torch_decode.py", name), setting)
        try:
            found[name] = worker.ask({})
            one = Line(Contestant("torch_decode.py", name), worker, compiled=False)
            answer = one.ask(given, None, 4, tmp_path / f"{name}.npy")
        finally:
            worker.process.kill()
        assert len(answer["tokens"]) == len(answer["seconds"]) == 4
    assert found["w4"]["bytes"] < found["dense"]["bytes"]
    assert set(found["w4"]["versions"]) == {"quantkit", "torch"}
    logits = {name: np.load(tmp_path / f"{name}.npy") for name in found}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([given])).logits[0, -1]
    assert torch.allclose(torch.from_numpy(logits["dense"][0]), wanted.float(), atol=0.02)
    first, dense = logits["w4"][0], logits["dense"][0]  # later ones follow other tokens
    assert 0 < np.linalg.norm(first - dense) < 0.5 * np.linalg.norm(dense)


def test_each_kind_of_cpu_has_its_own_table() -> None:
    import measure
    from speed import linear, study

    case = {"shape": [2, 4], "tokens": 1, "seconds": {linear.BASE: [1.0, 2.0, 3.0]}, "read_bytes_per_second": 100.0}
    found = {"cases": [{**case, "nbytes": {linear.BASE: 20}}], "rounds": 3, "where": WHERE}
    other = {**found, "where": WHERE | {"cpu": "d", "instructions": "AVX2"}}
    flags = ["fma", "avx2", "avx512f", "amx_bf16"]
    assert [measure._widest(flags[:count]) for count in (1, 2, 3, 4)] == ["", "AVX2", "AVX-512", "AMX"]
    capability = torch.backends.cpu.get_cpu_capability()  # of torch's own loops, which have none for matrices
    named = {"AVX512": "AVX-512", "AVX2": "AVX2"}.get(capability, "")
    assert measure.surroundings()["instructions"].replace("AMX", "AVX-512") == named
    text = study.render({"linear": {"AMX": found, "AVX2": other}, "decode": {}})
    assert text.index("### c, AMX\n") < text.index("### d, AVX2\n")
    assert text.count("| 1 token | 2x4 |") == 2
    assert study.shape_of("1536x576") == (1536, 576)
