"""Which kernels a call is said to run on, against what takes it."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from hf_geoscale import fp8_attention
from hf_geoscale.kernels import AttentionStatistics, backend
from hf_geoscale.kernels.backend import HOPPER, NONE, PLAIN, PORTABLE, TRITON_INSTALLED, choose_kernels, kernels_on

CPU = torch.device("cpu")


@pytest.fixture
def hopper(monkeypatch):
    """The package of Hopper kernels, as on a GPU that has them for padded head dimensions 64 and 128."""
    if not TRITON_INSTALLED:
        pytest.skip("needs Triton")
    from hf_geoscale.kernels import hopper

    monkeypatch.setattr(hopper, "launch", SimpleNamespace())
    monkeypatch.setattr(hopper, "runs", lambda device, dim: dim in (64, 128))
    monkeypatch.setattr(backend, "triton_missing", lambda device: None)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    backend.fused_kernels.cache_clear()
    yield hopper
    backend.fused_kernels.cache_clear()


def test_every_kind_of_call_is_said_to_run_where_launches_for_sends_it(hopper):
    from hf_geoscale.kernels.launch import Call

    one, seen = torch.ones(1), set()
    names = ("high", "dropout", "softcap", "counters", "quantized_logits")
    for head_dim, flags in itertools.product((32, 64, 80, 128, 256), itertools.product((False, True), repeat=5)):
        asked = dict(zip(names, flags, strict=True))
        call = Call(
            one, one, one, None, None, 0.125, True, 0, 0.1 * asked["dropout"], asked["high"], head_dim, None, 0,
            one if asked["quantized_logits"] else None, softcap=50.0 * asked["softcap"],
        )  # fmt: skip
        taken = hopper.launches_for(call, CPU, counters=asked["counters"]) is hopper.launch
        said = kernels_on("auto", CPU, head_dim, **asked)
        assert said == (HOPPER if taken else PORTABLE)
        assert (choose_kernels("auto", CPU, head_dim, *flags).reason is None) == taken
        seen.add(said)
    assert seen == {HOPPER, PORTABLE}


def test_the_first_reason_is_named(hopper):
    assert choose_kernels("triton", CPU, 64, high=True).reason == 'the Hopper kernels do not have precision="high"'
    assert choose_kernels("auto", CPU, 64, dropout=True).reason == "the Hopper kernels do not have dropout"
    assert choose_kernels("auto", CPU, 128) == (HOPPER, None)
    assert choose_kernels("reference", CPU, 128) == (PLAIN, 'backend="reference"')


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
@pytest.mark.cpu
def test_other_gpus_are_named(monkeypatch):
    from hf_geoscale.kernels import hopper

    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(hopper.triton.knobs.runtime, "interpret", False)
    gpu = torch.device("cuda", 0)
    for capability, name, kernels, reason in (
        ((8, 0), "NVIDIA A100", PLAIN, "NVIDIA A100 (compute capability 8.0) has no FP8 matrix unit; 8.9 is the first"),
        ((8, 9), "NVIDIA L4", PORTABLE, "NVIDIA L4 is no Hopper GPU"),
        ((12, 0), "NVIDIA RTX 5090", PORTABLE, "NVIDIA RTX 5090 is no Hopper GPU"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, found=name: found)
        for cached in (backend.is_hopper, backend.fused_kernels):
            cached.cache_clear()
        assert choose_kernels("auto", gpu) == (kernels, reason)
    assert choose_kernels("triton", CPU) == (
        NONE,
        'backend="triton" cannot run: the kernels need an NVIDIA GPU, and the operands are on \'cpu\'. Use backend="reference", '
        'or "auto" to take it only there',
    )
    assert choose_kernels("auto", torch.device("mps")) == (
        PLAIN,
        "the kernels need an NVIDIA GPU, and the operands are on 'mps'",
    )
    backend.is_hopper.cache_clear()
    backend.fused_kernels.cache_clear()


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match="'cudnn'"):
        kernels_on("cudnn", CPU)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_statistics_name_what_ran(name, monkeypatch):
    from hf_geoscale.kernels import reference

    ran = []
    if name == "triton":
        if reason := backend.triton_missing(torch.empty(0).device):
            pytest.skip(reason)
        from hf_geoscale.kernels import passes

        for kernels, called in ((passes.launch, PORTABLE), (passes.hopper.launch, HOPPER)):
            if kernels is not None:
                monkeypatch.setattr(
                    kernels, "forward", lambda *x, f=kernels.forward, c=called: (ran.append(c), f(*x))[1]
                )
        from hf_geoscale.kernels import replay

        replay.forget()  # repeated passes do not come by `forward`
    else:
        monkeypatch.setattr(reference, "forward", lambda *x, f=reference.forward: (ran.append(PLAIN), f(*x))[1])
    statistics = AttentionStatistics()
    assert statistics.kernels is None
    query, key, value = torch.randn(3, 1, 1, 8, 64, dtype=torch.bfloat16)
    one = torch.ones(1)
    fp8_attention(
        query, key, value, q_quant_scale=one, k_quant_scale=one, v_quant_scale=one, backend=name, statistics=statistics
    )
    assert [statistics.kernels] == ran
