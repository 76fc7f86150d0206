"""doctor: every layer has its kernels, or every refusal."""

from __future__ import annotations

import json

import pytest
import torch
from layers import fastest_cpu

from quantkit.cli import main
from quantkit.doctor import DTYPES, SCHEMES, capabilities, machine
from quantkit.kernels import BACKENDS, LinearSpec, choose_backend
from quantkit.kernels.jit_targets import TARGETS
from quantkit.scheme import parse_scheme


def test_it_says_what_would_be_chosen() -> None:
    found = [each for each in capabilities() if each.device == "cpu"]
    assert len(found) == len(SCHEMES) * len(DTYPES)
    names = [backend.name for backend in BACKENDS]
    for each in found:
        spec = LinearSpec(4096, 4096, parse_scheme(each.scheme), getattr(torch, each.dtype), "cpu")
        assert each.backend == choose_backend(spec).name
        assert [refusal.backend for refusal in each.refusals] == names[: names.index(each.backend)]
        assert all(refusal.why for refusal in each.refusals)


def test_the_machine() -> None:
    facts = machine()
    assert facts["torch"] == torch.__version__
    assert any(target.name in facts["CPU kernels"] for target in TARGETS)
    assert ("none" in facts["CUDA"]) == (not torch.cuda.is_available())


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["quantkit", "doctor", *(["--json"] if as_json else [])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)["layers"][0]["backend"] == fastest_cpu()
    else:
        assert "w4a16_g128_sym" in out
        assert "refuses" in out
