"""Ways to split a model or its input that certificates cannot follow are refused by name, without any process group."""

import importlib

import pytest
import torch
from accelerate.state import AcceleratorState

from hf_geoscale import GeoScaleCallback, patch_model, refresh_scales, unpatch_model
from hf_geoscale.errors import UnsupportedModelError

from ..conftest import tiny_model, tokens


class Parallelism:
    def __init__(self, **sizes):
        self.__dict__.update({"tp_size": 1, "cp_size": 1, "sp_size": 1} | sizes)


@pytest.mark.feature("tensor, context and sequence parallelism", refused=True)
@pytest.mark.parametrize("name", ["tensor", "context", "sequence"])
class TestParallelism:
    @pytest.fixture
    def accelerate(self, name, monkeypatch):
        config = Parallelism(**{f"{name[0]}p_size": 2})
        monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", config)

    @pytest.mark.usefixtures("accelerate")
    def test_patching(self, name):
        with pytest.raises(UnsupportedModelError, match=f"{name} parallelism of 2 processes is not supported"):
            patch_model(tiny_model("llama"))

    def test_an_accelerator_after_patching(self, name, request):
        model = patch_model(tiny_model("llama"))
        request.getfixturevalue("accelerate")
        with pytest.raises(UnsupportedModelError, match=f"{name} parallelism"):
            refresh_scales(model)
        with pytest.raises(UnsupportedModelError, match=f"{name} parallelism"):
            GeoScaleCallback().on_train_begin(None, None, None, model=model)


@pytest.mark.feature("tensor, context and sequence parallelism", refused=True)
def test_a_model_loaded_with_a_tensor_parallel_plan():
    model = tiny_model("llama")
    model._tp_size = 4
    with pytest.raises(UnsupportedModelError, match="tensor parallelism of 4 processes"):
        patch_model(model)


class Status:
    name = "NOT_AVAILABLE"


def test_zero_3_without_its_engine():
    model = tiny_model("llama")
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.ds_id, weight.ds_status = 7, Status  # what deepspeed.zero.Init leaves on a parameter
    with pytest.raises(UnsupportedModelError, match=r"layer 1 is partitioned by DeepSpeed ZeRO-3, and not gathered"):
        patch_model(model)


@pytest.mark.feature("FSDP1", refused=True)
@pytest.mark.parametrize("flat", [False, True])
def test_fsdp1(flat):
    model = patch_model(tiny_model("llama"))
    projection = model.model.layers[0].self_attn.k_proj
    if flat:  # use_orig_params=False replaces parameters by views of the flat parameter
        weight = projection._parameters.pop("weight")
        projection.weight = weight.detach()
    else:
        projection.weight = torch.nn.Parameter(projection.weight.detach().clone())
        projection.weight._fsdp_flattened = True
    with pytest.raises(UnsupportedModelError, match=r"llama layer 0 is sharded by FSDP1.*fsdp_version: 2"):
        model(tokens(1, 8))


@pytest.mark.feature("DataParallel", refused=True)
@pytest.mark.parametrize("fused_front_end", [False, True])
def test_data_parallel(fused_front_end, monkeypatch):
    """`replicate` is what nn.DataParallel runs before a forward on several GPUs; here both replicas are on the CPU."""
    parallel = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(parallel, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [list(tensors)] * 2)
    model, ids = tiny_model("llama"), tokens(1, 8)
    before = model(ids).logits
    patch_model(model, fused_front_end=fused_front_end)
    with pytest.raises(UnsupportedModelError, match=r"DataParallel cannot replicate FP8.*Use DistributedDataParallel"):
        parallel.replicate(model, [0, 1], detach=True)
    for replica in parallel.replicate(unpatch_model(model), [0, 1], detach=True):
        assert torch.equal(replica(ids).logits, before)
