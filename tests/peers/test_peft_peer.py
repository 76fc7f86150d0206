"""LoRA of PEFT over quantized layers: what it computes, what it trains, how it is saved, what it refuses.

Run where PEFT is installed: ``python -m pytest -m peer tests/peers/test_peft_peer.py``. Seen with PEFT 0.21.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantkit

pytestmark = pytest.mark.peer
peft = pytest.importorskip("peft")

IDS = torch.arange(3, 35)[None] % VOCAB
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(params=["from_pretrained", "load"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    quantkit.transformers.register()
    quantkit.quantize(
        save_tiny("llama", tmp_path / "m"), tmp_path / "q", recipe={"scheme": "w4a16_g32", "method": "rtn"}
    )
    if request.param == "load":
        return quantkit.load(tmp_path / "q")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def adapted(model: Any, **options: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, quantkit.transformers.lora(config))


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def dense_twin(model: Any) -> Any:
    """The same weights in nn.Linear, in which PEFT puts its own layers."""
    values = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    twin: Any = AutoModelForCausalLM.from_config(type(model.config)(**values))
    state = dict(model.named_parameters())
    state |= {f"{n}.weight": m.dequantize() for n, m in model.named_modules() if isinstance(m, quantkit.QuantLinear)}
    twin.load_state_dict(state, strict=False)
    return twin.eval()


def test_loss_and_gradients_are_those_of_the_dense_model_under_the_same_adapter(model: Any) -> None:
    twin = dense_twin(model)
    found = adapted(model)
    plain = peft.get_peft_model(twin, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    own = dict(plain.named_parameters())
    trainable = {name: p for name, p in found.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * len(TARGETS) * 2
    for name, parameter in trainable.items():
        value = torch.randn(parameter.shape, generator=generator) / 8
        with torch.no_grad():
            parameter.copy_(value)
            own[name].copy_(value)
    losses = [loss_of(found), loss_of(plain)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for loss in losses:
        loss.backward()
    for name, parameter in trainable.items():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-3, atol=1e-5)


def test_training_lowers_the_loss_and_leaves_the_weights(model: Any) -> None:
    digests = {n: m.quantized().digest() for n, m in model.named_modules() if isinstance(m, quantkit.QuantLinear)}
    tuned = adapted(model)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    before = float(loss_of(tuned))
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(tuned).backward()
        optimizer.step()
    assert float(loss_of(tuned)) < before - 0.5
    base = tuned.unload()
    after = {n: m.quantized().digest() for n, m in base.named_modules() if isinstance(m, quantkit.QuantLinear)}
    assert after == digests
    assert float(loss_of(base)) == pytest.approx(before, abs=1e-4)


def test_an_adapter_is_saved_and_opened(model: Any, tmp_path: Path) -> None:
    tuned = adapted(model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    expected = tuned(IDS).logits
    tuned.save_pretrained(tmp_path / "adapter")
    base = tuned.unload()
    assert not torch.allclose(base(IDS).logits, expected)
    config = quantkit.transformers.lora(peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    assert torch.equal(again(IDS).logits, expected)


def test_what_would_change_the_quantized_weight_is_refused(model: Any) -> None:
    with pytest.raises(quantkit.InputError, match="use_dora"):
        adapted(model, use_dora=True)
    with pytest.raises(quantkit.InputError, match="the weight under the adapter is quantized"):
        adapted(model).merge_and_unload()


def test_without_quantkits_entry_peft_names_the_layer_that_it_does_not_know(model: Any) -> None:
    """PEFT takes layers of others from a config alone; the day that it takes them otherwise, this is not needed."""
    plain = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"QuantLinear\(in_features=.* is not supported"):
        peft.get_peft_model(model, plain)
    assert loss_of(adapted(model)).requires_grad  # and then quantkit's
