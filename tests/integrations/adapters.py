"""Tiny models with LoRA adapters away from their initial values."""

import copy

import peft
import torch

from ..conftest import tiny_model

TARGETS = {"gpt2": ["c_attn"]}
SEPARATE = ["q_proj", "k_proj", "v_proj"]


def lora(family: str = "llama", **options) -> "peft.LoraConfig":
    options = {"r": 4, "lora_alpha": 2, "init_lora_weights": False, **options}
    return peft.LoraConfig(
        target_modules=TARGETS.get(family, SEPARATE), fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM", **options
    )


def disturb(model, spread: float = 0.1) -> None:
    """Move every adapter and magnitude away from its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


def adapted(family: str = "llama", adapters: int = 1, **options):
    """A tiny model with `adapters` adapters named a0, a1, …, all away from their initial values; a0 is active."""
    torch.manual_seed(0)
    config = lora(family, **options)
    model = peft.get_peft_model(tiny_model(family), config, adapter_name="a0")
    for index in range(1, adapters):
        model.add_adapter(f"a{index}", copy.deepcopy(config))
    disturb(model)
    return model.eval()


def lora_layers(model) -> list:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
