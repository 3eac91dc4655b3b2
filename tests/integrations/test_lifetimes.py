"""A patched layer is a part of its model: copied, saved, sent and deleted as an unpatched one."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM

from hf_geoscale import QKClip, geometry_report, patch_model, refresh_scales, unpatch_model
from hf_geoscale.integrations import geoscale_layers, patched_layers
from hf_geoscale.integrations.host_values import HostValues

from ..conftest import SHAPE, tiny_model, tokens

STATE_BYTES = 16_000
"""What a layer's state may add to its pickle: a configuration, counters at 0, names."""


def olmo2() -> Olmo2ForCausalLM:
    torch.manual_seed(0)
    return Olmo2ForCausalLM(Olmo2Config(**SHAPE)).eval()


def saved(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getvalue()


def loaded(module: nn.Module) -> nn.Module:
    return torch.load(io.BytesIO(saved(module)), weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": loaded, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
class TestDeleting:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "olmo2"])
    @pytest.mark.parametrize("use", ["patched", "forward", "training", "report", "unpatched again"])
    def test_frees_the_model_at_once(self, name, use):
        model = olmo2() if name == "olmo2" else tiny_model(name)
        patch_model(model)
        ids = tokens(1, 16)
        if use == "training":
            for _ in range(2):
                model.train()(input_ids=ids, labels=ids).loss.backward()
                torch.optim.SGD(model.parameters(), lr=0.01).step()
        elif use != "patched":
            with torch.no_grad():
                model(ids)
        if use == "report":
            geometry_report(model)
        elif use == "unpatched again":
            unpatch_model(model)
        alive = [weakref.ref(module) for module in model.modules()]
        alive += [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        assert not [reference() for reference in alive if reference() is not None]

    def test_an_unsupported_model(self):
        from transformers import BloomConfig, BloomForCausalLM

        model = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=2)).eval()
        patch_model(model, fallback="sdpa")(tokens(1, 8))
        alive = weakref.ref(model)
        del model
        assert alive() is None

    def test_under_an_observer_of_logits(self):
        model = tiny_model("llama").train()
        clip = QKClip(model)
        model(tokens(1, 8))
        block = copy.deepcopy(model.model.layers[0])
        assert len(saved(block)) < len(saved(tiny_model("llama").model.layers[0])) + STATE_BYTES
        assert block.self_attn.logit_observer is None
        alive = weakref.ref(model)
        del model, clip
        assert alive() is None

    def test_a_variable_deleted_in_the_caller_after_the_first_forward(self):
        """The model given by name alone is found on the stack, whose frames must not keep it."""
        model = tiny_model("llama")
        model.set_attn_implementation("geoscale")
        model(tokens(1, 8))
        assert patched_layers(model)
        alive = weakref.ref(model)
        del model
        assert alive() is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
class TestOneLayer:
    def test_is_saved_alone(self, name):
        model = olmo2() if name == "olmo2" else tiny_model(name)
        blocks = model.transformer.h if name == "gpt2" else model.model.layers
        plain = [len(saved(block)) for block in blocks]
        patch_model(model)(tokens(1, 8))
        assert all(len(saved(b)) < size + STATE_BYTES for b, size in zip(blocks, plain, strict=True))

    @pytest.mark.parametrize("copied", COPIES)
    def test_is_copied_alone(self, name, copied):
        model = olmo2() if name == "olmo2" else tiny_model(name)
        blocks = model.transformer.h if name == "gpt2" else model.model.layers
        patch_model(model)(tokens(1, 8))
        block = COPIES[copied](blocks[1])
        found = {id(m) for m in reachable(block) if isinstance(m, nn.Module)}
        assert found - {id(m) for m in block.modules()} <= {id(m) for m in rotary_of(block)}


def rotary_of(block: nn.Module) -> list[nn.Module]:
    """Rotary embeddings that a layer's state may hold: a few numbers."""
    return [m for m in reachable(block) if "Rotary" in type(m).__name__]


def reachable(start: object) -> list[object]:
    """Objects that a module's own attributes lead to, classes and functions left out."""
    found, waiting, seen = [], [start], set()
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | type(gc) | type(reachable)):
            continue
        seen.add(id(thing))
        found.append(thing)
        if isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set):
            waiting += thing
        else:
            waiting += [getattr(thing, "__dict__", {}), getattr(thing, "__self__", None)]
            waiting += [getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ())]
    return found


@pytest.mark.parametrize("copied", COPIES)
class TestWholeCopies:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "olmo2"])
    def test_compute_the_same_bits_and_unpatch_alone(self, name, copied):
        model = olmo2() if name == "olmo2" else tiny_model(name)
        ids = tokens(2, 24)
        plain = model(ids).logits
        patch_model(model)
        expected = model(ids).logits
        other = COPIES[copied](model)
        assert torch.equal(other(ids).logits, expected)
        assert not torch.equal(expected, plain)
        for layer, module in zip(geoscale_layers(other), other.modules(), strict=False):
            assert layer.site.model is other, module
            assert layer.site.attention.geoscale is layer
        unpatch_model(other)
        assert torch.equal(other(ids).logits, plain)
        assert not patched_layers(other)
        assert torch.equal(model(ids).logits, expected)

    def test_see_their_own_weights(self, copied):
        model = patch_model(tiny_model("llama"))
        other, ids = COPIES[copied](model), tokens(2, 24)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        expected = patch_model(unpatch_model(copy.deepcopy(other)))(ids).logits
        assert torch.equal(other(ids).logits, expected)

    def test_counts_start_over_and_stay_apart(self, copied):
        model, ids = patch_model(tiny_model("llama")), tokens(1, 16)
        model(ids)
        other = COPIES[copied](model)
        other(ids), other(ids)
        assert [row["calls"] for row in geometry_report(model).rows] == [1, 1]
        assert [row["calls"] for row in geometry_report(other).rows] == [2, 2]

    @pytest.mark.parametrize("options", [{"scaling": "delayed"}, {"quantize_logits": True, "bound": "auto_alpha"}])
    def test_what_calls_have_taught_goes_along(self, copied, options):
        model, ids = patch_model(tiny_model("llama"), **options), tokens(2, 24)
        model(ids)
        other = COPIES[copied](model)
        with torch.no_grad():
            assert torch.equal(other(ids).logits, model(ids).logits)

    def test_an_unsupported_model_counts_and_unpatches(self, copied):
        from transformers import BloomConfig, BloomForCausalLM

        model = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=2)).eval()
        other = COPIES[copied](patch_model(model, fallback="sdpa"))
        other(tokens(1, 8))
        assert [row["fallback_calls"] for row in geometry_report(other).rows] == [1]
        assert [row["fallback_calls"] for row in geometry_report(model).rows] == [0]
        unpatch_model(other)
        assert not any(module._forward_pre_hooks for module in other.modules())


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.usefixtures("without_collector")
def test_a_check_that_is_put_off_keeps_no_layer_alive(pending, monkeypatch):
    """As on a GPU, where numbers need waiting for."""
    monkeypatch.setattr(HostValues, "here", not pending)
    model = patch_model(tiny_model("llama"))
    refresh_scales(model)
    assert geoscale_layers(model)[0].group.pending == pending
    alive = [weakref.ref(layer) for layer in geoscale_layers(model)]
    del model
    assert not [reference() for reference in alive if reference() is not None]


class TestCopiedLayersInAModel:
    """A copy of a patched layer runs in FP8 wherever it is put, and as SDPA after unpatching."""

    @pytest.mark.parametrize("name", ["llama", "olmo2"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_appended_to_the_same_model(self, name, padded):
        model = olmo2() if name == "olmo2" else tiny_model(name)
        ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
        mask[0, :5] = 1 - padded
        call = {"input_ids": ids, "attention_mask": mask}
        patch_model(model)(**call)
        append_copy(model)
        with torch.no_grad():
            fp8 = model(**call).logits[mask.bool()]
        assert [row["calls"] for row in geometry_report(model).rows] == [2, 2, 1]
        assert [layer.name[-1] for layer in geoscale_layers(model)] == ["0", "1", "2"]
        expected = patch_model(unpatch_model(copy.deepcopy(model)))(**call).logits[mask.bool()]
        assert torch.equal(fp8, expected)
        unpatch_model(model)
        assert not patched_layers(model)
        assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"sdpa"}
        plain = model(**call).logits[mask.bool()]
        assert 0 < float((fp8 - plain).norm() / plain.norm()) < 0.2

    def test_refreshed_before_the_first_forward(self):
        model = patch_model(olmo2())
        append_copy(model)
        refresh_scales(model)
        assert all(layer.site.model is model for layer in geoscale_layers(model))
        assert len(geoscale_layers(model)[2].site.stream.norms) == 4

    def test_of_another_patched_model_are_settled_by_a_refresh(self):
        """Their rotary embedding is another one now, and so is the factor in their certificates."""
        model, other = patch_model(tiny_model("llama")), patch_model(tiny_model("llama-bias-yarn"))
        moved = other.model.layers[0]
        model.model.layers[0] = moved
        refresh_scales(model)
        assert moved.self_attn.geoscale.site.model is model
        expected = geoscale_layers(patch_model(unpatch_model(copy.deepcopy(model))))[0].geometry
        assert torch.equal(moved.self_attn.geoscale.geometry.q_bound, expected.q_bound)

    @pytest.mark.parametrize("change", ["removed", "put in", "replaced", "swapped"])
    def test_blocks_before_a_layer_without_norm_are_followed(self, change):
        """Their norms bound its tokens; nothing of it is written to a weight."""
        model, other, ids = patch_model(olmo2()), patch_model(olmo2()), tokens(2, 16)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.7)
            model(ids)
        layers, extra = list(model.model.layers), other.model.layers[0]
        changed = {
            "removed": layers[1:],
            "put in": [extra, *layers],
            "replaced": [extra, layers[1]],
            "swapped": layers[::-1],
        }
        model.model.layers = nn.ModuleList(changed[change])
        del layers
        model.config.num_hidden_layers = len(model.model.layers)
        model.config.layer_types = ["full_attention"] * len(model.model.layers)
        with torch.no_grad():
            model(ids, use_cache=False)
        expected = {}
        for layer in geoscale_layers(patch_model(unpatch_model(copy.deepcopy(model)))):
            expected[layer.site.layer] = layer.geometry.v_bound
        for layer in geoscale_layers(model):
            assert torch.equal(layer.geometry.v_bound, expected[layer.site.layer])

    def test_alone(self):
        """A draft layer outside any model: its block holds all that bounds its tokens."""
        model = patch_model(tiny_model("llama"))
        block = copy.deepcopy(model.model.layers[0])
        hidden = torch.randn(1, 16, 64)
        angles = model.model.rotary_emb(hidden, torch.arange(16)[None])
        expected = model.model.layers[0](hidden, position_embeddings=angles, attention_mask=None)
        assert torch.equal(block(hidden, position_embeddings=angles, attention_mask=None), expected)
        unpatch_model(block)
        assert block.self_attn.config._attn_implementation == "sdpa"
        assert model.model.layers[0].self_attn.config._attn_implementation == "geoscale"


def append_copy(model) -> None:
    layers = model.model.layers
    layers.append(copy.deepcopy(layers[-1]))
    layers[-1].self_attn.layer_idx = len(layers) - 1
    model.config.num_hidden_layers = len(layers)
    model.config.layer_types = ["full_attention"] * len(layers)


class Rows(torch.utils.data.Dataset):
    """A dataset that runs a model, as an online one does."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(torch.full((1, 8), 3 + index)).logits


def send_logits(rank, model, ids, queue):
    with torch.no_grad():
        queue.put(model(ids).logits.numpy().tobytes())


@pytest.mark.cpu  # tensors of a GPU go to other processes by handles of its memory
class TestSpawnedProcesses:
    def test_the_same_bits_and_counters_of_its_own(self):
        model, ids = patch_model(tiny_model("llama"), backend="reference"), tokens(1, 16)
        with torch.no_grad():
            expected = model(ids).logits.numpy().tobytes()
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(send_logits, args=(model, ids, queue), nprocs=1)
        assert queue.get() == expected
        assert [row["calls"] for row in geometry_report(model).rows] == [1, 1]

    def test_workers_of_a_data_loader(self):
        model = patch_model(tiny_model("llama"), backend="reference")
        loader = torch.utils.data.DataLoader(Rows(model), num_workers=1, multiprocessing_context="spawn", timeout=120)
        found = list(loader)
        assert len(found) == 2
        assert all(torch.equal(logits, Rows(model)[index][None]) for index, logits in enumerate(found))
