"""The table of launch shapes and the search that extends it."""

import pytest
import torch

from hf_geoscale.kernels import tiles
from hf_geoscale.kernels.backend import TRITON_INSTALLED
from hf_geoscale.kernels.tiles import DEFAULTS, INTERPRETED, SEQUENCE_PADDING, TABLE, Tile, padded_head_dim, tiles_for

GPU = torch.device("cuda")


def shapes():
    for row in (*TABLE.values(), *DEFAULTS.values(), INTERPRETED):
        yield from (row.forward, row.query_gradient, row.key_gradient)


def test_tiles_divide_what_operands_are_padded_to():
    for tile in shapes():
        assert SEQUENCE_PADDING % tile.rows == 0
        assert SEQUENCE_PADDING % tile.keys == 0


@pytest.mark.parametrize(
    ("dim", "padded"), [(16, 32), (64, 64), (80, 128), (96, 128), (128, 128), (144, 256), (256, 256)]
)
def test_padded_head_dim(dim, padded):
    assert padded_head_dim(dim) == padded
    assert padded in DEFAULTS


def test_unknown_gpus_get_the_defaults(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert tiles_for(GPU, 80, high=True) == DEFAULTS[128]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert tiles_for(GPU, 128, high=False) == TABLE[(9, 0), 128, False]
    assert tiles_for(torch.device("cpu"), 128, high=False) == INTERPRETED


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_the_search_keeps_the_fastest_and_skips_what_does_not_fit(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from hf_geoscale.kernels import replay, tuning

    forgotten = []
    monkeypatch.setattr(replay, "forget", lambda: forgotten.append(tiles.TABLE.get(((12, 0), 128, False))))
    wanted = {"forward": Tile(64, 128, 8, 2), "query_gradient": Tile(64, 32, 4, 3), "key_gradient": Tile(128, 64, 4, 1)}
    monkeypatch.setattr(tiles, "TABLE", dict(TABLE))
    monkeypatch.setattr(tuning, "TABLE", tiles.TABLE)
    monkeypatch.setattr(tuning, "resolve_backend", lambda backend, device: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(tuning, "_calls", lambda *shape: {name: name for name in wanted})

    def time(kernel: str) -> float:
        tile = getattr(tiles.TABLE[(12, 0), 128, False], kernel)
        if tile.stages == 2 and tile.rows == 128:
            raise OutOfResources(300_000, 99_000, "shared memory")
        return 1.0 if tile == wanted[kernel] else 2.0

    monkeypatch.setattr(tuning, "_milliseconds", time)
    assert tuning.tune_tiles(80) == tiles.Tiles(**wanted) == tiles_for(GPU, 128, high=False)
    assert forgotten[-1] == tiles.Tiles(**wanted)


@pytest.mark.skipif(torch.cuda.is_available() or not TRITON_INSTALLED, reason="needs Triton and no GPU")
def test_the_search_needs_a_gpu(monkeypatch):
    from hf_geoscale.kernels import tuning

    monkeypatch.setattr("hf_geoscale.kernels.backend.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RuntimeError, match="Tesla T4"):
        tuning.tune_tiles(64)


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_the_calls_whose_times_are_compared_run():
    from hf_geoscale.kernels import tuning

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = tuning._calls(device, 64, high=False, length=64, heads=2, kv_heads=1, dropout_p=0.1)
    assert calls["forward"]()[0].shape == (1, 2, 64, 64)
    *gradients, _ = calls["query_gradient"]()
    assert [x.shape[1] for x in gradients] == [2, 1, 1]
