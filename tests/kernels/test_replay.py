"""Passes repeated from a plan launch what they launch when they run, on memory laid out as theirs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from weakref import ref

import pytest
import torch

from hf_geoscale.kernels.backend import TRITON_INSTALLED

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")


def test_every_pass_is_repeated_as_it_runs():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "tests.kernels.replay_check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [len(cases) > 15 for cases in found.values()] == [True] * 4
    assert not {(kind, case): what for kind, cases in found.items() for case, what in cases.items() if what}


class Number(float):
    """As NumPy's."""


class Wrapped(torch.Tensor):
    """A subclass."""


def recorded(run, *inputs: torch.Tensor):
    from hf_geoscale.kernels.replay import _record

    return _record(run, inputs)


class TestPlans:
    """Which calls have one."""

    def test_operations_beside_allocations_and_views_have_none(self):
        x = torch.ones(3)
        outputs, plan = recorded(lambda x: (torch.empty(3), x[1:].view(torch.int32))[:1], x)
        assert plan is not None
        assert outputs[0].shape == (3,)
        for run in (lambda x: (torch.empty(3).add_(x),), lambda x: (x + 1,), lambda x: (torch.ones(3),)):
            assert recorded(run, x)[1] is None

    def test_an_output_that_is_no_new_tensor_or_an_input_given_twice_have_none(self):
        x = torch.ones(3)
        assert recorded(lambda x: (x,), x)[1] is None
        assert recorded(lambda x: (torch.empty(3)[1:],), x)[1] is None
        assert recorded(lambda x, y: (torch.empty(3),), x, x)[1] is None
        assert recorded(lambda x, y: (torch.empty(3),), x, x.clone())[1] is not None

    def test_inputs_of_one_storage_are_told_apart(self):
        from hf_geoscale.kernels.replay import Unrepeatable, _Memory

        a, b = torch.ones(8).split(4)
        memory = _Memory([a, b, torch.ones(4)], (), {})
        assert [memory.place(x) for x in (a, b)] == [(0, 0), (1, 0)]
        with pytest.raises(Unrepeatable, match="not clear"):
            memory.place(a[1:])

    def test_outputs_are_new_and_zeroed_where_they_were(self, followed):
        def run(x):
            return torch.zeros(4), torch.empty_strided((3, 2), (1, 3), dtype=torch.float16), x.new_empty(0)

        x = torch.ones(2, 3)
        outputs, plan = recorded(run, x)
        again = plan.run([x.data_ptr()])
        assert [(y.shape, y.stride(), y.dtype) for y in again] == [(y.shape, y.stride(), y.dtype) for y in outputs]
        assert not again[0].any()
        assert again[0].data_ptr() != outputs[0].data_ptr()


@pytest.fixture
def followed(monkeypatch):
    """As where Triton's launches are followed; there is no GPU."""
    import triton

    from hf_geoscale.kernels import launcher

    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(launcher, "_FOLLOWED", True)
    return monkeypatch


class TestRepeated:
    """Which calls run as written: counted in `ran`."""

    def passes(self, run=lambda x, option: (torch.empty(x.shape),)):
        from hf_geoscale.kernels import replay

        self.ran = 0

        def counted(*inputs):
            self.ran += 1
            return run(*inputs)

        call = replay.repeated(counted)
        return call, replay._plans[-1]

    def test_the_first_of_a_signature_does(self, followed):
        call, _ = self.passes()
        memory = torch.ones(65)
        x = memory[:64]
        same = (torch.ones(64), 1), (torch.nn.Parameter(torch.zeros(64)), 1)
        others = (x, 2), (memory[1:], 1), (x.half(), 1), (x[:32], 1), (x.view(8, 8), 1), (x.view(8, 8).T, 1)
        call(x, 1)
        assert [call(*inputs)[0].shape for inputs in same] == [(64,)] * 2
        assert self.ran == 1
        for inputs in others:
            call(*inputs)
        assert self.ran == 1 + len(others)
        for inputs in ((x, Number(1)), (x.as_subclass(Wrapped), 1)):
            call(*inputs)
            call(*inputs)
        assert self.ran == 5 + len(others)

    def test_all_do_that_cannot_be_repeated_and_few_are_recorded(self, followed):
        from hf_geoscale.kernels import replay

        attempts = []
        record = replay._record
        followed.setattr(replay, "_record", lambda *given: attempts.append(1) or record(*given))
        call, _ = self.passes(lambda x: (x + 1,))
        for _ in range(5):
            assert call(torch.ones(3))[0].tolist() == [2, 2, 2]
        assert (self.ran, len(attempts)) == (5, replay.ATTEMPTS)

    def test_those_that_lack_memory_do(self, followed):
        from hf_geoscale.kernels import replay

        def without_memory():
            raise torch.OutOfMemoryError

        call, plans = self.passes()
        call(torch.ones(3), 1)
        (plan,) = plans.values()
        assert isinstance(plan, replay.Plan)
        plan.makers[0] = without_memory
        assert call(torch.ones(3), 1)[0].shape == (3,)
        assert self.ran == 2

    def test_all_do_where_somebody_listens_to_launches(self, followed):
        from triton import knobs

        call, _ = self.passes()
        call(torch.ones(3), 1)
        hook = lambda metadata: None  # noqa: E731
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            call(torch.ones(3), 1)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert self.ran == 2
        call(torch.ones(3), 1)
        assert self.ran == 2

    def test_plans_are_few_and_can_be_forgotten(self, followed):
        from hf_geoscale.kernels import replay

        call, plans = self.passes()
        for length in range(1, 3 * replay.SIGNATURES):
            call(torch.ones(length), 1)
            assert len(plans) <= replay.SIGNATURES
        replay.forget()
        assert not plans
        call(torch.ones(1), 1)
        assert self.ran == 3 * replay.SIGNATURES

    def test_the_code_of_a_plan_stays_loaded(self, followed):
        """Triton unloads a kernel with the object that it made for it, and a plan has a bare handle."""
        from hf_geoscale.kernels import launcher, replay

        class Owner:
            """Triton's compiled kernel."""

        followed.setattr(launcher, "repeatable", lambda _: (None, []))
        owner = Owner()
        known = ref(owner)
        launched = SimpleNamespace(compiled=SimpleNamespace(owner=owner))
        launch = replay._Launch(launched, replay._Memory([], (), {}))
        del launched, owner
        assert known() is not None
        del launch
        assert known() is None

    def test_addresses_of_a_descriptor_are_few(self, followed):
        from hf_geoscale.kernels import launcher, replay

        asked = []
        described = launcher.Described(torch.ones(4), lambda address: asked.append(address) or ("map", address))
        given: list = []
        followed.setattr(
            launcher, "repeatable", lambda _: (lambda stream, arguments: given.append(arguments), [described, 5])
        )
        launched = SimpleNamespace(compiled=SimpleNamespace(owner=None))
        launch = replay._Launch(launched, replay._Memory([described.base], (), {}))
        for address in (512, 1024, 512, 1024):
            launch(7, [address])
        assert given == [[("map", a), 5] for a in (512, 1024, 512, 1024)]
        assert asked == [512, 1024]
        for i in range(3 * replay.TENSOR_MAPS):
            launch(7, [2048 + 16 * i])
            assert len(launch.descriptors[0][-1]) <= replay.TENSOR_MAPS
