"""Every decoder family of the table: certificates against brute force in float64, accuracy, causality, exact undoing."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from benchmarks.families import tiny
from hf_geoscale import UnsupportedAttentionError, UnsupportedModelError, geometry_report, patch_model, unpatch_model
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import FAMILIES, geoscale_layers
from hf_geoscale.integrations.families import attention_sites
from hf_geoscale.integrations.norms import gain_and_shift

from ..conftest import tokens
from ..tolerances import FLOAT64_ROUNDOFF, GRADIENT_ERROR, OUTPUT_ERROR
from .releases import built
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
    "sarvam_moe-qk-norm": ("sarvam_moe", {"use_qk_norm": True}),
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
    return built(model_type, **options)


@pytest.fixture(params=[pytest.param(case, marks=pytest.mark.feature(f"family: {case}")) for case in CASES])
def case(request) -> str:
    return request.param


@pytest.fixture
def seen():
    """Operands of every call of the attention interface: (module, query, key, value)."""
    calls: list[tuple] = []

    def spy(module, query, key, value, attention_mask, **call):
        calls.append((module, query, key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **call | {"softcap": None})

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


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64, its mixtures of experts too."""
    model.double()
    if hasattr(model, "set_experts_implementation"):  # torch's grouped product has no float64
        model.set_experts_implementation("eager")
        return model
    for name, module in model.named_modules():  # routers of transformers 4 compute in float32, whatever their weights
        if type(module).__name__.endswith("TopkRouter"):
            module.register_forward_hook(lambda module, arguments, output: (output[0], output[1].double()))
        elif name.endswith("mlp.gate") and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
    return model


class TestCertificates:
    def test_no_query_key_or_value_is_longer_than_its_certificate(self, case, seen):
        """Brute force in float64 over random tokens and over tokens aimed at layer 0, as they enter the attention."""
        model = in_float64(build(case))
        if case == "kolibri1" and torch.empty(0).is_cuda:
            pytest.skip("its router's product has no float64 on a GPU")
        sites = list(attention_sites(model))
        bounds = {id(s.attention): [operand_bound(p) for p in s.projections()] for s in sites}
        model.set_attn_implementation("spy")
        random = torch.randn(100, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        embedding = model.get_input_embeddings().weight
        with torch.no_grad():
            for chunk in (random, *adversarial(sites[0]).split(100)):
                if sites[0].stream is None:  # far above the norm's epsilon and any position embedding
                    model(inputs_embeds=1e4 * chunk[None], use_cache=False)
                    continue
                rows = torch.nn.functional.normalize(chunk[: len(embedding)], dim=-1)
                embedding[: len(rows)] = 0.99 * rows * embedding.norm(dim=-1).amax()  # within the certified embedding
                model(torch.arange(len(rows))[None], use_cache=False)
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
            asked.append((module, call.get("scaling") or query.shape[-1] ** -0.5))  # what SDPA does without
            return sdpa_attention_forward(module, query, key, value, attention_mask, **call | {"softcap": None})

        AttentionInterface.register("spy", spy)
        AttentionMaskInterface.register("spy", sdpa_mask)
        sites = {id(s.attention): s.softmax_scale for s in attention_sites(model)}
        model.set_attn_implementation("spy")
        model(tokens(1, 8), use_cache=False)
        assert asked
        for module, scaling in asked:
            assert sites[id(module)] == scaling

    def test_the_norm_does_what_its_gain_and_shift_say(self, case):
        for site in attention_sites(build(case).double()):
            x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e4
            gain, shift = gain_and_shift(site.input_norm, "the norm")
            unit = site.input_norm(x) if shift is None else site.input_norm(x) - shift
            unit = unit if gain is None else unit / gain
            torch.testing.assert_close(unit.norm(dim=-1), torch.full((5,), 8.0, dtype=torch.float64), rtol=1e-5, atol=0)


class TestPatched:
    def test_outputs_and_gradients_stay_close(self, case):
        """The first attention's output, whose input is the same; then the logits and every gradient."""
        model, ids = build(case), tokens(2, 40)
        site = next(attention_sites(model))
        outputs = []
        hook = site.attention.register_forward_hook(lambda module, args, output: outputs.append(output[0].detach()))
        exact = model(ids, labels=ids, use_cache=False)
        exact.loss.backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        patch_model(model)
        ours = model(ids, labels=ids, use_cache=False)
        ours.loss.backward()
        hook.remove()
        assert relative(outputs[len(outputs) // 2], outputs[0]) < OUTPUT_ERROR
        mine = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        if case != "phimoe":  # its router masks experts beyond a threshold, which roundings cross
            # Where a norm follows the attention the residual stream dilutes nothing, and both layers' errors add up.
            layers = 2 if site.stream is not None else 1
            assert relative(ours.logits, exact.logits) < layers**0.5 * OUTPUT_ERROR
            assert relative(mine, expected) < GRADIENT_ERROR
        assert torch.isfinite(mine).all()
        for row in geometry_report(model).rows:
            assert row["calls"] in ((2, 6) if case == "hrm_text" else (1,))  # HRM's two stacks run in cycles
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
        """Any parameter of the model that a certificate of the last layer depends on makes its scales stale."""
        model = build(case)
        site = list(attention_sites(model))[-1]
        before = torch.cat([operand_bound(p) for p in site.projections()])
        noticed = 0
        for name, parameter in model.named_parameters():
            version, saved = site.version(), parameter.detach().clone()
            with torch.no_grad():
                parameter.mul_(2)
            if not torch.equal(torch.cat([operand_bound(p) for p in site.projections()]), before):
                noticed += 1
                assert site.version() != version, name
            with torch.no_grad():
                parameter.copy_(saved)
        assert noticed >= 1


class TestResidualStream:
    """Post-norm decoders: what only a sum of the norms before it bounds."""

    @pytest.mark.feature("family: olmo2")
    def test_embeddings_of_unknown_size_are_refused(self):
        model = patch_model(tiny("olmo2"))
        embeddings = model.get_input_embeddings()(tokens(1, 8))
        with pytest.raises(UnsupportedAttentionError, match="inputs_embeds could be of any size"):
            model(inputs_embeds=embeddings)
        unpatch_model(model)
        assert torch.isfinite(model(inputs_embeds=embeddings).logits).all()

    @pytest.mark.feature("family: olmo2")
    def test_an_embedding_of_another_kind_is_refused(self):
        model = tiny("olmo2")
        model.set_input_embeddings(nn.EmbeddingBag(96, 64))
        with pytest.raises(UnsupportedModelError, match="come from a EmbeddingBag, not a plain"):
            patch_model(model)

    @pytest.mark.feature("family: olmo2")
    def test_the_bound_of_the_second_layer_is_approached(self, seen):
        """All terms along one direction: the embedding, the attention's and the MLP's output."""
        model = tiny("olmo2").double()
        first, second = model.model.layers
        direction = torch.zeros(64, dtype=torch.float64)
        direction[0] = 1
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(3 * direction.expand(96, -1))
            for linear in (first.self_attn.v_proj, first.self_attn.o_proj, first.mlp.down_proj):
                linear.weight.zero_()
                linear.weight[0].fill_(1.0)
            first.self_attn.v_proj.weight.fill_(1.0)
            for linear in (first.mlp.gate_proj, first.mlp.up_proj):
                linear.weight.fill_(1.0)
            second.self_attn.v_proj.weight.zero_()
            second.self_attn.v_proj.weight[:, 0] = 1.0
        bound = operand_bound(list(attention_sites(model))[1].projections()[2])
        model.set_attn_implementation("spy")
        model(tokens(1, 8), use_cache=False)
        norms = seen[1][3].norm(dim=-1).amax((0, 2))
        assert (norms <= bound).all()
        assert (norms >= 0.7 * bound).all()

    @pytest.mark.feature("family: olmo2")
    @pytest.mark.parametrize("layer", [0, 1])
    def test_the_drift_budget_covers_every_weight(self, layer):
        """Every parameter moved by the budget, with signs that enlarge it: the certificate stays within the headroom."""
        model = patch_model(tiny("olmo2"), headroom=4.0)
        state = geoscale_layers(model)[layer]
        moved = state.max_weight_drift
        assert moved > 0
        before = state.geometry
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(moved * parameter.sign())
        for projection, bound in zip(
            state.site.projections(), (before.q_bound, before.k_bound, before.v_bound), strict=True
        ):
            assert (operand_bound(projection) <= 4.0 * bound).all()


class OffsetRMSNorm(nn.RMSNorm):
    """As Liger-Kernel's: the offset is an attribute."""

    offset = 1.0

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight + self.offset, 1e-6)


class TestNorms:
    def test_the_offset_of_liger_kernel_is_part_of_the_gain(self):
        norm = OffsetRMSNorm(4)
        gain, _ = gain_and_shift(norm, "the norm")
        torch.testing.assert_close(gain, torch.full((4,), 2.0, dtype=torch.float64))

    def test_a_derived_class_keeps_its_meaning(self):
        """FSDP2 gives a wrapped module a class of its own, derived from the layer's."""
        norm = GemmaRMSNorm(4)
        norm.__class__ = type("FSDPGemmaRMSNorm", (GemmaRMSNorm,), {})
        gain, _ = gain_and_shift(norm, "the norm")
        torch.testing.assert_close(gain, 1 + norm.weight.double())

    def test_a_q_norm_of_another_width_is_refused(self):
        model = tiny("qwen3")
        model.model.layers[0].self_attn.q_norm = nn.RMSNorm(8)
        with pytest.raises(UnsupportedModelError, match="q_norm must normalise one head, with a gain of 16 or 4 x 16"):
            patch_model(model)
