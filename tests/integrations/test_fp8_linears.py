"""FP8 linears under FP8 attention: certificates of what they compute, their casts included."""

import copy
import types

import pytest
import torch
from torch import Tensor, nn

from hf_geoscale import UnsupportedModelError, patch_model
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.weights import TokenBound, effective_weight

from ..conftest import tiny_model, tokens
from .effective import overflows
from .linears import SEPARATE, assert_linear_certified, assert_patched_is_close, attentions, swap


def zero_centred_forward(norm, x):
    """As Transformer Engine's layer norm computes it."""
    return nn.functional.layer_norm(x, x.shape[-1:], 1 + norm.weight, norm.bias, norm.eps)


class TestFloat8Linear:
    """torchao.float8, emulated: on the CPU it casts to E4M3 and multiplies in float32; a GPU multiplies in FP8."""

    def convert(self, linear: nn.Linear, recipe: str = "tensorwise", **options) -> nn.Module:
        float8 = pytest.importorskip("torchao.float8")
        from torchao.float8.float8_linear import Float8Linear

        config = float8.Float8LinearConfig.from_recipe_name(recipe)
        for name, value in {"emulate": True, **options}.items():
            object.__setattr__(config, name, value)
        return Float8Linear.from_float(linear, config)

    @pytest.mark.feature("FP8 linears (torchao)")
    @pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
    def test_certified(self, recipe):
        linear = tiny_model("qwen2").model.layers[0].self_attn.q_proj
        assert assert_linear_certified(self.convert(linear, recipe), 64) > 0.005
        small = copy.deepcopy(linear)
        with torch.no_grad():
            small.weight[1:] *= 1e-5  # subnormals and zeros, next to one large row
            small.bias.zero_()
        assert assert_linear_certified(self.convert(small, recipe), 64) > 0.005
        assert_patched_is_close(tiny_model("qwen2").train(), lambda linear: self.convert(linear, recipe))

    @pytest.mark.feature("FP8 linears (torchao)")
    def test_subnormals_need_their_term(self):
        """Every weight but one rounds to a subnormal or doubles: the error is above the normal numbers' bound."""
        linear = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            linear.weight.fill_(1.01 * 2.0**-10 / 448)
            linear.weight[0, 0] = 1.0
        module = self.convert(linear)
        x = torch.ones(1, 64)
        weight, _, excess = effective_weight(module, "", (64, 64), None, None)
        with torch.no_grad():
            error = (module(x).double() - x.double() @ weight.double().T).abs()[0, 1:]
        normal = (1 + 2.0**-4) ** 2 - 1
        assert (error > normal * TokenBound.of_norm(None, None, 64, weight.device).reach(weight.double())[1:]).all()
        assert (error <= excess[1:]).all()

    @pytest.mark.feature("FP8 linears (torchao)")
    def test_other_formats_are_refused(self):
        model = tiny_model("qwen2")
        module = self.convert(attentions(model)[0].q_proj)
        cast = copy.copy(module.config.cast_config_input)
        object.__setattr__(cast, "target_dtype", torch.float8_e5m2)
        object.__setattr__(module.config, "cast_config_input", cast)
        attentions(model)[0].q_proj = module
        with pytest.raises(UnsupportedModelError, match=r"float8_e5m2.*only float8_e4m3fn"):
            patch_model(model)

    @pytest.mark.feature("FP8 linears (torchao)")
    def test_adapters_on_an_fp8_linear(self):
        peft = pytest.importorskip("peft")
        model = swap(tiny_model("qwen2"), self.convert)
        config = peft.LoraConfig(target_modules=list(SEPARATE), r=4, lora_alpha=4, init_lora_weights=False)
        model = patch_model(peft.get_peft_model(model, config)).eval()
        assert_linear_certified(attentions(model)[0].q_proj, 64)
        model(tokens(1, 20))
        assert overflows(model) == 0


def engine_module(kind: type, name: str, path: str) -> type:
    """A class that goes by a Transformer Engine name: the package itself needs a GPU."""
    return types.new_class(
        name, (kind,), exec_body=lambda ns: ns.update(__module__=f"transformer_engine.pytorch.{path}")
    )


class EmulatedEngineLinear(nn.Linear):
    """Delayed scaling as Transformer Engine casts: scales of another time, rounding to nearest, saturating at 448."""

    scale_x, scale_w = 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        x, w = (
            (t * s).clamp(-448, 448).to(torch.float8_e4m3fn).to(t.dtype) / s
            for t, s in ((x, self.scale_x), (self.weight, self.scale_w))
        )
        return nn.functional.linear(x, w, self.bias)


class TestTransformerEngine:
    """Classes of the same names whose forward emulates the casts; no GPU and no Transformer Engine here."""

    Linear = engine_module(EmulatedEngineLinear, "Linear", "module.linear")
    LayerNorm = engine_module(nn.LayerNorm, "LayerNorm", "module.layernorm")

    def convert(self, linear: nn.Linear, scale_x: float = 20.0, scale_w: float = 400.0) -> nn.Module:
        new = self.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.load_state_dict(linear.state_dict())
        new.scale_x, new.scale_w = scale_x, scale_w
        return new

    @pytest.mark.feature("FP8 linears (Transformer Engine)")
    @pytest.mark.parametrize("scale_x", [1e-3, 1.0, 30.0, 1e4], ids=lambda s: f"x{s:g}")
    @pytest.mark.parametrize("scale_w", [1e-1, 30.0, 1e5], ids=lambda s: f"w{s:g}")
    def test_scales_that_underflow_fit_or_saturate(self, scale_x, scale_w):
        linear = tiny_model("qwen2").model.layers[0].self_attn.q_proj
        assert_linear_certified(self.convert(linear, scale_x, scale_w), 64)

    @pytest.mark.feature("FP8 linears (Transformer Engine)")
    def test_rounding_to_nearest_at_most_doubles(self):
        for scale in (1e-4, 1.0, 3e3):
            x = torch.logspace(-8, 6, 100_000) / scale
            rounded = (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale
            assert float((rounded / x).amax()) <= 2.0
        assert float((rounded / x).amax()) > 1.9

    @pytest.mark.feature("FP8 linears (Transformer Engine)")
    def test_a_patched_model_whose_linears_are_replaced(self):
        assert_patched_is_close(tiny_model("qwen2").train(), self.convert)

    @pytest.mark.feature("FP8 linears (Transformer Engine)")
    @pytest.mark.parametrize("zero_centred", [False, True])
    def test_its_norms(self, zero_centred):
        model = tiny_model("gpt2")
        exact = patch_model(copy.deepcopy(model))
        for block in model.transformer.h:
            norm = self.LayerNorm(64)
            norm.load_state_dict(block.ln_1.state_dict())
            if zero_centred:
                norm.zero_centered_gamma = True
                norm.forward = types.MethodType(zero_centred_forward, norm)
                norm.weight.data -= 1
            block.ln_1 = norm
        patch_model(model)
        for ours, theirs in zip(geoscale_layers(model), geoscale_layers(exact), strict=True):
            torch.testing.assert_close(ours.geometry.q_bound, theirs.geometry.q_bound, rtol=1e-6, atol=0)

    @pytest.mark.feature("FP8 linears (Transformer Engine)")
    def test_an_fp8_primary_weight_is_refused(self):
        model = tiny_model("qwen2")
        new = self.convert(attentions(model)[0].q_proj)
        new.weight = nn.Parameter(new.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        attentions(model)[0].q_proj = new
        with pytest.raises(UnsupportedModelError, match=r"holds torch\.float8_e4m3fn weights"):
            patch_model(model)
