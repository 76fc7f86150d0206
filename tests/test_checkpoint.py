"""Reading strangers' directories and writing our own."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import INDEX, Checkpoint, write_bytes, write_index, write_shard
from quantkit.errors import CheckpointError, InterruptedRunError
from quantkit.source import BUILTIN_PATH


def directory(path: Path, files: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, path / name)
    if weight_map is not None:
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_reads_shards_lazily(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4), torch.randint(0, 9, (5,), dtype=torch.int32)
    path = directory(
        tmp_path, {"x.safetensors": {"a": a}, "y.safetensors": {"b": b}}, {"a": "x.safetensors", "b": "y.safetensors"}
    )
    checkpoint = Checkpoint(path)
    assert {n: (i.file, i.dtype, i.shape) for n, i in checkpoint.tensors.items()} == {
        "a": ("x.safetensors", torch.float32, (3, 4)),
        "b": ("y.safetensors", torch.int32, (5,)),
    }
    assert checkpoint.nbytes == 3 * 4 * 4 + 5 * 4
    found = checkpoint.read(["b", "a"])
    assert torch.equal(found["a"], a)
    assert torch.equal(found["b"], b)
    assert checkpoint.float_dtype == torch.float32


def test_read_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    path = directory(tmp_path, {"model.safetensors": {"a": torch.ones(1000)}})
    tensor = Checkpoint(path).read(["a"])["a"]
    (path / "model.safetensors").write_bytes(b"\0" * 100)
    assert bool((tensor == 1).all())


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", ".."])
def test_index_that_leaves_the_directory(tmp_path: Path, name: str) -> None:
    directory(tmp_path / "m", {}, {"a": name})
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="names the file"):
        Checkpoint(tmp_path / "m")


def test_index_and_files_disagree(tmp_path: Path) -> None:
    files = {"x.safetensors": {"a": torch.ones(2)}, "y.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}}
    with pytest.raises(CheckpointError, match=r"a stands in x\.safetensors and in y\.safetensors"):
        Checkpoint(directory(tmp_path / "m", files, {"a": "x.safetensors", "b": "y.safetensors"}))
    with pytest.raises(CheckpointError, match="not where it says, such as c"):
        Checkpoint(
            directory(
                tmp_path / "n", {"x.safetensors": {"a": torch.ones(2)}}, {"a": "x.safetensors", "c": "x.safetensors"}
            )
        )
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint(directory(tmp_path / "o", {}, {"a": "x.safetensors"}))
    (tmp_path / "o" / INDEX).write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint(tmp_path / "o")


def test_links_out_of_the_directory(tmp_path: Path) -> None:
    """Tokenizers and licences are copied into the output: a link to a user's own file would publish it."""
    path = directory(tmp_path / "m", {"model.safetensors": {"a": torch.ones(2)}})
    (tmp_path / "secret").write_text("key")
    (path / "inside").symlink_to("config.json")
    assert [p.name for p in Checkpoint(path).other_files()] == ["inside"]
    for target in ("../secret", str(tmp_path / "secret"), "/dev/zero", "LICENSE", ".."):
        (path / "LICENSE").symlink_to(target)
        with pytest.raises(CheckpointError, match="LICENSE is a link to outside of the directory"):
            Checkpoint(path)
        (path / "LICENSE").unlink()


def test_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    directory(tmp_path / "m", {"model.safetensors": {"a": torch.ones(2)}})
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m" / name).rename(blobs / f"sha-{name}")
        (snapshot / name).symlink_to(f"../../blobs/sha-{name}")
    assert list(Checkpoint(snapshot).tensors) == ["a"]
    (snapshot / "LICENSE").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match="LICENSE is a link"):
        Checkpoint(snapshot)
    (snapshot / "LICENSE").unlink()
    blobs.rename(tmp_path / "elsewhere")  # blobs that are themselves a link lead anywhere
    blobs.symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="is a link to outside"):
        Checkpoint(snapshot)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = directory(tmp_path / "m", {})
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pickled weights are there \(pytorch_model.bin\), which can run"):
        Checkpoint(path)


def lying_header(entry: dict[str, object]) -> bytes:
    header = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 16


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b"not json!",
        lying_header({"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}),
        lying_header({"dtype": "F32", "shape": [400], "data_offsets": [0, 16]}),
        lying_header({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}),
        lying_header({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}),
        lying_header({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}),
        lying_header({"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]}),
    ],
)
def test_malformed_safetensors(tmp_path: Path, content: bytes) -> None:
    path = directory(tmp_path, {})
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert "\n" not in str(caught.value)


def test_dtype_that_is_not_read(tmp_path: Path) -> None:
    path = directory(tmp_path, {"model.safetensors": {"a": torch.ones(2).to(torch.float8_e4m3fn)}})
    with pytest.raises(CheckpointError, match="dtype 'F8_E4M3' is not read"):
        Checkpoint(path)


def test_not_finite(tmp_path: Path) -> None:
    path = directory(tmp_path, {"model.safetensors": {"a": torch.tensor([1.0, float("nan"), float("-inf")])}})
    with pytest.raises(CheckpointError, match="a: 2 of 3 values are NaN or inf"):
        Checkpoint(path).read(["a"])


def test_fingerprint_sees_changes(tmp_path: Path) -> None:
    path = directory(tmp_path, {"model.safetensors": {"a": torch.zeros(4)}})
    first = Checkpoint(path).fingerprint()
    assert first == Checkpoint(path).fingerprint()
    save_file({"a": torch.ones(4)}, path / "model.safetensors")
    second = Checkpoint(path).fingerprint()
    (path / "config.json").write_text('{"x": 1}')
    assert len({first, second, Checkpoint(path).fingerprint()}) == 3


def test_other_files() -> None:
    names = {p.name for p in Checkpoint(BUILTIN_PATH).other_files()}
    assert "tokenizer.json" in names
    assert not names & {"config.json", "model.safetensors"}


def test_other_files_leave_weights_behind(tmp_path: Path) -> None:
    path = directory(
        tmp_path, {"model.safetensors": {"a": torch.ones(1)}, "consolidated.safetensors": {"b": torch.ones(1)}}
    )
    for name in ("pytorch_model.bin", "m.gguf", "chat_template.jinja", "LICENSE"):
        (path / name).write_text("x")
    (path / "original").mkdir()
    assert [p.name for p in Checkpoint(path).other_files()] == ["LICENSE", "chat_template.jinja"]


def test_write_shard_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_shard(path, {"a": torch.arange(6).view(2, 3).T})
    assert torch.equal(load_file(path)["a"], torch.arange(6).view(2, 3).T)
    before = path.read_bytes()
    with pytest.raises(InterruptedRunError, match="cannot be written"):
        write_shard(tmp_path / "no" / "x.safetensors", {"a": torch.ones(1)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_write_bytes_and_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"b": "y", "a": "x"}, 7)
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 7},
        "weight_map": {"a": "x", "b": "y"},
    }
    with pytest.raises(InterruptedRunError):
        write_bytes(tmp_path / "no" / "x", b"")
    assert [p.name for p in tmp_path.iterdir()] == [INDEX]
