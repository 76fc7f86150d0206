"""The machine code of the shipped kernels, and the gate on it. Compiled in a process without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import InputError, KernelError
from quantkit.kernels.inspect import chosen, description, inspect, main
from quantkit.kernels.shipped import Variant, shipped

pytest.importorskip("triton")

GATED = (
    "w4a16_g128_sym_float16_m8",
    "w4a16_g128_asym_float16_m8",
    "w4a16_g128_sym_bfloat16_m8",
    "w4a16_g128_sym_float16_m16",
    "w8a16_channel_sym_float16_m8",
)
Finding = dict[str, Any]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "quantkit.kernels.inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)


def findings(*arguments: str) -> dict[str, Finding]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Finding], Path]:
    """The gated variants on sm_80 and sm_90, compiled once."""
    directory = tmp_path_factory.mktemp("machine_code")
    found = findings(*GATED, "--cc", "80", "--cc", "90", "--dump", str(directory))
    return found, directory


def failures(variant: Variant, finding: Finding) -> list[str]:
    """The gate: what is held of every shipped variant with 4 and 8 bits."""
    copies = {int(width): count for width, count in finding["copies"].items()}
    # Eight rows of 32 columns of x are 8 bytes for each of 64 threads, so those copies are as small.
    wide_x = variant.tile.tile_k * variant.tile.tokens > 256
    words_and_x = 2 * variant.tile.columns * (variant.tile.rows + wide_x * variant.tile.tokens)
    # 256 weights a product of a warp with 8 rows of x, and the sums of x: so the trip is the one that is said.
    tensor, parts = finding["pipes"]["tensor"], 2 if variant.bits == 8 and variant.dtype == "bfloat16" else 1
    least = variant.max_m / 8 / 8 * parts
    held = {
        "no spills": finding["spilled"] == 0,
        "no I2F": finding["conversions"] == 0,
        "no exposed load": finding["exposed_loads"] == 0,
        "16-byte copies of x and codes": copies[16] * 16 * 32 * variant.tile.warps >= words_and_x,
        "no other copies but of scales and zero points": sum(copies.values()) - copies[16]
        <= (2 + (not wide_x)) * variant.tile.tiles,
        "as many weights a trip as said": least <= tensor <= least * 1.75,
        "few instructions": finding["instructions_per_weight"] <= most_instructions(variant),
        "on the floor": variant.cc not in (80, 90) or finding["over_floor"] <= 1.05,
    }
    return [f"{variant.name}: {what}" for what, is_held in held.items() if not is_held]


def most_instructions(variant: Variant) -> float:
    """Thread-instructions a weight: at most these. An H100 takes 4.56 of W4 before it leaves the memory's speed."""
    if variant.bits == 8:
        return 3.0
    # Four scales, and zero points, where a group of 128 has one; two where they are dearer with bfloat16.
    small = variant.group_size == 32 and (variant.max_m == 16 or not variant.symmetric)
    dear = variant.group_size == 64 and not variant.symmetric and (variant.max_m, variant.dtype) == (16, "bfloat16")
    return {8: 2.7, 16: 3.8}[variant.max_m] if small or dear else {8: 2.0, 16: 2.3}[variant.max_m]


def variants(*patterns: str, capabilities: tuple[int, ...] = (80, 90)) -> dict[str, Variant]:
    return {variant.name: variant for variant in chosen(capabilities, patterns, safe=False)}


class TestGate:
    def test_every_gated_variant_was_compiled(self, dumped: tuple[dict[str, Finding], Path]) -> None:
        assert set(dumped[0]) == set(variants(*GATED))
        assert len(dumped[0]) == 2 * len(GATED)

    def test_machine_code(self, dumped: tuple[dict[str, Finding], Path]) -> None:
        for name, variant in variants(*GATED).items():
            assert failures(variant, dumped[0][name]) == []

    def test_predicted_time_is_the_floor(self, dumped: tuple[dict[str, Finding], Path]) -> None:
        assert {name: f["over_floor"] for name, f in dumped[0].items() if f["over_floor"] > 1.05} == {}

    def test_what_was_reached_stays(self, dumped: tuple[dict[str, Finding], Path]) -> None:
        """Closer than the gate, so that a change that costs instructions is seen. Triton 3.7.1."""
        reached = {"g128_sym_float16_m8": 1.35, "g128_asym_float16_m8": 1.55, "g128_sym_float16_m16": 1.65}
        for part, most in reached.items():
            for cc in (80, 90):
                assert dumped[0][f"w4a16_{part}_sm{cc}"]["instructions_per_weight"] <= most

    def test_dump(self, dumped: tuple[dict[str, Finding], Path]) -> None:
        found, directory = dumped
        assert {path.name for path in directory.iterdir()} == {f"{n}.{e}" for n in found for e in ("cubin", "json")}
        name = "w4a16_g128_asym_float16_m8_sm80"
        assert (directory / f"{name}.cubin").read_bytes()[:4] == b"\x7fELF"
        assert json.loads((directory / f"{name}.json").read_text()) == {
            "kernel": "w4a16",
            "max_m": 8,
            "dtype": "float16",
            "symmetric": False,
            "group_size": 128,
            "cc": 80,
            "num_warps": 2,
            "num_stages": 4,
            "weights_per_trip": 128 * 128,
            "grid": [1, 32, 16],
        }


@pytest.mark.slow
@pytest.mark.parametrize("cc", [80, 86, 89, 90, 100])
def test_every_w4_and_w8_variant(cc: int) -> None:
    wanted = {
        name: variant
        for pattern in ("w4a16", "w8a16")
        for name, variant in variants(pattern, capabilities=(cc,)).items()
        if variant.max_m <= 16
    }
    found = findings(*wanted, "--cc", str(cc))
    assert [line for name, variant in wanted.items() for line in failures(variant, found[name])] == []


def test_names_are_unique() -> None:
    every = shipped()
    assert len({variant.name for variant in every}) == len(every)
    assert {variant.cc for variant in every} == {80, 86, 89, 90, 100}


def test_description_of_a_variant_per_channel() -> None:
    found = description(Variant(8, 16, "bfloat16", True, None, 90))
    assert (found["kernel"], found["group_size"], found["weights_per_trip"]) == ("w8a16", None, 64 * 2 * 128)


def test_bytes_of_the_packed_form() -> None:
    variant = Variant(4, 8, "float16", False, 128, 90)
    assert variant.bytes_per_weight == variant.floor_bytes_per_weight == (4 + 20 / 128) / 8
    three = Variant(3, 8, "float16", True, 128, 90)
    assert three.bytes_per_weight == (4 + 16 / 128) / 8  # codes of 3 bits take 4


def test_a_pattern_that_names_nothing() -> None:
    with pytest.raises(InputError, match=r"no variant is named by 'w5a16'; give parts of a name, joined by _: w2a16"):
        chosen((80,), ("w4a16", "w5a16"), safe=False)


def test_the_command_says_on_one_line_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["w5a16", "--cc", "80"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "no variant is named by 'w5a16'" in said.err


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="Triton compiles here")
def test_the_interpreter_compiles_nothing() -> None:
    with pytest.raises(KernelError, match="TRITON_INTERPRET is set; unset it"):
        next(iter(inspect(shipped((80,))[:1])))


def test_the_table_is_as_wide_as_its_heading() -> None:
    done = run("w4a16_g128_sym_float16_m8", "--cc", "90")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert len(lines[0]) == len(lines[1])
    assert lines[0].split()[0] == "variant"
    assert lines[1].split()[0] == "w4a16_g128_sym_float16_m8_sm90"
