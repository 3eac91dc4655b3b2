"""Nothing is believed by its name: norms, projections, hooks and rotary embeddings are certified from what runs, or refused."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from hf_geoscale import UnsupportedModelError, patch_model, refresh_scales, unpatch_model
from hf_geoscale.integrations import geoscale_layers
from hf_geoscale.integrations.calls import returns_nothing
from hf_geoscale.integrations.norms import gain_and_shift

from ..conftest import here, tiny_model, tokens
from ..tolerances import OUTPUT_ERROR
from .compare import relative


class ZeroCentred(nn.Module):
    """1 + weight, under a name that says nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.eps = nn.Parameter(0.02 * torch.randn(width)), 1e-6

    def gain(self):
        return 1 + self.weight

    def forward(self, x):
        unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return unit.type_as(x) * self.gain()


class ExponentialRMSNorm(ZeroCentred):
    def gain(self):
        return self.weight.exp()


class UnboundedRMSNorm(ZeroCentred):
    def forward(self, x):
        return x * self.gain()


class ClippedLater(ZeroCentred):
    """An RMS norm of small rows only."""

    def forward(self, x):
        return torch.where(x.abs() > 500, x, super().forward(x))


def with_norms(make):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.input_layernorm = make(64)
    return model


def overflows(model) -> int:
    return sum(layer.statistics.overflows for layer in geoscale_layers(model))


class TestNorms:
    @pytest.mark.parametrize("kind", [ZeroCentred, Qwen3NextRMSNorm])
    def test_a_zero_centred_one_of_any_name_has_the_gain_it_computes(self, kind):
        """Certificates are those of the same model with ordinary norms of the gain 1 + weight."""
        model, ids = with_norms(kind), tokens(2, 32)
        twin = tiny_model("llama")
        for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
            nn.init.normal_(layer.input_layernorm.weight, std=0.02)
            other.input_layernorm.weight.data.copy_(1 + layer.input_layernorm.weight.data)
        torch.testing.assert_close(model(ids).logits, twin(ids).logits)
        for each in (model, twin):
            patch_model(each, backend="reference")(ids)
        for layer, other in zip(geoscale_layers(model), geoscale_layers(twin), strict=True):
            for name in ("q_bound", "k_bound", "v_bound"):
                torch.testing.assert_close(getattr(layer.geometry, name), getattr(other.geometry, name))
        assert overflows(model) == 0

    @pytest.mark.parametrize("kind", [ExponentialRMSNorm, UnboundedRMSNorm, ClippedLater])
    def test_one_that_computes_something_else_is_refused_whatever_its_name(self, kind):
        with pytest.raises(
            UnsupportedModelError, match=f"layer 0 of the llama model: {kind.__name__}, run on random rows"
        ):
            patch_model(with_norms(kind))

    def test_the_gain_does_not_rest_on_todays_weight(self):
        """exp(w) and 1 + w agree for a weight near zero."""
        norm = ExponentialRMSNorm(64)
        nn.init.zeros_(norm.weight)
        with pytest.raises(UnsupportedModelError, match="run on random rows"):
            gain_and_shift(norm, "it")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, ZeroCentred])
    def test_every_dtype_and_a_weight_of_zeros_or_nan(self, kind, dtype):
        norm = kind(64).to(dtype)
        for value in (0.0, 300.0, torch.nan):
            nn.init.constant_(norm.weight, value)
            gain, _ = gain_and_shift(norm, "it")
            torch.testing.assert_close(gain.double(), norm.weight.double() + (kind is ZeroCentred), equal_nan=True)

    def test_a_forward_replaced_on_the_class_is_run_again(self, monkeypatch):
        model, ids = tiny_model("llama"), tokens(1, 16)
        patch_model(model)(ids)
        kind = type(model.model.layers[0].input_layernorm)
        monkeypatch.setattr(kind, "forward", lambda self, x: x * self.weight)
        with pytest.raises(UnsupportedModelError, match="LlamaRMSNorm, run on random rows"):
            model(ids)

    def test_nothing_runs_twice_and_no_random_number_is_drawn(self, monkeypatch):
        runs = []
        kind = nn.RMSNorm
        original = kind.forward
        norm = nn.RMSNorm(64)
        monkeypatch.setattr(kind, "forward", lambda self, x: runs.append(1) or original(self, x))
        before = torch.random.get_rng_state()
        for _ in range(3):
            gain_and_shift(norm, "it")
        assert len(runs) == 1
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_one_that_cannot_run_here_is_believed_with_a_warning_until_it_can(self, caplog, monkeypatch):
        class NeedsAGpuRMSNorm(ZeroCentred):
            ready = False

            def forward(self, x):
                if not self.ready:
                    raise RuntimeError("no GPU")
                return super().forward(x)

        norm = NeedsAGpuRMSNorm(64)
        with pytest.raises(UnsupportedModelError, match="cannot be run here"):
            gain_and_shift(norm, "the norm")
        NeedsAGpuRMSNorm.__module__ = "liger_kernel.transformers"
        with caplog.at_level(logging.WARNING):
            assert gain_and_shift(norm, "the norm")[0] is norm.weight
            gain_and_shift(norm, "the norm")
        assert caplog.text.count("the norm cannot be run here (RuntimeError: no GPU)") == 1
        norm.ready = True
        torch.testing.assert_close(gain_and_shift(norm, "the norm")[0], 1 + norm.weight.detach().double())

    def test_one_that_wants_a_batch_is_run_and_not_believed_by_its_name(self):
        class LoudRMSNorm(ZeroCentred):
            def forward(self, x):
                assert len(x.shape) == 3
                return 8 * super().forward(x)

        with pytest.raises(UnsupportedModelError, match="LoudRMSNorm, run on random rows"):
            patch_model(with_norms(LoudRMSNorm))

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("kind", ["buffer", "attribute"])
    def test_a_factor_of_its_own_written_later_is_seen(self, kind, training):
        class ScaledRMSNorm(ZeroCentred):
            def __init__(self, width):
                super().__init__(width)
                if kind == "buffer":
                    self.register_buffer("factor", torch.ones(()))
                else:
                    self.factor = 1.0

            def forward(self, x):
                return super().forward(x) * self.factor

        model, ids = with_norms(ScaledRMSNorm).train(training), tokens(1, 16)
        patch_model(model)(ids)
        for layer in model.model.layers:
            if kind == "buffer":
                layer.input_layernorm.factor.fill_(16.0)
            else:
                layer.input_layernorm.factor = 16.0
        with pytest.raises(UnsupportedModelError, match="ScaledRMSNorm, run on random rows"):
            model(ids)

    def test_a_parametrized_weight_is_refused_by_name(self):
        class Exponential(nn.Module):
            def forward(self, weight):
                return weight.exp()

        model = tiny_model("llama")
        torch.nn.utils.parametrize.register_parametrization(
            model.model.layers[1].input_layernorm, "weight", Exponential()
        )
        with pytest.raises(UnsupportedModelError, match=r"layer 1 .*parametrize computes anew .*\(Exponential\)"):
            patch_model(model)


class TestForwards:
    def test_one_that_was_replaced_on_a_decoder_layer_is_refused(self):
        model = tiny_model("llama")
        block = model.model.layers[1]
        own = block.forward
        block.forward = lambda hidden_states, **kwargs: own(8 * hidden_states, **kwargs)
        with pytest.raises(UnsupportedModelError, match=r"layer 1 .*LlamaDecoderLayer"):
            patch_model(model)

    def test_one_that_a_library_replaced_is_refused_by_name(self):
        """As LyCORIS does; also while its own weights are still zero."""
        model = tiny_model("llama")
        linear = model.model.layers[1].self_attn.k_proj
        linear.forward = lambda x, inner=linear.forward: inner(x)
        with pytest.raises(UnsupportedModelError, match=f"k_proj runs a forward of {__name__} instead of its class's"):
            patch_model(model)

    def test_one_that_is_replaced_after_patching_is_noticed(self):
        model, ids = tiny_model("llama"), tokens(1, 16)
        patch_model(model)(ids)
        for training in (False, True):
            other = copy.deepcopy(model).train(training)
            other(ids)
            linear = other.model.layers[0].self_attn.q_proj
            linear.forward = lambda x, inner=linear.forward: 9 * inner(x)
            with pytest.raises(UnsupportedModelError, match="q_proj runs a forward of"):
                other(ids)

    def test_hooks_of_accelerate_keep_working(self):
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        model, ids = tiny_model("llama"), tokens(1, 16)
        plain = model(ids).logits
        for module in (model.model.layers[0].input_layernorm, model.model.layers[0].self_attn.q_proj):
            add_hook_to_module(module, AlignDevicesHook(execution_device=here()))
        assert relative(patch_model(model)(ids).logits, plain) < OUTPUT_ERROR

    def test_a_hook_of_accelerates_kind_that_is_not_its_own_is_refused(self):
        from accelerate.hooks import ModelHook, add_hook_to_module

        class Louder(ModelHook):
            def post_forward(self, module, output):
                return 8 * output

        model = tiny_model("llama")
        add_hook_to_module(model.model.layers[0].self_attn.v_proj, Louder())
        with pytest.raises(UnsupportedModelError, match="v_proj runs a forward of"):
            patch_model(model)

    def test_offloaded_weights_name_what_offloads_whole_layers(self):
        from accelerate import cpu_offload

        model = tiny_model("llama")
        cpu_offload(model, execution_device=torch.device("cpu"))
        patch_model(model)
        with pytest.raises(UnsupportedModelError, match="preload_module_classes"):
            model(tokens(1, 16))


def louder(module, args, output):
    return 8 * output


def louder_before(module, args, kwargs):
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": 6 * kwargs["hidden_states"]}
    return (6 * args[0], *args[1:]), kwargs


def in_place(module, args, output):
    output.mul_(8)


class TestHooks:
    PLACES = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("patched", [False, True])
    def test_one_that_changes_values_is_refused_by_name(self, place, patched):
        model, ids = tiny_model("llama"), tokens(1, 16)
        if patched:
            patch_model(model)(ids)
        model.model.layers[0].get_submodule(place).register_forward_hook(louder)
        (refresh_scales if patched else patch_model)(model)
        with pytest.raises(UnsupportedModelError, match=f"has a hook of {__name__} that changes values"):
            model(ids)

    @pytest.mark.parametrize("patched", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    def test_one_in_front_of_the_attention_is_refused(self, patched, training):
        model, ids = tiny_model("llama").train(training), tokens(1, 16)
        if patched:
            patch_model(model)(ids)
        model.model.layers[1].self_attn.register_forward_pre_hook(louder_before, with_kwargs=True)
        patch_model(model)
        if patched:  # a new one is watched from the second forward on
            model(ids)
        with pytest.raises(UnsupportedModelError, match=r"layer 1 .* the attention has a hook"):
            model(ids)

    @pytest.mark.parametrize("written", [False, True])
    def test_one_in_front_of_the_attention_may_not_change_angles(self, written):
        def louder_angles(module, args, kwargs):
            cos, sin = kwargs["position_embeddings"]
            if written:
                cos.mul_(8)
                return args, kwargs
            return args, kwargs | {"position_embeddings": (8 * cos, 8 * sin)}

        model, ids = tiny_model("llama"), tokens(1, 16)
        model.model.layers[1].self_attn.register_forward_pre_hook(louder_angles, with_kwargs=True)
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"layer 1 .* the attention has a hook"):
            patch_model(model)(ids)

    @pytest.mark.parametrize("patched", [False, True])
    def test_one_of_the_rotary_embedding_is_refused(self, patched):
        model, ids = tiny_model("llama"), tokens(1, 16)
        if patched:
            patch_model(model)(ids)
        model.model.rotary_emb.register_forward_hook(lambda module, args, output: tuple(8 * each for each in output))
        (refresh_scales if patched else patch_model)(model)
        with pytest.raises(UnsupportedModelError, match="rotary embedding LlamaRotaryEmbedding has a hook"):
            model(ids)

    def test_observers_keep_working_and_are_never_run_for_a_look(self):
        model, ids, seen, named = tiny_model("llama"), tokens(1, 16), [], []

        def observe(module, args, output):
            named.append(output.shape)

        plain = model(ids).logits
        layer = model.model.layers[0]
        layer.input_layernorm.register_forward_hook(observe)
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        patch_model(model)
        assert (named, seen) == ([], [])
        assert relative(model(ids).logits, plain) < OUTPUT_ERROR
        model(ids)
        assert (len(named), len(seen)) == (2, 2)

    def test_one_that_writes_in_place_and_returns_its_argument_is_refused(self):
        model, ids = tiny_model("llama"), tokens(1, 16)
        model.model.layers[0].input_layernorm.register_forward_hook(lambda module, args, output: output.mul_(8))
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="changes values"):
            patch_model(model)(ids)

    def test_unpatching_takes_the_watch_away(self):
        model, ids = tiny_model("llama"), tokens(1, 16)
        norm = model.model.layers[0].input_layernorm
        norm.register_forward_hook(louder)
        plain = model(ids).logits
        unpatch_model(patch_model(model))
        assert len(norm._forward_hooks) == 1
        assert torch.equal(model(ids).logits, plain)

    def test_a_hook_is_noticed_when_it_comes_and_when_it_goes(self):
        model, ids = tiny_model("llama").train(), tokens(1, 16)
        patch_model(model)(ids)
        handle = model.model.layers[0].input_layernorm.register_forward_hook(louder)
        model(ids)  # a new one is watched from the second forward on
        with pytest.raises(UnsupportedModelError, match="changes values"):
            model(ids)
        handle.remove()
        model(ids)

    def test_what_code_returns_is_read_off_it(self):
        def some(x):
            if x:
                return x

        def none(x):
            if x:
                return
            x.append(1)

        assert returns_nothing(none)
        assert returns_nothing(in_place)
        assert not returns_nothing(some)
        assert not returns_nothing(louder)
        assert not returns_nothing(print)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda q: prune.l1_unstructured(q, "weight", amount=0.3), "prune"),
        (weight_norm, "weight_norm"),
        (spectral_norm, "spectral_norm"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
class TestReparametrised:
    @pytest.mark.parametrize("training", [False, True])
    def test_before_and_after_patching_each_has_its_own_name(self, change, name, training):
        model, ids = tiny_model("llama").train(training), tokens(1, 16)
        patched = patch_model(copy.deepcopy(model))
        patched(ids)
        for each, act in ((model, patch_model), (patched, lambda m: m(ids))):
            change(each.model.layers[1].self_attn.q_proj)
            with pytest.raises(
                UnsupportedModelError, match=rf"q_proj has a weight that torch.nn.utils.{name} computes anew"
            ):
                act(each)

    def test_made_permanent_it_runs(self, change, name):
        model, ids = tiny_model("llama"), tokens(1, 16)
        linear = model.model.layers[0].self_attn.q_proj
        change(linear)
        remove = {"prune": lambda: prune.remove(linear, "weight")}
        remove.get(name, lambda: getattr(torch.nn.utils, f"remove_{name}")(linear))()
        patch_model(model)(ids)
        assert [(layer.calls, layer.statistics.overflows) for layer in geoscale_layers(model)] == [(1, 0)] * 2


class TestRotary:
    @staticmethod
    def yarn(model, kind=LlamaRotaryEmbedding):
        config = copy.deepcopy(model.config)
        config.rope_parameters = config.rope_scaling = {  # the latter is transformers 4's name
            "rope_type": "yarn",
            "factor": 32.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        }
        return kind(config)

    @staticmethod
    def bounds(model):
        return torch.stack([layer.geometry.q_bound for layer in geoscale_layers(model)])

    @pytest.mark.parametrize("notice", ["forward in training", "forward", "refresh"])
    def test_one_put_in_after_patching_is_seen(self, notice):
        model, ids = tiny_model("llama").train(notice.endswith("training")), tokens(1, 16)
        patch_model(model)(ids)
        before = self.bounds(model)
        model.model.rotary_emb = self.yarn(model)
        if notice == "refresh":
            refresh_scales(model)
        else:
            model(ids)
        factor = model.model.rotary_emb.attention_scaling
        assert factor > 1.3
        torch.testing.assert_close(self.bounds(model), before * factor)

    def test_its_factor_written_later_is_seen(self):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 16)
        before = self.bounds(model)
        model.model.rotary_emb.attention_scaling = 2.0
        model(ids)
        torch.testing.assert_close(self.bounds(model), 2 * before)

    def test_a_factor_that_nobody_declares_is_measured(self):
        class Louder(LlamaRotaryEmbedding):
            def forward(self, x, position_ids):
                cos, sin = super().forward(x, position_ids)
                return 3 * cos, 3 * sin

        model = tiny_model("llama")
        before = self.bounds(patch_model(copy.deepcopy(model)))
        model.model.rotary_emb = Louder(model.config)
        torch.testing.assert_close(self.bounds(patch_model(model)), 3 * before, rtol=1e-5, atol=0)

    def test_a_factor_of_its_own_written_later_is_seen(self):
        class Scaled(LlamaRotaryEmbedding):
            factor = 1.0

            def forward(self, x, position_ids):
                cos, sin = super().forward(x, position_ids)
                return self.factor * cos, self.factor * sin

        model, ids = tiny_model("llama"), tokens(1, 16)
        model.model.rotary_emb = Scaled(model.config)
        before = self.bounds(patch_model(model))
        model.model.rotary_emb.factor = 3.0
        model(ids)
        torch.testing.assert_close(self.bounds(model), 3 * before, rtol=1e-5, atol=0)

    def test_a_factor_that_grows_with_the_position_is_measured_far_out(self):
        class LouderLater(LlamaRotaryEmbedding):
            def forward(self, x, position_ids):
                cos, sin = super().forward(x, position_ids)
                factor = 1 + (position_ids[..., None] >= 4096)
                return factor * cos, factor * sin

        model = tiny_model("llama")
        before = self.bounds(patch_model(copy.deepcopy(model)))
        model.model.rotary_emb = LouderLater(model.config)
        torch.testing.assert_close(self.bounds(patch_model(model)), 2 * before, rtol=1e-5, atol=0)

    def test_one_that_cannot_be_run_is_refused_by_name(self):
        class Elsewhere(nn.Module):
            def forward(self, x, position_ids, secret):
                return x, x

        model = tiny_model("llama")
        model.model.rotary_emb = Elsewhere()
        with pytest.raises(UnsupportedModelError, match="rotary embedding Elsewhere cannot be run on positions"):
            patch_model(model)


class TestWrites:
    @pytest.mark.parametrize("training", [False, True])
    def test_another_weight_at_the_same_address(self, training):
        """A frozen weight is dropped and another takes its place: address and write counter are the same."""
        model, ids = tiny_model("llama").train(training).requires_grad_(False), tokens(1, 16)
        patch_model(model)(ids)
        linear = model.model.layers[0].self_attn.q_proj
        bound = geoscale_layers(model)[0].geometry.q_bound.clone()
        storage, version = linear.weight.data, linear.weight._version
        linear.weight = None
        storage.mul_(4)
        linear.weight = nn.Parameter(storage, requires_grad=False)
        while linear.weight._version < version:
            linear.weight.add_(0)
        assert linear.weight.data_ptr() == storage.data_ptr()
        model(ids)
        torch.testing.assert_close(geoscale_layers(model)[0].geometry.q_bound, 4 * bound)

    def test_rows_exchanged_through_data_in_evaluation(self):
        """The sum of the bits stays the same."""
        model, ids = tiny_model("llama"), tokens(1, 16)
        patch_model(model)(ids)
        layer = geoscale_layers(model)[0]
        before = layer.geometry.q_bound.clone()
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.data.copy_(weight.data.roll(16, 0))  # heads change places
        model(ids)
        torch.testing.assert_close(layer.geometry.q_bound, before.roll(1))
        assert not torch.equal(layer.geometry.q_bound, before)
