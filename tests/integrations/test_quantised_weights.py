"""Quantised bases: the certificate is of what they compute, the rounding of activations included."""

import pytest
import torch
from torch import nn

from hf_geoscale import UnsupportedModelError, patch_model, unpatch_model
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.weights import effective_weight

from ..conftest import tiny_model, tokens
from ..tolerances import OUTPUT_ERROR
from .effective import overflows, relative
from .linears import SEPARATE, assert_linear_certified, assert_patched_is_close, attentions, swap


class TestBitsandbytes:
    @pytest.fixture(autouse=True)
    def bnb(self):
        self.bnb = pytest.importorskip("bitsandbytes")

    def four_bit(self, linear: nn.Linear, kind: str = "nf4", double: bool = True) -> nn.Module:
        new = self.bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, double, kind
        )
        new.load_state_dict(linear.state_dict())
        return new.to(linear.weight.device)  # where it is quantised

    def eight_bit(self, linear: nn.Linear, threshold: float = 6.0) -> nn.Module:
        with torch.device("cpu"):  # the move from there quantises
            new = self.bnb.nn.Linear8bitLt(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                has_fp16_weights=False,
                threshold=threshold,
            )
        new.load_state_dict(linear.state_dict())
        return new.to(linear.weight.device).eval()

    @pytest.mark.feature("QLoRA (bitsandbytes 4-bit)")
    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_four_bit(self, kind, double):
        linear = tiny_model("qwen2").model.layers[0].self_attn.q_proj
        module = self.four_bit(linear, kind, double)
        assert_linear_certified(module, 64)
        weight = effective_weight(module, "", (64, 64), None, None).weight
        with torch.no_grad():
            exact = module(torch.eye(64)).T - module.bias[:, None]
        torch.testing.assert_close(weight, exact, rtol=1e-5, atol=1e-6)
        assert relative(weight, linear.weight.detach()) > 0.05  # really of four bits
        assert_patched_is_close(tiny_model("qwen2"), lambda linear: self.four_bit(linear, kind, double))

    @pytest.mark.feature("QLoRA (bitsandbytes 4-bit)")
    @pytest.mark.parametrize("double", [False, True])
    def test_four_bit_packed_for_cpu_inference(self, double):
        """Evaluation on a CPU with AVX-512 BF16 moves the codes and rounds their scales to BF16."""
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        module = self.four_bit(tiny_model("qwen2").model.layers[0].self_attn.q_proj, "nf4", double)
        before = effective_weight(module, "", (64, 64), None, None).weight
        module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
            module.weight.data, module.weight.quant_state
        )
        for _ in range(2):  # reading changes nothing
            after = effective_weight(module, "", (64, 64), None, None).weight
            torch.testing.assert_close(after, before, rtol=2.0**-8, atol=0)

    @pytest.mark.feature("LLM.int8() (bitsandbytes 8-bit)")
    @pytest.mark.parametrize("threshold", [0.0, 6.0])
    def test_eight_bit(self, threshold):
        linear = tiny_model("qwen2").model.layers[0].self_attn.q_proj
        for seed in range(3):
            share = assert_linear_certified(self.eight_bit(linear, threshold), 64, seed=seed)
            assert share > 0.02  # the activations are rounded
        assert_patched_is_close(tiny_model("qwen2").eval(), lambda linear: self.eight_bit(linear, threshold))

    @pytest.mark.feature("LLM.int8() (bitsandbytes 8-bit)")
    def test_eight_bit_of_float_weights_is_refused(self):
        model = swap(tiny_model("qwen2"), lambda n: self.bnb.nn.Linear8bitLt(n.in_features, n.out_features, True))
        with pytest.raises(UnsupportedModelError, match="quantises its weight anew at each forward"):
            patch_model(model)

    @pytest.mark.feature("QLoRA (bitsandbytes 4-bit)")
    def test_four_bit_not_quantised_yet(self):
        model = swap(tiny_model("qwen2"), lambda n: self.bnb.nn.Linear4bit(n.in_features, n.out_features, True))
        with pytest.raises(UnsupportedModelError, match="not quantised yet"):
            patch_model(model)

    @pytest.mark.parametrize(
        "kind",
        [
            pytest.param("4bit", marks=pytest.mark.feature("QLoRA (bitsandbytes 4-bit)")),
            pytest.param("8bit", marks=pytest.mark.feature("QLoRA (bitsandbytes 8-bit)")),
        ],
    )
    @pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
    def test_adapters_on_a_quantised_base(self, kind, options):
        if kind == "8bit" and options:
            pytest.skip("peft 0.21 with bitsandbytes 0.50 loses the scales of an 8-bit base of DoRA on the CPU")
        peft = pytest.importorskip("peft")
        make = self.four_bit if kind == "4bit" else self.eight_bit
        model = swap(tiny_model("qwen2"), make)
        setattr(model, f"is_loaded_in_{kind}", True)
        config = peft.LoraConfig(target_modules=list(SEPARATE), r=4, lora_alpha=4, init_lora_weights=False, **options)
        model = patch_model(peft.get_peft_model(model, config))
        module = attentions(model)[0].q_proj
        assert type(module).__module__ == "peft.tuners.lora.bnb"
        assert_linear_certified(
            module.train(kind != "8bit"), 64
        )  # 8-bit rounds activations in evaluation only, on a CPU
        ids = tokens(2, 24)
        before = geoscale_layers(model)[0].geometry.q_bound.clone()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(ids, labels=ids).loss.backward()
        moved = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        assert all((p != moved[n]).any() for n, p in model.named_parameters() if n in moved)
        ours = model(ids).logits
        assert not torch.equal(before, geoscale_layers(model)[0].geometry.q_bound)
        assert overflows(model) == 0
        if options:
            with torch.no_grad():
                module.base_layer.eval()(torch.ones(1, 64))  # may pack the codes
            if getattr(module.base_layer.weight.quant_state, "packing_format_for_cpu", False):
                with pytest.raises(UnsupportedModelError, match="DoRA on a 4-bit base that bitsandbytes packed"):
                    model.eval()(ids)
            return
        assert relative(ours, unpatch_model(model)(ids).logits) < OUTPUT_ERROR

    @pytest.mark.feature("QLoRA (bitsandbytes 4-bit)")
    def test_merging_into_a_four_bit_base_is_seen(self):
        peft = pytest.importorskip("peft")
        model = swap(tiny_model("qwen2"), self.four_bit)
        model.is_loaded_in_4bit = True
        config = peft.LoraConfig(target_modules=list(SEPARATE), r=4, lora_alpha=60, init_lora_weights=False)
        model = patch_model(peft.get_peft_model(model, config)).eval()
        ids = tokens(1, 12)
        for act in (model.merge_adapter, model.unmerge_adapter):
            act()
            model(ids)
            assert overflows(model) == 0
            layer = geoscale_layers(model)[0]
            query = layer.site.projections()[0]
            spectral = 8 * torch.linalg.matrix_norm(query.matrix(), 2)
            assert (spectral <= layer.geometry.q_bound).all()


class TestTorchao:
    def quantise(self, linear: nn.Linear, config) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(linear, config(quantization))
        return linear

    @pytest.mark.feature("torchao weight-only")
    @pytest.mark.parametrize(
        "config",
        [
            lambda q: q.Int8WeightOnlyConfig(),
            lambda q: q.Float8WeightOnlyConfig(),
            lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
        ],
        ids=["int8", "float8", "int4"],
    )
    def test_weight_only(self, config):
        linear = tiny_model("qwen2").model.layers[0].self_attn.q_proj
        assert_linear_certified(self.quantise(linear, config), 64)
        assert_patched_is_close(tiny_model("qwen2"), lambda linear: self.quantise(linear, config))

    @pytest.mark.feature("torchao dynamic activations")
    def test_dynamic_int8_activations(self):
        def config(q):
            return q.Int8DynamicActivationInt8WeightConfig()

        linear = tiny_model("qwen2").model.layers[0].self_attn.q_proj
        assert assert_linear_certified(self.quantise(linear, config), 64) > 0.02
        assert_patched_is_close(tiny_model("qwen2").eval(), lambda linear: self.quantise(linear, config))

    @pytest.mark.feature("torchao dynamic activations")
    def test_activation_quantisation_of_the_old_kind_is_refused(self):
        def config(q):
            return q.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=q.PerGroup(32))

        model = swap(tiny_model("qwen2"), lambda linear: self.quantise(linear, config))
        with pytest.raises(UnsupportedModelError, match="IntxUnpackedToInt8Tensor with activation_quantization"):
            patch_model(model)

    @pytest.mark.feature("QLoRA (torchao)")
    def test_adapters_on_an_int8_base(self):
        peft = pytest.importorskip("peft")
        model = swap(tiny_model("qwen2"), lambda n: self.quantise(n, lambda q: q.Int8WeightOnlyConfig()))
        config = peft.LoraConfig(target_modules=list(SEPARATE), r=4, lora_alpha=4, init_lora_weights=False)
        model = patch_model(peft.get_peft_model(model, config)).eval()
        assert type(attentions(model)[0].q_proj).__module__ == "peft.tuners.lora.torchao"
        assert_linear_certified(attentions(model)[0].q_proj, 64)
        ids = tokens(1, 20)
        model(ids, labels=ids).loss.backward()
        assert overflows(model) == 0
