from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.errors import KernelError
from quantkit.kernels import tuned
from quantkit.kernels.base import LinearSpec
from quantkit.kernels.tiles import Tile
from quantkit.kernels.tuned import Choice, Product
from quantkit.scheme import QuantScheme

pytest.importorskip("triton")
import torch

from quantkit.kernels import triton_tune

PRODUCT = Product(4096, 4096, 4, 128, True, "float16", 8)
CHOICE = Choice(PRODUCT, Tile(64, 8, 128, 1, 1, 3, 2), 16, 3e-6, 4e-6)


def test_what_is_saved_is_read_and_other_gpus_stay(tmp_path: Path) -> None:
    path = tmp_path / "quantkit" / "tiles.json"
    assert tuned.read(path) == {}
    tuned.save("A", [CHOICE], path)
    other = replace(CHOICE, product=replace(PRODUCT, in_features=1024))
    tuned.save("B", [other], path)
    tuned.save("A", [other, replace(CHOICE, splits=8)], path)
    assert tuned.read(path) == {
        "A": {PRODUCT: replace(CHOICE, splits=8), other.product: other},
        "B": {other.product: other},
    }
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tile.rows", 48),
        ("tile.tile_k", 16),
        ("tile.repeat", 2),
        ("tile.stages", 0),
        ("tile.warps", 3),
        ("tile.tokens", 16),
        ("tile.rows", True),
        ("splits", 0),
        ("splits", "4"),
        ("product.dtype", 3),
        ("product.more", 3),
        ("more", 3),
        ("seconds", "soon"),
    ],
)
def test_a_wrong_file_is_refused_on_one_line(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "tiles.json"
    tuned.save("A", [CHOICE], path)
    found = json.loads(path.read_text())
    *parents, name = field.split(".")
    entry = found["A"][0]
    for parent in parents:
        entry = entry[parent]
    entry[name] = value
    path.write_text(json.dumps(found))
    with pytest.raises(
        KernelError, match=r"does not hold tuned tiles.*delete it, then run quantkit tune again"
    ) as caught:
        tuned.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"A": 3}', '{"A": [3]}', "\udcff"])
def test_what_is_no_such_file_at_all(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(KernelError, match="does not hold tuned tiles"):
        tuned.read(path)


def test_lookup_reads_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.cache_path() == tmp_path / "quantkit" / "triton_tiles.json"
    tuned.save("A", [CHOICE], tuned.cache_path())
    assert tuned.lookup("A", PRODUCT) == CHOICE
    assert tuned.lookup("B", PRODUCT) is None
    assert tuned.lookup("A", replace(PRODUCT, bits=8)) is None


def test_the_fastest_candidate_that_runs_is_chosen() -> None:
    (static, splits), *others = triton_tune.candidates(PRODUCT, sms=132)
    assert len({*others, (static, splits)}) == len(others) + 1 > 10
    wanted = others[5]

    def measure(tile: Tile, parts: int) -> float | None:
        if (tile, parts) == others[0]:
            return None  # does not run, or is wrong
        return 1.0 if (tile, parts) == wanted else 2.0

    chosen = triton_tune.best(PRODUCT, 132, measure)
    assert (chosen.tile, chosen.splits, chosen.seconds, chosen.static_seconds) == (*wanted, 1.0, 2.0)
    same = triton_tune.best(PRODUCT, 132, lambda *_: 2.0)
    assert (same.tile, same.splits) == (static, splits)
    with pytest.raises(KernelError, match="the static choice does not run here"):
        triton_tune.best(PRODUCT, 132, lambda *_: None)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group_size", "in_features"), [(None, 576), (32, 576), (64, 4096), (128, 4096), (256, 4096)])
def test_every_candidate_can_be_kept(tmp_path: Path, bits: int, group_size: int | None, in_features: int) -> None:
    spec = LinearSpec(1000, in_features, QuantScheme(bits, group_size), torch.float16, "cuda")
    for product in triton_tune.products(spec):
        kept = [Choice(product, tile, splits, 1.0, 1.0) for tile, splits in triton_tune.candidates(product, 108)]
        for choice in kept:
            tuned.save("A", [choice], tmp_path / "tiles.json")
            assert tuned.read(tmp_path / "tiles.json")["A"][product] == choice


def test_the_command_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.cli import main

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["quantkit", "tune", "builtin"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "torch finds no CUDA device; run it on the machine that serves the model" in said
