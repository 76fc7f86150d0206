"""quantize() as a user sees it: what the output holds, resuming, overwriting, and what is left after a failure."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.report import Event, LayerDone, Note, Step
from quantkit.source import BUILTIN_PATH
from quantkit.staging import partial_path

RECIPE = {"scheme": "w4a16_g32", "method": "gptq"}
SMALL = {"scheme": "w4a16_g128", "method": "gptq", "calibration": {"num_samples": 4, "sequence_length": 64}}


def files(path: Path, *, but: tuple[str, ...] = ("report.json",)) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name not in but}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, quantized."""
    out = tmp_path_factory.mktemp("built") / "out"
    quantkit.quantize("builtin", out, recipe=SMALL)
    return out


def test_output_holds_everything(built: Path) -> None:
    source, written = Checkpoint(BUILTIN_PATH), Checkpoint(built)
    for path in BUILTIN_PATH.iterdir():
        if path.name not in ("config.json", "model.safetensors", "README.md"):  # whose card is the new model's
            assert (built / path.name).read_bytes() == path.read_bytes(), path.name
    config = json.loads((built / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == source.config
    index = json.loads((built / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(written.tensors)
    assert index["metadata"]["total_size"] == written.nbytes
    assert "lm_head.weight" not in written.tensors  # tied embeddings stay tied
    for name in set(source.tensors) & set(written.tensors):
        assert torch.equal(source.read([name])[name], written.read([name])[name])
    assert not partial_path(built).exists()
    assert (built / "config.json").stat().st_mode == next(built.glob("*.safetensors")).stat().st_mode


def test_report(built: Path) -> None:
    report = json.loads((built / "report.json").read_text())
    assert len(report["layers"]) == report["totals"]["layers"] == 56
    assert all(0 < layer["relative_error"] < 0.5 and layer["num_tokens"] == 256 for layer in report["layers"])
    assert report["calibration"]["num_tokens"] == 256
    assert len(report["calibration"]["sha256"]) == 64
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert report["share_quantized"] == pytest.approx(report["num_quantized"] / report["num_parameters"])
    assert report["size_after"] == Checkpoint(built).nbytes
    assert report["bits_per_quantized_weight"] == pytest.approx(4 + 16 / 128, rel=1e-2)


def test_recipe_in_the_output_reproduces_it(built: Path, tmp_path: Path) -> None:
    quantkit.quantize("builtin", tmp_path / "again", recipe=built / "recipe.yaml")
    assert files(tmp_path / "again") == files(built)


def test_global_random_state_is_not_touched(tmp_path: Path) -> None:
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    quantkit.quantize("builtin", tmp_path / "out", recipe=SMALL)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


class _Interrupt:
    """Raises KeyboardInterrupt at the n-th event, and counts what was solved."""

    def __init__(self, at: int | None) -> None:
        self.at, self.events, self.solved = at, 0, [0]

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerDone) and not event.resumed:
            self.solved[0] += 1
        if isinstance(event, Note):
            return
        self.events += 1
        if self.events == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_resume_after_any_event(family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    """Stopped at any event, the run resumes to the same bytes and solves no finished block again."""
    whole = _Interrupt(None)
    quantkit.quantize(tiny(family), tmp_path / "whole", recipe=RECIPE, tokens=tokens, observer=whole)
    expected = files(tmp_path / "whole")
    layers = whole.solved[0]
    for at in range(2, whole.events + 1, 5):
        out = tmp_path / f"stopped-{at}"
        with pytest.raises(KeyboardInterrupt):
            quantkit.quantize(tiny(family), out, recipe=RECIPE, tokens=tokens, observer=_Interrupt(at))
        assert not out.exists()
        kept = len(list(partial_path(out).glob("model-*.safetensors"))) if partial_path(out).exists() else 0
        again = _Interrupt(None)
        quantkit.quantize(tiny(family), out, recipe=RECIPE, tokens=tokens, observer=again, resume=True)
        assert files(out) == expected
        assert again.solved[0] == layers - layers // 3 * min(kept, 3)
        assert not partial_path(out).exists()


def test_kill_9_and_resume(built: Path, tmp_path: Path) -> None:
    """The process is killed at several moments; what is on disk stays whole, and resuming gives the same bytes."""
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text((built / "recipe.yaml").read_text())
    command = [sys.executable, "-m", "quantkit", "quantize", "builtin", "--recipe", str(recipe), "--output", str(out)]
    for shards in (1, 2, 4):
        process = subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while len(list(partial_path(out).glob("model-*.safetensors"))) < shards and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if out.exists():  # it was faster than the kill
            break
        for shard in partial_path(out).glob("model-*.safetensors"):
            with safe_open(shard, "pt") as handle:
                assert list(handle.keys())
    if not out.exists():
        subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert files(out) == files(built)


def test_resume_refuses_another_run(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(tiny("llama"), out, recipe=RECIPE, tokens=tokens, observer=_Interrupt(12))
    with pytest.raises(quantkit.OutputError, match="--resume continues it"):
        quantkit.quantize(tiny("llama"), out, recipe=RECIPE, tokens=tokens)
    with pytest.raises(quantkit.OutputError, match="another run \\(recipe changed\\)"):
        quantkit.quantize(tiny("llama"), out, recipe={**RECIPE, "scheme": "w3a16_g32"}, tokens=tokens, resume=True)
    with pytest.raises(quantkit.OutputError, match="calibration changed"):
        quantkit.quantize(tiny("llama"), out, recipe=RECIPE, tokens=tokens[1:], resume=True)
    assert partial_path(out).exists()
    quantkit.quantize(tiny("llama"), out, recipe=RECIPE, tokens=tokens, overwrite=True)
    assert not partial_path(out).exists()


def test_interrupted_overwrite_keeps_the_earlier_output(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantkit.quantize(tiny("llama"), out, recipe={**RECIPE, "method": "rtn"})
    earlier = files(out, but=())
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(tiny("llama"), out, recipe=RECIPE, tokens=tokens, overwrite=True, observer=_Interrupt(20))
    assert files(out, but=()) == earlier
    quantkit.quantize(tiny("llama"), out, recipe=RECIPE, tokens=tokens, overwrite=True)
    assert files(out, but=()) != earlier
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == ["out"]


def test_events_and_last_step(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    events: list[Event] = []
    quantkit.quantize(tiny("opt"), tmp_path / "out", recipe={**RECIPE, "method": "rtn"}, observer=events.append)
    layers = [e for e in events if isinstance(e, LayerDone)]
    assert [e.done for e in layers] == list(range(1, layers[0].total + 1))
    assert events[-1] == Step("verified")


def test_a_corrupted_shard_is_found_before_success(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """A bit that flips on disk between writing and verifying stops the run, and no output appears."""

    def flip(event: Event) -> None:
        if isinstance(event, Step) and event.title == "everything else":
            shard = sorted(partial_path(tmp_path / "out").glob("model-*.safetensors"))[0]
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 1
            shard.write_bytes(data)

    with pytest.raises(quantkit.CheckpointError):
        quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=RECIPE, tokens=tokens, observer=flip)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_keeps_finished_blocks(
    error: RuntimeError, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    def exhausted(event: Event) -> None:
        if isinstance(event, Step) and event.title == "block 2/3":
            raise error

    with pytest.raises(quantkit.InterruptedRunError, match=r"out of memory; .*2 of 4 shards are kept.*--resume"):
        quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=RECIPE, tokens=tokens, observer=exhausted)
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=RECIPE, tokens=tokens, resume=True)


def test_full_disk_stops_cleanly_and_resumes(built: Path, tmp_path: Path) -> None:
    """A write that the system refuses: one line, exit code 2, no output; finished shards are kept."""
    out = tmp_path / "out"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"  # the last shard, the embedding's, is larger
        "from quantkit.cli import main\n"
        "main()\n"
    )
    arguments = ["quantize", "builtin", "--recipe", str(built / "recipe.yaml"), "--output", str(out)]
    failed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert "8 of 9 shards are kept" in failed.stderr
    assert not out.exists()
    assert not list(partial_path(out).glob("*.part"))
    subprocess.run([sys.executable, "-m", "quantkit", *arguments, "--resume"], check=True, capture_output=True)
    assert files(out) == files(built)
    shutil.rmtree(out)
