"""What the tests of the fused kernels run under."""

import pytest
import torch

from hf_geoscale.kernels.backend import TRITON_INSTALLED


@pytest.fixture(autouse=True)
def on_device():
    """Overrides that of all tests: these place their tensors themselves (fused_cases.DEVICE), whatever --device says."""


@pytest.fixture(autouse=True)
def no_plans():
    """What a test changes under a pass is seen by its calls, and by those of no other."""
    if TRITON_INSTALLED:
        from hf_geoscale.kernels import replay

        replay.forget()
        yield
        replay.forget()
    else:
        yield


@pytest.fixture
def hardware_rounding(monkeypatch):
    """Triton's interpreter truncates casts; round to nearest even there, and saturate in E4M3, as GPUs do."""
    if torch.cuda.is_available():
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if target not in (tl.float8e4nv, tl.bfloat16) or source == target:
            return convert(x, source, target, mode)
        wide = x if source == tl.float32 else convert(x, source, tl.float32, None)
        wide = torch.from_numpy(np.ascontiguousarray(wide).view(np.float32))
        if target == tl.bfloat16:
            return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
