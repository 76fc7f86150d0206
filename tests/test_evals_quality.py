"""The comparison with the peers: checkpoints decoded by an independent decoder, the solver's problems and losses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.source import open_tokenizer, resolve_model
from quantkit.text import evaluation_text

EVALS = Path(__file__).resolve().parent.parent / "evals"


@pytest.fixture(autouse=True)
def evals_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EVALS))


def words(*hexadecimal: str) -> Tensor:
    """int32 [1, n] of words as FORMATS.md prints them."""
    unsigned = torch.tensor([[int(word, 16) for word in hexadecimal]], dtype=torch.int64)
    return (unsigned - (unsigned >= 2**31) * 2**32).int()


@pytest.mark.parametrize(
    ("bits", "stored"),
    [
        (4, ("52fc9630", "da741eb8")),
        (3, ("98abc398", "c398abc3", "abc398ab")),
        (8, ("09060300", "15120f0c", "211e1b18")),
    ],
)
def test_unpack_reads_the_golden_words(bits: int, stored: tuple[str, ...]) -> None:
    from quality.dense import unpack

    count = len(stored) * 32 // bits
    assert unpack(words(*stored), bits, count)[0].tolist() == [3 * k % 2**bits for k in range(count)]


def test_zero_points_of_gptq_wrap_field_by_field() -> None:
    from quality.dense import decode_gptq

    parts = {
        "qweight": torch.zeros(1, 8, dtype=torch.int32),  # 8 inputs, 8 outputs, codes of 0
        "qzeros": words("6543210f"),  # v1 of zero points 0 to 7
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    first = [-0.5 * zero for zero in range(8)]
    assert decode_gptq(parts, 4, 8, zero_shift=1)[:, 0].tolist() == first
    parts["qzeros"] = words("76543210")  # v2
    assert decode_gptq(parts, 4, 8, zero_shift=0)[:, 0].tolist() == first


def test_awq_reads_the_golden_words() -> None:
    from quality.dense import decode_awq

    rows = [words("39f5e4a0", "b17d6c28")]  # code[k, n] = (3k + 5n) % 16, k = 0, n < 16; the other rows do not matter
    parts = {
        "qweight": torch.cat(rows * 32),
        "qzeros": words("75316420", "fdb9eca8"),  # zero[g, n] = (7g + n) % 16
        "scales": torch.full((1, 16), 0.25, dtype=torch.float16),
    }
    assert decode_awq(parts, 32)[:, 0].tolist() == [0.25 * (5 * n % 16 - n) for n in range(16)]


def test_the_groups_of_gptq_columns_may_be_reordered() -> None:
    from quality.dense import decode_gptq

    parts = {
        "qweight": torch.full((1, 8), 0x11111111, dtype=torch.int32),
        "qzeros": torch.zeros(2, 1, dtype=torch.int32),
        "scales": torch.tensor([[1.0] * 8, [2.0] * 8], dtype=torch.float16),
        "g_idx": torch.tensor([1, 0, 0, 1, 1, 0, 0, 1], dtype=torch.int32),
    }
    assert decode_gptq(parts, 4, 4, zero_shift=0)[0].tolist() == [2, 1, 1, 2, 2, 1, 1, 2]


@pytest.mark.parametrize("scheme", ["w4a16_g32_sym", "w4a16_g32_asym", "w3a16_g32_asym", "w8a16_channel_sym"])
def test_the_dense_twin_computes_what_quantkit_computes(tmp_path: Path, scheme: str) -> None:
    from quality.dense import write_dense

    model = save_tiny("llama", tmp_path / "model")
    quantkit.quantize(model, tmp_path / "quantized", recipe={"scheme": scheme, "method": "rtn"})
    assert write_dense(tmp_path / "quantized", model, tmp_path / "dense") == 3 * 7
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").double()(tokens).logits
        wanted = quantkit.load(tmp_path / "quantized", dtype="float32")(tokens).logits
        before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
    # quantkit's float32 forward against the twin's in float64: rounding, far below what quantizing changed.
    assert (found - wanted).abs().max() < 1e-3 * (before - wanted).abs().max()


def test_a_layout_that_is_not_known_is_refused(tmp_path: Path) -> None:
    from quality.dense import write_dense

    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "new"}}))
    save_file({"a.qweight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="'new'"):
        write_dense(tmp_path, tmp_path, tmp_path / "out")
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="no quantized layer"):
        write_dense(tmp_path, tmp_path, tmp_path / "out")


def test_every_run_is_one_that_its_driver_knows() -> None:
    from quality.study import PEERS, RUNS, driver

    assert len({run.key for run in RUNS}) == len(RUNS)
    usage = {}
    for program in PEERS:
        run = next(run for run in RUNS if run.program == program)
        done = subprocess.run([sys.executable, str(driver(run)), "--help"], capture_output=True, text=True, check=True)
        usage[program] = done.stdout.replace("\n", " ")
    for run in RUNS:
        if run.program in PEERS:
            assert f"{run.recipe}," in usage[run.program] or f"{run.recipe}}}" in usage[run.program], run
            assert run.scheme in usage[run.program], run


def test_runs_of_another_model_by_the_same_name_do_not_count() -> None:
    from quality.study import runs_of

    about = {"model_sha256": "a", "windows": 32}
    results = {"models": {"m": {**about, "runs": {"k": 1}}}}
    assert runs_of(results, "m", about) == {"k": 1}
    assert runs_of(results, "m", {**about, "model_sha256": "b"}) == {}
    assert runs_of(results, "other", about) == {}


def test_cpu_times_of_another_processor_are_marked() -> None:
    from quality.study import machine_marks, render

    def run(cpu: str, perplexity: float) -> dict[str, Any]:
        score = {"perplexity": perplexity, "stderr": 0.1, "size_bytes": 1e6}
        cost = {"cpu_seconds": 7, "peak_bytes": 2e6, "surroundings": {"cpu": cpu}}
        return {**score, **cost, "kl": 0.1, "top1_changed": 0.1, "dense": score}

    runs = {"w4_sym/quantkit/a": run("old", 1), "w4_sym/quantkit/b": run("old", 2), "w4_sym/quantkit/c": run("new", 3)}
    assert machine_marks(runs.values()) == {"old": "", "new": "\\*"}
    lines = render({"models": {"m": {"runs": runs}}}).splitlines()
    assert [line.split("|")[-3].strip() for line in lines if line.startswith("| W4")] == ["7 s", "7 s", "7 s\\*"]
    assert lines[-1].endswith("only: old, and with \\* new.")
    runs["w4_sym/quantkit/c"]["surroundings"] = {"cpu": "old", "instructions": "AVX2"}
    assert machine_marks(runs.values()) == {"old": "", "old, AVX2": "\\*"}


def test_pairs_are_scored_as_perplexity_scores_them(tmp_path: Path) -> None:
    from quality.paired import difference, read_windows, render, score

    model, text = resolve_model("builtin"), tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n}" for n in range(1500)))
    for bits in (3, 8):
        quantkit.quantize(model, tmp_path / f"w{bits}", recipe={"scheme": f"w{bits}a16_g64_asym", "method": "rtn"})
    paths = [tmp_path / "w8", tmp_path / "w3"]
    windows = list(read_windows(model, str(text), 3))
    assert [list(window.shape) for window in windows] == [[1, 512]] * 3
    ids = open_tokenizer(model)(evaluation_text("builtin").text, verbose=False)["input_ids"]
    assert torch.cat([w[0] for w in read_windows(model, "builtin", 2)]).tolist() == ids[:1024]
    found = score(model, paths, windows)
    half = tmp_path / "second_half.txt"
    half.write_text(text.read_text()[text.read_text().index("\n", len(text.read_text()) // 2) + 1 :])
    spec = quantkit.EvalSpec(str(half), sequence_length=512, limit=3)
    wanted = quantkit.evaluate([str(path) for path in (model, *paths)], spec, dtype="float32").results[1:]
    for scores, one in zip(found, wanted, strict=True):
        assert math.exp(sum(scores.nll) / 3) == pytest.approx(one.perplexity, rel=1e-6)
        assert sum(scores.kl) / 3 == pytest.approx(one.kl, rel=1e-3, abs=1e-6)
    mean, error = difference(found[1].kl, found[0].kl)
    assert mean > 5 * error > 0
    assert f"{mean:+.4f} ± {error:.4f} |\n" in render(paths, found)


def test_the_parts_of_a_solve_make_up_the_whole(tmp_path: Path) -> None:
    from solver.parts import measure_parts, render_parts
    from solver.problem import write_problem
    from solver.study import SCHEME

    write_problem(tmp_path / "problem", 512, 256)
    drawn = load_file(tmp_path / "problem")
    parts = measure_parts(drawn["weight"], drawn["hessian"], SCHEME, repeats=3)
    whole = parts.pop("whole")
    assert set(parts) == {"factor", "scales", "products", "loop"}
    assert all(0 < seconds < whole for seconds in parts.values())
    assert 0.5 * whole < sum(parts.values()) < 1.2 * whole  # medians, each for itself; the rest is copies
    shares = {"whole": 2.0, "factor": 0.5, "scales": 0.1, "products": 0.3, "loop": 1.0}
    line = "| 1000x500 | 2.000 s | 0.500 s | 0.100 s | 0.300 s | 1.000 s | 50% | 2000.0 ns |"
    assert line in render_parts({"1000x500": shares})


def test_a_problem_is_drawn_from_its_seed_and_is_one_that_gptq_can_gain_on(tmp_path: Path) -> None:
    from solver.problem import write_problem
    from solver.study import loss

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_problem(tmp_path / name, 32, 64, seed)
    first, again, other = (load_file(tmp_path / name) for name in "abc")
    assert torch.equal(first["weight"], again["weight"])
    assert torch.equal(first["hessian"], again["hessian"])
    assert not torch.equal(first["hessian"], other["hessian"])
    assert torch.equal(first["hessian"], first["hessian"].T)
    assert torch.linalg.eigvalsh(first["hessian"].double()).min() > 0

    error = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    wanted = torch.trace(error.double() @ first["hessian"].double() @ error.double().T)
    for at_a_time in (7, 512):
        found = loss(first["weight"], first["weight"] - error, first["hessian"], at_a_time)
        assert found == pytest.approx(float(wanted), rel=1e-4)


def test_a_worker_answers_what_it_is_asked(tmp_path: Path) -> None:
    from solver.problem import write_problem
    from solver.study import ask, loss, start

    problem = tmp_path / "problem.safetensors"
    write_problem(problem, 32, 128)
    tensors = load_file(problem)
    worker = start("quantkit", tmp_path)
    losses: dict[str, float] = {}
    try:
        for options in ("natural", "static"):
            answer: dict[str, Any] = ask(worker, problem, options, tmp_path / "solved")
            assert answer["cpu_seconds"] > 0
            assert answer["peak_bytes"] > 1e6
            losses[options] = loss(tensors["weight"], load_file(tmp_path / "solved")["weight"], tensors["hessian"])
    finally:
        worker.process.kill()
    assert 0 < losses["static"] < losses["natural"]


def test_the_line_through_points_and_how_far_they_are_from_it() -> None:
    from cost.study import line

    assert line([(1, 5.0), (2, 7.0), (4, 11.0)]) == pytest.approx((3.0, 2.0, 0.0))
    intercept, slope, distance = line([(0, 0.0), (1, 3.0), (2, 0.0)])
    assert (intercept, slope, distance) == pytest.approx((1.0, 0.0, 2 / 3))


def test_cost_compares_runs_that_differ_in_one_thing_only() -> None:
    from cost.study import LENGTH, USUAL_BLOCKS, USUAL_SAMPLES, series

    usual = {"blocks": USUAL_BLOCKS, "tokens": USUAL_SAMPLES * LENGTH, "cpu_seconds": 2.0}
    deeper, longer = {**usual, "blocks": 64, "cpu_seconds": 9.0}, {**usual, "tokens": 99_999, "cpu_seconds": 5.0}
    results = {"points": [deeper, usual, longer]}
    assert series(results, "blocks") == [(USUAL_BLOCKS, 2.0), (64, 9.0)]
    assert series(results, "tokens") == [(usual["tokens"], 2.0), (99_999, 5.0)]


def test_whole_runs_are_compared_with_quantkits() -> None:
    from measure import surroundings
    from whole_run.study import RUNS, render

    costs = {"cpu_seconds": 50.0, "peak_bytes": 400e6}, {"cpu_seconds": 125.0, "peak_bytes": 1e9}
    runs = {RUNS[0].key: costs[0], RUNS[1].key: costs[1]}
    text = render({"models": {"tiny": {"32": {"surroundings": surroundings(), "runs": runs}}}})
    assert "| tiny, 32 x 512, llm-compressor gptq | 125 s | 2.50 | 1000 MB | 2.50 |" in text
