"""`torch.compile` of a whole patched model: one graph break an attention, none recompiled, nothing frozen."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from hf_geoscale import GeoScaleCallback, geometry_report, patch_model
from hf_geoscale.geometry import operand_bound
from hf_geoscale.integrations import geoscale_layers

from ..conftest import here, tiny_model, tokens
from ..tolerances import FLIPPED_ROUNDINGS
from .test_callback import trainer

BREAKS = {"attention_by_name", "mask_by_name"}  # what the compiler leaves to Python, on purpose


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def broken_at() -> set[str]:
    """Functions at which graphs broke; a reason that names none of ours stands for itself."""
    reasons = counters["graph_break"]
    return {next((name for name in BREAKS if f"function {name} at" in reason), reason) for reason in reasons}


def train(forward, model, batches) -> list[float]:
    """Losses of plain gradient descent, one step a batch, padding on the left of the first sequence."""
    seen = []
    for ids in batches:
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        loss = forward(input_ids=ids, labels=ids, attention_mask=mask).loss
        loss.backward()
        seen.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad * 0.1)
                parameter.grad = None
    return seen


@pytest.mark.feature("torch.compile")
class TestWholeModel:
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_losses_breaks_and_recompilations(self, dynamic):
        lengths = (24, 31, 24, 40) if dynamic else (24, 24, 24, 24)
        batches = [tokens(2, length, seed) for seed, length in enumerate(lengths)]
        plain, model = patch_model(tiny_model("llama")), patch_model(tiny_model("llama"))
        compiler = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=compiler, dynamic=dynamic)
        losses = train(compiled, model, batches[:2])
        graphs = compiler.frame_count
        losses += train(compiled, model, batches[2:])
        assert losses == pytest.approx(train(plain, plain, batches), rel=1e-5)
        assert compiler.frame_count == graphs  # the scales moved with every step, and the length too if it may
        assert broken_at() == BREAKS
        for ours, theirs in zip(geometry_report(model).rows, geometry_report(plain).rows, strict=True):
            assert (ours["calls"], ours["overflows"]) == (theirs["calls"], 0) == (4, 0)
            assert ours["utilisation"] == pytest.approx(theirs["utilisation"], rel=1e-4)
        for layer in geoscale_layers(model):
            torch.testing.assert_close(
                layer.geometry.q_bound, operand_bound(layer.site.projections()[0]), rtol=1e-12, atol=0
            )

    def test_patching_after_compiling(self):
        model, ids = tiny_model("llama"), tokens(2, 24)
        expected = model(ids).logits
        fp8 = patch_model(tiny_model("llama"))(ids).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, expected)
        patch_model(model)
        torch.testing.assert_close(compiled(ids).logits, fp8)

    @pytest.mark.gpu
    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_inductor(self, mode):
        """Also with CUDA graphs, which would replay old scales if the attention were inside one."""
        batches = [tokens(2, 64, seed).cuda() for seed in range(6)]
        plain, model = (patch_model(tiny_model("llama")).cuda().bfloat16() for _ in range(2))
        losses = train(torch.compile(model, mode=mode), model, batches)
        assert losses == pytest.approx(train(plain, plain, batches), rel=2**-7)
        assert [(row["calls"], row["overflows"]) for row in geometry_report(model).rows] == [(6, 0)] * 2


@pytest.mark.feature("torch_compile in Trainer")
def test_trainer(tmp_path):
    losses = {}
    compiled = {
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
        "tf32": False,
    }  # transformers turns TF32 on else
    for options in ({}, compiled):
        model = tiny_model("llama")
        run = trainer(model, tmp_path, GeoScaleCallback(), eval_strategy="steps", eval_steps=2, **options)
        run.train()
        logged = run.state.log_history
        losses[bool(options)] = [e["loss"] for e in logged if "loss" in e] + [
            e["eval_loss"] for e in logged if "eval_loss" in e
        ]
        assert [(row["calls"], row["overflows"]) for row in geometry_report(model).rows] == [(6, 0)] * 2
    assert counters["stats"]["unique_graphs"] > 0
    fused = here().type == "cuda"  # where each of the four steps may flip roundings of its own
    assert losses[True] == pytest.approx(losses[False], rel=4 * FLIPPED_ROUNDINGS if fused else 1e-5)
