"""Digests: of a tensor's bytes, whatever its strides."""

from __future__ import annotations

import hashlib

import torch

from quantkit.digest import digest, tensor_bytes


def test_bytes_row_by_row_whatever_the_strides() -> None:
    tensor = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    assert bytes(tensor_bytes(tensor)) == tensor.numpy().tobytes()
    assert bytes(tensor_bytes(tensor.T)) == tensor.T.contiguous().numpy().tobytes()
    assert bytes(tensor_bytes(torch.tensor(7, dtype=torch.int32))) == (7).to_bytes(4, "little")
    assert bytes(tensor_bytes(torch.ones(0))) == b""


def test_a_changed_bit_changes_the_digest() -> None:
    zeros = torch.zeros(4, 5, dtype=torch.bfloat16)
    assert digest(zeros) == hashlib.sha256(bytes(40)).hexdigest()
    assert digest(zeros) == digest(torch.nn.Parameter(zeros))
    other = zeros.clone()
    other[3, 4] = -0.0
    assert digest(other) != digest(zeros)
