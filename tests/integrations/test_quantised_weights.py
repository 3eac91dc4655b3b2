"""Quantised bases and FP8 linears: the certificate is of what they compute, casts of the activations included."""

import copy
import types

import pytest
import torch
from torch import Tensor, nn

from hf_geoscale import UnsupportedModelError, geometry_report, patch_model, unpatch_model
from hf_geoscale.geometry import ROUNDING_MARGIN
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.weights import TokenBound, effective_weight

from ..conftest import tiny_model, tokens
from ..tolerances import OUTPUT_ERROR
from .effective import overflows, relative

SEPARATE = ("q_proj", "k_proj", "v_proj")


def attentions(model) -> list:
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


def swap(model, make) -> nn.Module:
    """Replace q_proj, k_proj and v_proj of every layer by make(linear)."""
    for attention in attentions(model):
        for name in SEPARATE:
            setattr(attention, name, make(getattr(attention, name)))
    return model


def worst_tokens(weight: Tensor, gain: Tensor, shift: Tensor, heads: int) -> Tensor:
    """Tokens x = g∘u + β, ‖u‖ = √d, that aim at each head's largest output, at single rows, and random ones: (n, d) float64."""
    matrix = (weight.double() * gain).view(heads, -1, len(gain))
    right = torch.linalg.svd(matrix, full_matrices=False)[2][:, 0]
    rows = torch.nn.functional.normalize(matrix.flatten(0, 1), dim=-1)
    spread = torch.randn(300, len(gain), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peaked = torch.eye(len(gain), dtype=torch.float64) + 1e-3 * spread[: len(gain)]
    u = torch.cat([right, -right, rows, rows.sign(), spread, peaked])
    return torch.nn.functional.normalize(u, dim=-1) * len(gain) ** 0.5 * gain + shift


def assert_linear_certified(module, width: int, heads: int = 4, seed: int = 0) -> float:
    """The module's own forward lies within its map and excess for adversarial tokens; the largest share of the excess seen."""
    generator = torch.Generator().manual_seed(seed)
    gain = 1 + 0.5 * torch.randn(width, generator=generator)
    gain[0] = 8.0  # an outlier channel
    shift = 0.3 * torch.randn(width, generator=generator)
    out = module.out_features
    weight, bias, excess = effective_weight(module, "the layer", (out, width), gain, shift)
    x = worst_tokens(weight, gain.double(), shift.double(), heads)
    with torch.no_grad():
        # one token a call too: a tensor's scale depends on its other tokens
        computed = torch.cat([module(x.float()), *(module(row[None].float()) for row in x[:40])]).double()
    x = torch.cat([x, x[:40]])
    exact = x @ weight.double().T + (0 if bias is None else bias.double())
    token = TokenBound.of_norm(gain, shift, width, weight.device)
    rounding = ROUNDING_MARGIN * token.reach(weight.double())
    error = (computed - exact).abs()
    assert (error <= (excess if excess is not None else 0) + rounding).all()
    return float((error / (excess if excess is not None else rounding)).amax())


def assert_patched_is_close(model, make) -> None:
    """Replacing projections after patching: the next forward measures them, agrees with SDPA, and overflows nothing."""
    patch_model(model)
    swap(model, make)
    ids = tokens(2, 24)
    ours = model(ids, labels=ids)
    assert overflows(model) == 0
    assert 0 < geometry_report(model).rows[0]["utilisation"] <= 1
    if any(p.requires_grad for p in model.parameters()):
        ours.loss.backward()
    exact = unpatch_model(copy.deepcopy(model))(ids).logits
    assert relative(ours.logits.detach(), exact.detach()) < OUTPUT_ERROR


class TestBitsandbytes:
    @pytest.fixture(autouse=True)
    def bnb(self):
        self.bnb = pytest.importorskip("bitsandbytes")

    def four_bit(self, linear: nn.Linear, kind: str = "nf4", double: bool = True) -> nn.Module:
        new = self.bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, double, kind
        )
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    def eight_bit(self, linear: nn.Linear, threshold: float = 6.0) -> nn.Module:
        new = self.bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            has_fp16_weights=False,
            threshold=threshold,
        )
        new.load_state_dict(linear.state_dict())
        return new.to("cpu").eval()

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
        peft = pytest.importorskip("peft")
        make = self.four_bit if kind == "4bit" else self.eight_bit
        model = swap(tiny_model("qwen2"), make)
        setattr(model, f"is_loaded_in_{kind}", True)
        config = peft.LoraConfig(target_modules=list(SEPARATE), r=4, lora_alpha=4, init_lora_weights=False, **options)
        model = patch_model(peft.get_peft_model(model, config)).eval()
        module = attentions(model)[0].q_proj
        assert type(module).__module__ == "peft.tuners.lora.bnb"
        assert_linear_certified(module, 64)
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
        if kind == "4bit":  # an Int8Params cannot be copied
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
        with pytest.raises(UnsupportedModelError, match="holds torch.float8_e4m3fn weights"):
            patch_model(model)
