"""A spy on everything by which the host waits for a GPU."""

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def no_host_reads():
    """Everything that would wait for a GPU raises."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("the host reads a tensor")

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, refuse)
        yield
