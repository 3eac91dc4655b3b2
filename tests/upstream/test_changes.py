"""What happens when upstream's code changes under the fused forwards: results are those of SDPA under the same change, or refused.

A change comes with a new release, or from a library that replaces functions, before or after patching.
"""

import inspect
import logging
import re

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM

from hf_geoscale import UnsupportedAttentionError, geometry_report, patch_model
from hf_geoscale.integrations import geoscale_layers

from ..conftest import tiny_model, tokens
from ..integrations.compare import relative
from ..tolerances import GRADIENT_ERROR, OUTPUT_ERROR
from .edits import edited, edited_module

STEP_MORE = (r"\n( +)(attention_interface: Callable)", r"\n\1query_states = query_states.roll(3, -1)\n\1\2")
ANOTHER_SCALE = (r"scaling=self\.scaling,", "scaling=self.scaling * 0.1,")
CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"
WHEN = pytest.mark.parametrize("when", ["before patching", "after patching"])


def widened():
    """A tiny Llama whose attention decides its output: residual streams of their own would hide an error in it."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(8)
            layer.self_attn.q_proj.weight.mul_(3)
    return model


def step(model, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and all gradients as one vector."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def changed_and_patched(change, when: str, **config):
    """A model under a changed upstream, and SDPA's logits and gradients there."""
    model, ids = widened(), tokens(2, 40)
    before = step(model, ids)
    if when == "after patching":
        patch_model(model, backend="reference", **config)
        step(model, ids)
    change()
    sdpa = step(widened(), ids)
    assert relative(sdpa[0], before[0]) > 4 * OUTPUT_ERROR  # the change is one
    return patch_model(model, backend="reference", **config), ids, sdpa


def assert_sdpas(model, ids, sdpa) -> None:
    logits, grads = step(model, ids)
    assert relative(logits, sdpa[0]) < OUTPUT_ERROR
    assert relative(grads, sdpa[1]) < GRADIENT_ERROR


def logit_utilisations(model) -> list[float]:
    """Largest quantised logit over its certificate, layer by layer."""
    layers = geoscale_layers(model)
    for layer in layers:
        layer.collect()
    return [layer.peak_logit_utilisation for layer in layers]


def front_end(model) -> str:
    (said,) = {row["front_end"] for row in geometry_report(model).rows}
    return said


@WHEN
class TestForward:
    @pytest.mark.parametrize("edit", [STEP_MORE, ANOTHER_SCALE], ids=["a step more", "another softmax scale"])
    def test_one_that_computes_something_else_is_followed(self, monkeypatch, caplog, when, edit):
        def change():
            monkeypatch.setattr(LlamaAttention, "forward", edited(LlamaAttention.forward, edit))

        with caplog.at_level(logging.WARNING, "hf_geoscale"):
            model, ids, sdpa = changed_and_patched(change, when)
            assert_sdpas(model, ids, sdpa)
            assert_sdpas(model, ids, sdpa)
        assert re.match(r"LlamaAttention\.forward \(transformers .*\) is none of those known", front_end(model))
        said = [record.getMessage() for record in caplog.records if "fused front end" in record.getMessage()]
        assert len(said) == 1
        monkeypatch.undo()
        model(ids, use_cache=False)
        assert when == "before patching" or front_end(model) == "fused"

    @pytest.mark.parametrize("bound", ["certified", "auto_alpha"])
    def test_quantised_logits_keep_their_certificate(self, monkeypatch, when, bound):
        """With a softmax scale a hundred times as large they would leave the range of E4M3."""

        def change():
            edit = (ANOTHER_SCALE[0], "scaling=self.scaling * 100,")
            monkeypatch.setattr(LlamaAttention, "forward", edited(LlamaAttention.forward, edit))

        model, ids = patch_model(widened(), backend="reference", quantize_logits=True), tokens(2, 40)
        model(ids)
        used = logit_utilisations(model)
        model, ids, _ = changed_and_patched(change, when, quantize_logits=True, bound=bound)
        model(ids)
        utilisations = logit_utilisations(model)
        assert 0.5 * used[0] < utilisations[0]
        assert max(utilisations) <= 1

    @pytest.mark.parametrize("training", [False, True])
    def test_one_whose_cache_has_another_name(self, monkeypatch, when, training):
        """Ten tokens fill a cache, and one more reads it."""

        def change():
            forward = LlamaAttention.forward
            names = (r"@deprecate_kwarg.*\n", ""), (rf"\b{CACHE}\b", "kept")
            edits = names if "@deprecate_kwarg" in inspect.getsource(forward) else names[1:]
            monkeypatch.setattr(LlamaAttention, "forward", edited(forward, *edits))
            layer = LlamaDecoderLayer.forward
            inner = rf"(?s)(self\.self_attn\(.*?){CACHE}={CACHE}"
            monkeypatch.setattr(LlamaDecoderLayer, "forward", edited(layer, (inner, rf"\1kept={CACHE}")))

        def run(model):
            model.train(training)
            first = model(ids[:, :10], use_cache=True)
            with torch.no_grad():
                second = model(ids[:, 10:], past_key_values=first.past_key_values, use_cache=True)
            return torch.cat([first.logits, second.logits], 1).detach(), first.past_key_values.get_seq_length()

        ids, model = tokens(1, 11), widened()
        if when == "after patching":
            run(patch_model(model, backend="reference"))
        change()
        logits, length = run(widened())
        ours, kept = run(patch_model(model, backend="reference"))
        assert kept == length == 11
        assert relative(ours, logits) < OUTPUT_ERROR

    def test_one_with_a_keyword_of_its_own(self, monkeypatch, when):
        def change():
            parameter = (r"(?s)(def forward\(.*?attention_mask[^\n]*),\n", r"\1,\n    sharpness=1.0,\n")
            use = (STEP_MORE[0], r"\n\1query_states = query_states * sharpness\n\1\2")
            monkeypatch.setattr(LlamaAttention, "forward", edited(LlamaAttention.forward, parameter, use))
            layer = LlamaDecoderLayer.forward
            monkeypatch.setattr(
                LlamaDecoderLayer, "forward", edited(layer, (r"self\.self_attn\(", "self.self_attn(sharpness=0.1, "))
            )

        assert_sdpas(*changed_and_patched(change, when))


def biased_sdpa(module, query, key, value, attention_mask, scaling=None, logit_bias=None, **_):
    """SDPA of a release in which it takes a bias."""
    rows, keys = query.shape[2], key.shape[2]
    bias = torch.full((rows, keys), float("-inf")).triu(keys - rows + 1) + (0 if logit_bias is None else logit_bias)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


@WHEN
class TestKeywordOfTheInterface:
    @pytest.fixture(autouse=True)
    def _release(self, monkeypatch):
        from hf_geoscale.integrations import attention

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", biased_sdpa)
        monkeypatch.setattr(attention, "sdpa_attention_forward", biased_sdpa)

    def change(self, monkeypatch):
        bias = "logit_bias=-0.5 * torch.arange(query_states.shape[2]).flip(0)[None],"
        edit = (r"scaling=self\.scaling,", rf"scaling=self.scaling, {bias}")
        monkeypatch.setattr(LlamaAttention, "forward", edited(LlamaAttention.forward, edit))

    def test_it_is_refused_by_name(self, monkeypatch, when):
        model, ids, _ = changed_and_patched(lambda: self.change(monkeypatch), when)
        with pytest.raises(UnsupportedAttentionError, match="does not know the keyword logit_bias"):
            model(ids)

    def test_with_a_fallback_sdpa_honours_it(self, monkeypatch, when):
        model, ids, sdpa = changed_and_patched(lambda: self.change(monkeypatch), when, fallback="sdpa")
        torch.testing.assert_close(model(ids).logits, sdpa[0])
        assert geometry_report(model).rows[0]["fallback_reasons"] == {"its keyword logit_bias": 1}


def halved(q, k, cos, sin, *_, **__):
    return q / 2, k / 2


def rolled(x):
    return x.roll(1, -1)


@WHEN
class TestWhatTheForwardCalls:
    @pytest.mark.parametrize(("name", "other"), [("apply_rotary_pos_emb", halved), ("rotate_half", rolled)])
    def test_another_rotation(self, monkeypatch, when, name, other):
        model, ids, sdpa = changed_and_patched(lambda: monkeypatch.setattr(modeling_llama, name, other), when)
        assert_sdpas(model, ids, sdpa)
        assert front_end(model) == f"{__name__} replaced {name}"

    def test_liger_kernels_rotation_is_known(self, monkeypatch, when):
        rope = pytest.importorskip("liger_kernel.transformers.rope")
        model, ids = patch_model(widened(), backend="reference"), tokens(2, 40)
        sdpa = step(widened(), ids)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rope.liger_rotary_pos_emb)
        if when == "before patching":
            patch_model(model, backend="reference")
        assert_sdpas(model, ids, sdpa)
        assert front_end(model) == "fused"
        monkeypatch.setattr(rope.liger_rotary_pos_emb, "__code__", halved.__code__)
        assert_sdpas(model, ids, step(widened(), ids))
        assert "liger_rotary_pos_emb" in front_end(model) or "apply_rotary_pos_emb" in front_end(model)

    def test_a_rotation_that_the_package_kernels_made_a_module_of(self, monkeypatch, when):
        """It is known by the function inside, until somebody gives the module another forward."""
        func = modeling_llama.apply_rotary_pos_emb

        class Func(torch.nn.Module):
            def forward(self, *args, **kwargs):
                return func(*args, **kwargs)

        Func.__module__ = "kernels.layer.layer"
        module, (model, ids) = Func(), (patch_model(widened(), backend="reference"), tokens(2, 40))
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", module)
        if when == "after patching":
            model(ids, use_cache=False)
        else:
            patch_model(model, backend="reference")
        assert front_end(model) == "fused"
        module.forward = halved
        assert_sdpas(model, ids, step(widened(), ids))
        assert front_end(model) == "kernels.layer.layer replaced apply_rotary_pos_emb"

    def test_angles_of_another_layout(self, monkeypatch, when):
        """Those of channels 2i and 2i + 1 the same, as some families rotate; the fused forward reads the first half only."""
        rotary = modeling_llama.LlamaRotaryEmbedding
        edit = (r"torch\.cat\(\(freqs, freqs\), dim=-1\)", "freqs.repeat_interleave(2, -1)")

        def change():
            monkeypatch.setattr(rotary, "forward", edited(rotary.forward, edit))

        model, ids, sdpa = changed_and_patched(change, when)
        assert_sdpas(model, ids, sdpa)
        assert "LlamaRotaryEmbedding.forward (transformers" in front_end(model)

    def test_another_norm_runs_by_itself(self, monkeypatch, when):
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

        def change():
            edit = (r"return self\.weight \*", "return (1 + self.weight) *")
            monkeypatch.setattr(Qwen3RMSNorm, "forward", edited(Qwen3RMSNorm.forward, edit))

        def small_gains():  # 1 + weight near 0.6, so that logits stay around 1, as the tolerance of accuracy assumes
            model = tiny_model("qwen3")
            with torch.no_grad():
                for norm in [m for name, m in model.named_modules() if name.endswith((".q_norm", ".k_norm"))]:
                    norm.weight.sub_(1.4)
            return model

        model, ids = small_gains(), tokens(2, 40)
        if when == "after patching":
            patch_model(model, backend="reference")(ids)
        change()
        assert_sdpas(patch_model(model, backend="reference"), ids, step(small_gains(), ids))

    def test_a_cache_that_changes_what_it_is_given(self, monkeypatch, when):
        """The model makes it by itself in training."""
        from transformers.cache_utils import DynamicLayer

        def change():
            edit = (r"return self\.keys, self\.values", "return self.keys, self.values / 4")
            monkeypatch.setattr(DynamicLayer, "update", edited(DynamicLayer.update, edit))

        model, ids = widened().train(), tokens(2, 40)
        if when == "after patching":
            patch_model(model, backend="reference")(ids)
        plain = widened().train()(ids).logits
        change()
        sdpa = widened().train()(ids).logits
        assert relative(sdpa, plain) > 4 * OUTPUT_ERROR
        assert relative(patch_model(model, backend="reference")(ids).logits, sdpa) < OUTPUT_ERROR


class TestSources:
    def test_a_forward_without_a_source_keeps_to_the_interface(self, monkeypatch):
        monkeypatch.setattr(LlamaAttention, "forward", edited(LlamaAttention.forward, (r"\n", "\n"), readable=False))
        assert front_end(patch_model(tiny_model("llama"))) == "the source of LlamaAttention.forward cannot be read"

    def test_a_source_that_is_not_what_runs_is_none(self, monkeypatch):
        import linecache

        changed = edited(LlamaAttention.forward, STEP_MORE)
        theirs = edited(LlamaAttention.forward, (r"\n", "\n"))
        inner = inspect.unwrap(changed).__code__, inspect.unwrap(theirs).__code__
        linecache.cache[inner[0].co_filename] = linecache.cache[inner[1].co_filename]
        monkeypatch.setattr(LlamaAttention, "forward", changed)
        assert front_end(patch_model(tiny_model("llama"))) == "the source of LlamaAttention.forward cannot be read"

    def test_code_put_into_the_same_function_is_noticed(self, monkeypatch):
        """As IPython's autoreload does."""
        model, ids = patch_model(widened(), backend="reference"), tokens(2, 40)
        step(model, ids)
        inner = inspect.unwrap(LlamaAttention.forward)
        monkeypatch.setattr(inner, "__code__", inspect.unwrap(edited(LlamaAttention.forward, STEP_MORE)).__code__)
        assert_sdpas(model, ids, step(widened(), ids))
        assert "is none of those known" in front_end(model)

    def test_a_compiled_model_does_not_go_on_with_the_old_code(self, monkeypatch):
        torch._dynamo.reset()
        model, ids = patch_model(widened(), backend="reference"), tokens(2, 40)
        compiled = torch.compile(model, backend="eager")
        compiled(ids, use_cache=False)
        monkeypatch.setattr(LlamaAttention, "forward", edited(LlamaAttention.forward, STEP_MORE))
        sdpa = widened()(ids, use_cache=False).logits
        with pytest.raises(UnsupportedAttentionError, match=r"none of those known.*torch\.compiler\.reset"):
            compiled(ids, use_cache=False)
        torch.compiler.reset()
        assert relative(compiled(ids, use_cache=False).logits, sdpa) < OUTPUT_ERROR
        torch._dynamo.reset()

    def test_docstring_comments_hints_and_formatting_do_not_count(self, monkeypatch):
        edits = (
            (r"attention_mask: [^\n]*?( = None)?,\n", r"attention_mask: 'a mask'\1,  # said otherwise\n"),
            (r"\n( +)input_shape = ", r'\n\1"""What it does."""\n\n\1input_shape = '),
            (r"cos, sin = position_embeddings", "(cos,\n         sin) = (position_embeddings)"),
        )
        monkeypatch.setattr(LlamaAttention, "forward", edited(LlamaAttention.forward, *edits))
        model, ids = patch_model(tiny_model("llama"), backend="reference"), tokens(1, 20)
        model(ids, use_cache=False)
        assert front_end(model) == "fused"


class TestAnotherFile:
    """A copy of transformers' module under another name, as a release would bring it."""

    def model(self, tmp_path, *replacements):
        copy = edited_module(modeling_llama, tmp_path, *replacements)
        ours = widened()
        theirs = copy.LlamaForCausalLM(ours.config).eval()
        theirs.load_state_dict(ours.state_dict())
        assert type(theirs) is not LlamaForCausalLM
        return theirs

    @pytest.mark.parametrize("edit", [STEP_MORE, ANOTHER_SCALE], ids=["a step more", "another softmax scale"])
    def test_one_that_computes_something_else(self, tmp_path, edit):
        model, ids = self.model(tmp_path, edit), tokens(2, 40)
        sdpa = step(model, ids)
        assert relative(sdpa[0], step(widened(), ids)[0]) > 4 * OUTPUT_ERROR
        assert_sdpas(patch_model(model, backend="reference"), ids, sdpa)
        assert "is none of those known" in front_end(model)

    def test_one_that_computes_the_same_is_fused(self, tmp_path):
        model, ids = (
            self.model(tmp_path, (r"\nclass LlamaAttention", "\n\n# as before\nclass LlamaAttention")),
            tokens(2, 40),
        )
        sdpa = step(model, ids)
        assert_sdpas(patch_model(model, backend="reference"), ids, sdpa)
        assert front_end(model) == "fused"
