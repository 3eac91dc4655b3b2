"""What QuacK refuses, and that LoRA elsewhere than on queries and keys is welcome."""

import pytest
import torch
from torch import nn

from hf_geoscale import QuacK, UnsupportedModelError

from ..conftest import tiny_model
from .test_quack import build


def test_q_and_k_norms():
    model = tiny_model("qwen3")
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0 of the qwen3 model normalises queries and keys \(q_norm\)"
    ):
        QuacK(torch.optim.AdamW(model.parameters()), model)


def test_families_it_cannot_read():
    model = build("llama")
    model.config.model_type = "falcon"
    with pytest.raises(UnsupportedModelError, match="model_type 'falcon' is not supported"):
        QuacK(torch.optim.AdamW(model.parameters()), model)


def test_what_is_no_model():
    module = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="expected a transformers model or a PEFT model of one, got Linear"):
        QuacK(torch.optim.AdamW(module.parameters()), module)


def test_adapters_on_queries_and_keys():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0 of the llama model: q_proj carries a PEFT adapter.*merge"
    ):
        QuacK(torch.optim.AdamW(model.parameters()), model)


def test_adapters_elsewhere_with_frozen_queries_and_keys():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["v_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"holds none of the 4 weights and biases.*frozen, as under LoRA"):
        QuacK(torch.optim.AdamW(trained), model)


def test_adapters_elsewhere_with_trained_queries_and_keys():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["v_proj"]))
    for layer in model.get_base_model().model.layers:
        layer.self_attn.q_proj.requires_grad_(True)
    control = QuacK(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), model)
    assert len(control.scaled) == 2


def test_quantised_weights():
    model = build("llama")
    weight = model.model.layers[1].self_attn.k_proj.weight
    model.model.layers[1].self_attn.k_proj.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 of the llama model: k_proj.*\(32, 64\) torch.int8"):
        QuacK(torch.optim.AdamW(model.model.embed_tokens.parameters()), model)
