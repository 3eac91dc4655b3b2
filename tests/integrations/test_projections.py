"""Projections together: the modules' own outputs and gradients, and whoever has to see a module still does."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from hf_geoscale.integrations.projections import project

from .compare import relative

WIDTH, OUTPUTS = 48, (64, 16, 16)


def projections(bias: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, n, bias=bias, dtype=dtype) for n in OUTPUTS]


def hidden_states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return list(torch.autograd.grad(outputs, inputs, upstream))


def runs_together(hidden: Tensor, modules: list[nn.Module]) -> bool:
    with torch.enable_grad():
        nodes = {type(x.grad_fn).__name__ for x in project(hidden, modules)}
    return nodes == {"_ProjectionsBackward"}


class TestResults:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_outputs_and_parameters_gradients_are_the_modules(self, bias, dtype):
        modules, hidden = projections(bias, dtype), hidden_states(dtype)
        parameters = [p for m in modules for p in m.parameters()]
        together, alone = project(hidden, modules), tuple(m(hidden) for m in modules)
        assert runs_together(hidden, modules)
        assert all(torch.equal(x, y) for x, y in zip(together, alone, strict=True))
        found, expected = gradients(together, parameters), gradients(alone, parameters)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    def test_the_gradient_of_hidden_states_is_as_exact_as_the_sum_of_three_at_least(self):
        modules, hidden = projections(dtype=torch.bfloat16), hidden_states(torch.bfloat16)
        exact_modules, exact_hidden = projections(dtype=torch.bfloat16), hidden_states(torch.bfloat16).double().detach()
        exact = tuple(m.double()(exact_hidden.requires_grad_()) for m in exact_modules)
        (expected,) = gradients(exact, [exact_hidden])
        (found,) = gradients(project(hidden, modules), [hidden])
        (summed,) = gradients(tuple(m(hidden) for m in modules), [hidden])
        assert 0 < relative(found.double(), expected) <= relative(summed.double(), expected)

    @pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
    def test_frozen_weights_get_no_gradient_and_hidden_states_theirs(self, frozen):
        modules, hidden = projections(bias=True), hidden_states()
        for i in frozen:
            modules[i].weight.requires_grad_(False)
        inputs = [hidden, *(p for m in modules for p in m.parameters() if p.requires_grad)]
        found = gradients(project(hidden, modules), inputs)
        expected = gradients(tuple(m(hidden) for m in modules), inputs)
        assert all(relative(x, y) < 1e-6 for x, y in zip(found, expected, strict=True))

    @pytest.mark.parametrize("trained", [False, True])
    def test_hidden_states_are_kept_for_weights_that_are_trained(self, trained):
        modules, hidden = projections(), hidden_states()
        for module in modules:
            module.requires_grad_(trained)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            outputs = project(hidden, modules)
        assert (hidden.shape in {x.shape for x in kept}) == trained
        assert relative(gradients(outputs, [hidden])[0], gradients([m(hidden) for m in modules], [hidden])[0]) < 1e-6

    @pytest.mark.parametrize("shape", [(0, 24, WIDTH), (2, 0, WIDTH)])
    def test_nothing_to_project(self, shape):
        hidden = torch.zeros(shape, requires_grad=True)
        outputs = project(hidden, projections())
        assert [x.shape for x in outputs] == [(*shape[:2], n) for n in OUTPUTS]
        assert gradients(outputs, [hidden])[0].shape == shape

    def test_an_output_that_nobody_uses(self):
        modules, hidden = projections(), hidden_states()
        query, _, value = project(hidden, modules)
        expected = gradients((modules[0](hidden), modules[2](hidden)), [hidden])
        assert relative(gradients((query, value), [hidden])[0], expected[0]) < 1e-6

    def test_second_derivatives(self):
        modules, hidden = [m.double() for m in projections()], hidden_states(torch.float64)
        assert torch.autograd.gradgradcheck(
            lambda x, w: project(x, [*modules[:2], with_weight(w)]), (hidden[:1, :2], weight())
        )

    def test_checkpointed_layers_give_the_same_bits(self):
        modules, hidden = projections(), hidden_states()
        parameters = [hidden, *(m.weight for m in modules)]
        plain = gradients(project(hidden, modules), parameters)
        again = gradients(checkpoint(lambda x: project(x, modules), hidden, use_reentrant=False), parameters)
        assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def weight() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def with_weight(w: Tensor) -> nn.Linear:
    """A linear layer whose weight is this very tensor, so that derivatives reach it."""
    module = nn.Linear(WIDTH, 3, bias=False)
    del module.weight
    module._parameters["weight"] = w
    return module


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Seen(Tensor):
    """A weight that some library has to see the products of."""


def hooked(kind: str):
    def change(modules: list[nn.Module]) -> None:
        getattr(modules[1], f"register_{kind}")(lambda *_: None)

    return change


def wrapped_forward(modules: list[nn.Module]) -> None:
    forward = modules[2].forward
    modules[2].forward = lambda x: forward(x)


def of_another_class(modules: list[nn.Module]) -> None:
    modules[0] = Tripled(WIDTH, OUTPUTS[0])


def parametrized(modules: list[nn.Module]) -> None:
    parametrize.register_parametrization(modules[0], "weight", nn.Identity())


def with_a_subclass_for_weight(modules: list[nn.Module]) -> None:
    modules[0].weight = nn.Parameter(modules[0].weight.detach().as_subclass(Seen))


def compiled(modules: list[nn.Module]) -> None:
    modules[1].compile(backend="eager")


def with_a_buffer_for_bias(modules: list[nn.Module]) -> None:
    del modules[2].bias
    modules[2].register_buffer("bias", torch.ones(OUTPUTS[2]))


class TestWhoseModulesAreCalled:
    """Every one of these takes part in a module's call, so each module is called."""

    @pytest.mark.parametrize(
        "change",
        [
            *(
                pytest.param(hooked(kind), id=kind)
                for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
            ),
            wrapped_forward,
            of_another_class,
            parametrized,
            compiled,
            with_a_buffer_for_bias,
            with_a_subclass_for_weight,
        ],
    )
    def test_modules_that_are_more_than_linear_layers(self, change):
        modules: list[nn.Module] = list(projections())
        assert runs_together(hidden_states(), modules)
        change(modules)
        assert not runs_together(hidden_states(), modules)
        expected = tuple(m(hidden_states()) for m in modules)
        assert all(torch.equal(x, y) for x, y in zip(project(hidden_states(), modules), expected, strict=True))

    def test_hooks_of_all_modules(self):
        seen = []
        handle = register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            modules = projections()
            project(hidden_states(), modules)
        finally:
            handle.remove()
        assert seen == modules

    def test_autocast(self):
        hidden, modules = hidden_states(), projections()
        with torch.autocast(hidden.device.type, torch.bfloat16):
            assert not runs_together(hidden, modules)
            outputs = project(hidden, modules)
        assert {x.dtype for x in outputs} == {torch.bfloat16}
        assert gradients(outputs, [hidden])[0].dtype == torch.float32

    def test_hidden_states_of_a_subclass(self):
        assert not runs_together(hidden_states().detach().as_subclass(Seen).requires_grad_(), projections())

    def test_a_linear_layer_whose_forward_somebody_replaced(self, monkeypatch):
        hidden, modules, original = hidden_states(), projections(), nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * original(self, x))
        assert not runs_together(hidden, modules)

    def test_a_function_that_counts_linear_products_counts_them(self, monkeypatch):
        calls, original = [], nn.functional.linear
        monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(args) or original(*args))
        assert runs_together(hidden_states(), projections())
        assert len(calls) == len(OUTPUTS)

    def test_calls_without_gradients_of_hidden_states(self):
        hidden, modules = hidden_states(), projections()
        with torch.no_grad():
            assert not any(x.requires_grad for x in project(hidden, modules))
        assert not runs_together(hidden.detach(), modules)
        assert all(x.requires_grad for x in project(hidden.detach(), modules))

    def test_compiled_code(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        modules = projections()
        compiled = torch.compile(lambda x: project(x, modules), backend=backend, fullgraph=True)
        expected = tuple(m(hidden_states()) for m in modules)
        assert all(torch.equal(x, y) for x, y in zip(compiled(hidden_states()), expected, strict=True))
        (graph,) = graphs
        assert not [node for node in graph.graph.nodes if "autograd" in str(node.target)]
