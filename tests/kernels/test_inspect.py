"""The machine code of the shipped kernels, and the gate on it. Compiled in a process without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machine_code_limits import (
    EXCEPTIONS,
    PUBLISHED,
    SPILLS,
    Published,
    budget,
    most_instructions,
    most_over_floor,
    stem,
)

from quantkit.errors import InputError, KernelError
from quantkit.kernels.inspect import chosen, description, inspect, main
from quantkit.kernels.shipped import Variant, shipped
from quantkit.kernels.tiles import MOST_TOKENS

pytest.importorskip("triton")

GATED = (
    "w4a16_g128_sym_float16_m8",
    "w4a16_g128_asym_float16_m8",
    "w4a16_g128_sym_bfloat16_m8",
    "w4a16_g128_sym_float16_m16",
    "w8a16_channel_sym_float16_m8",
    "w3a16_g128_sym_float16_m8",
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
    spilled, reloaded = SPILLS.get(stem(variant), {}).get(variant.cc, (0, 0))
    held = {
        "no spills": finding["spilled"] <= spilled,
        "no I2F": finding["conversions"] == 0,
        "no exposed load": finding["exposed_loads"] <= reloaded,
        "16-byte copies of x and codes": copies[16] * 16 * 32 * variant.tile.warps >= words_and_x,
        "no other copies but of scales and zero points": sum(copies.values()) - copies[16]
        <= (2 + (not wide_x)) * variant.tile.tiles,
        "as many weights a trip as said": least <= tensor <= least * 1.75,
        "few instructions": finding["instructions_per_weight"] <= most_instructions(variant),
        "they cost no time": variant.cc not in (80, 90) or finding["instructions_per_weight"] <= budget(variant),
        "on the floor": variant.cc not in (80, 90) or finding["over_floor"] <= most_over_floor(variant),
    }
    return [f"{variant.name}: {what}" for what, is_held in held.items() if not is_held]


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
        over = {name: dumped[0][name]["over_floor"] / most_over_floor(v) for name, v in variants(*GATED).items()}
        assert {name: ratio for name, ratio in over.items() if ratio > 1} == {}

    def test_what_was_reached_stays(self, dumped: tuple[dict[str, Finding], Path]) -> None:
        """Closer than the gate, so that a change that costs instructions is seen. Triton 3.7.1."""
        reached = {
            "w4a16_g128_sym_float16_m8": 1.35,
            "w4a16_g128_asym_float16_m8": 1.55,
            "w4a16_g128_sym_float16_m16": 1.65,
            "w3a16_g128_sym_float16_m8": 1.25,
        }
        for name, most in reached.items():
            for cc in (80, 90):
                assert dumped[0][f"{name}_sm{cc}"]["instructions_per_weight"] <= most

    @pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published["name"])
    def test_published_kernels_stay_behind(self, dumped: tuple[dict[str, Finding], Path], published: Published) -> None:
        """Every variant of that kind takes fewer instructions than they, and their predicted time by no less."""
        kind = f"w{published['bits']}a16_"
        for cc in (80, 90):
            ours = [
                f for name, f in dumped[0].items() if kind in name and name.endswith(f"_m{published['max_m']}_sm{cc}")
            ]
            assert ours
            assert max(f["instructions_per_weight"] for f in ours) < published["instructions"][str(cc)]
            ratio = published["over_floor"][str(cc)] / max(f["over_floor"] for f in ours)
            assert ratio >= 0.999 * published["over_floor"][str(cc)]

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


@pytest.mark.slow
@pytest.mark.parametrize("cc", [80, 90])
def test_up_to_64_rows_of_x_the_packed_weight_is_faster_than_a_dense_one(cc: int) -> None:
    """Two blocks of 32 rows, against reading the codes and moving 2 bytes a weight into the L2 cache and out of it.

    That cache is taken for twice as fast as the memory, as choose_splits does.
    """
    found = findings("w4a16_g128_sym_m32", "w8a16_channel_sym_m32", "--cc", str(cc))
    for name, variant in variants("w4a16_g128_sym_m32", "w8a16_channel_sym_m32", capabilities=(cc,)).items():
        dense = (variant.bytes_per_weight + (2 + 2) / 2) / variant.floor_bytes_per_weight
        assert MOST_TOKENS / variant.tile.tokens * found[name]["over_floor"] < dense


def test_exceptions_are_shipped_variants_beyond_the_limits() -> None:
    every = {stem(variant) for variant in shipped()}
    assert {*EXCEPTIONS, *SPILLS} <= every
    limits = {8: 2.0, 16: 2.3}
    for name, ceilings in EXCEPTIONS.items():
        assert name.startswith("w4a16_")
        assert min(ceilings.values()) > limits[int(name.rpartition("_m")[2])]


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
    word_rows = 52 * 16  # units of 80 rows that hold 4096, with five codes in a word and eight slots of scales
    assert three.bytes_per_weight == word_rows * (4096 + 8 * 32) * 2 / 4096**2


def test_a_pattern_that_names_nothing() -> None:
    with pytest.raises(InputError, match=r"no variant is named by 'w5a16'; give parts of a name, joined by _: w2a16"):
        chosen((80,), ("w4a16", "w5a16"), safe=False)


def test_the_command_says_on_one_line_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["w5a16", "--cc", "80"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "no variant is named by 'w5a16'" in said.err


def test_a_directory_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["w4a16_g128_sym_float16_m8", "--cc", "80", "--json", "--dump", str(tmp_path / "file" / "x")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "Not a directory; give --dump another directory" in said.err


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
