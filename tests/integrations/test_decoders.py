"""Every decoder family of the table: certificates against brute force in float64, accuracy, causality, exact undoing."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from benchmarks.families import tiny
from hf_geoscale import geometry_report, patch_model, unpatch_model
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import FAMILIES
from hf_geoscale.integrations.families import attention_sites
from hf_geoscale.integrations.norms import gain_and_shift

from ..conftest import tokens
from ..tolerances import FLOAT64_ROUNDOFF, GRADIENT_ERROR, OUTPUT_ERROR
from .test_families import relative

VARIANTS: dict[str, tuple[str, dict]] = {
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True}),
    "gpt_bigcode-many-keys": ("gpt_bigcode", {"multi_query": False}),
    "glm4_moe-qk-norm": ("glm4_moe", {"use_qk_norm": True}),
    "llama-yarn": (
        "llama",
        {"attention_bias": True, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "persimmon-plain": ("persimmon", {"qk_layernorm": False}),
    "phi-qk-norm": ("phi", {"qk_layernorm": True}),
    "qwen3_moe-bias": ("qwen3_moe", {"attention_bias": True}),
    "smollm3-nope": ("smollm3", {"no_rope_layers": [1, 0]}),
    "stablelm-bias": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-qk-norm": ("stablelm", {"qk_layernorm": True}),
    "starcoder2-window": ("starcoder2", {"sliding_window": 9}),
}
NOT_BUILT = {"emu3_text_model"}
"""In the table for models that hold it as a part; AutoModelForCausalLM does not know it."""

CASES = sorted({*FAMILIES} - NOT_BUILT - {"llama", "mistral", "qwen2", "qwen3"}) + sorted(VARIANTS)


def build(case: str) -> nn.Module:
    model_type, options = VARIANTS.get(case, (case, {}))
    return tiny(model_type, **options)


@pytest.fixture(params=[pytest.param(case, marks=pytest.mark.feature(f"family: {case}")) for case in CASES])
def case(request) -> str:
    return request.param


@pytest.fixture
def seen():
    """Operands of every call of the attention interface: (module, query, key, value)."""
    calls: list[tuple] = []

    def spy(module, query, key, value, attention_mask, **call):
        calls.append((module, query, key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **call)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    return calls


def adversarial(site) -> torch.Tensor:
    """Tokens along the right singular vectors of each head's projections, and against them: (n, d) float64."""
    gain, _ = site.norm(site.input_norm)
    gain = torch.ones(()) if gain is None else gain.double()
    weights = [m.weight for m in site.attention.modules() if isinstance(m, nn.Linear) and m.in_features == 64]
    heads = [(w.view(-1, site.head_dim, 64) if w.shape[0] % site.head_dim == 0 else w[None]) * gain for w in weights]
    heads += [p.weight * gain for p in site.projections() if p.weight.shape[-1] == 64]
    directions = torch.cat([torch.linalg.svd(w, full_matrices=False)[2][:, :2].flatten(0, 1) for w in heads])
    if any(c.__name__.endswith("LayerNorm") for c in type(site.input_norm).__mro__):
        directions = directions - directions.mean(-1, keepdim=True)
    return torch.cat([directions, -directions])


class TestCertificates:
    def test_no_query_key_or_value_is_longer_than_its_certificate(self, case, seen):
        """Brute force in float64 over random tokens and over tokens aimed at layer 0, as they enter the attention."""
        model = build(case).double()
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
        sites = list(attention_sites(model))
        bounds = {id(s.attention): [operand_bound(p) for p in s.projections()] for s in sites}
        model.set_attn_implementation("spy")
        random = torch.randn(4, 60, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        aimed = adversarial(sites[0])
        with torch.no_grad():
            model(inputs_embeds=random, use_cache=False)
            for chunk in (aimed * 1e4).split(100):  # far above the norm's epsilon and any position embedding
                model(inputs_embeds=chunk[None], use_cache=False)
        assert {id(module) for module, *_ in seen} == set(bounds)
        used = torch.zeros(3, dtype=torch.float64)
        for module, *operands in seen:
            for i, (operand, bound) in enumerate(zip(operands, bounds[id(module)], strict=True)):
                norms = operand.norm(dim=-1).amax((0, 2))
                assert norms.shape == bound.shape
                assert (norms <= bound * (1 + FLOAT64_ROUNDOFF)).all()
                if module is sites[0].attention:
                    used[i] = torch.maximum(used[i], (norms / bound).amax())
        assert (used > 0.6).all()  # a bound that is never approached would prove nothing

    def test_softmax_scale_is_the_models(self, case, monkeypatch):
        model = build(case)
        asked = []

        def spy(module, query, key, value, attention_mask, **call):
            asked.append((module, call["scaling"]))
            return sdpa_attention_forward(module, query, key, value, attention_mask, **call)

        AttentionInterface.register("spy", spy)
        AttentionMaskInterface.register("spy", sdpa_mask)
        sites = {id(s.attention): s.softmax_scale for s in attention_sites(model)}
        model.set_attn_implementation("spy")
        model(tokens(1, 8), use_cache=False)
        assert asked
        for module, scaling in asked:
            expected = 1.0 if FAMILIES[model.config.model_type].read.keywords.get("scaled_query") else scaling
            assert scaling == expected
            assert sites[id(module)] == scaling

    def test_the_norm_does_what_its_gain_and_shift_say(self, case):
        for site in attention_sites(build(case).double()):
            x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e4
            gain, shift = gain_and_shift(site.input_norm, "the norm")
            unit = site.input_norm(x) if shift is None else site.input_norm(x) - shift
            unit = unit if gain is None else unit / gain
            torch.testing.assert_close(unit.norm(dim=-1), torch.full((5,), 8.0, dtype=torch.float64), rtol=1e-5, atol=0)


class TestPatched:
    def test_logits_and_gradients_stay_close(self, case):
        model, ids = build(case), tokens(2, 40)
        exact = model(ids, labels=ids, use_cache=False)
        exact.loss.backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        patch_model(model)
        ours = model(ids, labels=ids, use_cache=False)
        ours.loss.backward()
        assert relative(ours.logits, exact.logits) < OUTPUT_ERROR
        mine = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert relative(mine, expected) < GRADIENT_ERROR
        for row in geometry_report(model).rows:
            assert row["calls"] == 1
            assert row["fallback_calls"] == row["overflows"] == 0
            assert 0 < row["utilisation"] <= 1

    def test_the_past_does_not_see_the_future(self, case):
        model = patch_model(build(case))
        ids = tokens(2, 50)
        other = ids.clone()
        other[:, 30:] = tokens(2, 20, seed=1)
        with torch.no_grad():
            a, b = model(ids, use_cache=False).logits, model(other, use_cache=False).logits
        assert torch.equal(a[:, :30], b[:, :30])
        assert not torch.equal(a[:, 30:], b[:, 30:])

    def test_unpatch_gives_the_same_bits(self, case):
        model, ids = build(case), tokens(2, 20)
        with torch.no_grad():
            before = model(ids, use_cache=False).logits
            patch_model(model)
            assert not torch.equal(model(ids, use_cache=False).logits, before)
            assert torch.equal(unpatch_model(model)(ids, use_cache=False).logits, before)

    def test_a_changed_weight_is_noticed(self, case):
        """Every parameter the certificates are made of makes the scales stale."""
        model = build(case)
        for site in list(attention_sites(model))[:1]:
            names = FAMILIES[model.config.model_type].modules
            modules = [site.input_norm, *(getattr(site.attention, name, None) for name in names)]
            before = site.version()
            parameters = [p for m in modules if m is not None for p in m.parameters()]
            assert parameters
            for parameter in parameters:
                with torch.no_grad():
                    parameter.mul_(2)
                assert site.version() != before
                before = site.version()
            bounds = [operand_bound(p) for p in site.projections()]
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(0.5)
            for large, small in zip(bounds, (operand_bound(p) for p in site.projections()), strict=True):
                assert (large > small).all()
