"""Graphs are called like the models that they come from, and copied without a word."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, fx, nn

from netwright.core.graph.branches import traced_branches, without_branches
from netwright.core.graph.export import export_model
from netwright.core.graph.signature import plain_signature


class Two(nn.Module):
    """Inputs by name, and an output of any form."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form, self.a, self.b = form, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, left: Tensor, right: Tensor) -> object:
        one, two = self.a(left) + left, self.b(right)
        forms = {"tensor": one + two, "tuple": (one, two), "dict": {"one": one, "two": two}, "list": [one, two]}
        return forms[self.form]


class Nested(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] - 2 * pair[1]


def graph(model: nn.Module, inputs: object) -> tuple[fx.GraphModule, bool]:
    """The graph in a module without the checks of a program's own, as one that was rebuilt has none."""
    program = export_model(model, inputs)
    module = program.module(check_guards=False)
    done = plain_signature(module.graph, program)
    return fx.GraphModule(module, module.graph), done


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "list"])
def test_it_is_called_like_the_model(form: str) -> None:
    model, x, y = Two(form).eval(), torch.rand(4, 3), torch.rand(4, 3)
    module, done = graph(model, {"left": x, "right": y})
    assert done
    wanted = model(x, y)
    for found in (module(x, y), module(left=x, right=y), module(right=y, left=x)):
        assert type(found) is type(wanted) or form == "list"
        torch.testing.assert_close(found, wanted)


def test_nested_inputs_keep_torchs_signature() -> None:
    pair = (torch.rand(2, 3), torch.rand(2, 3))
    program = torch.export.export(Nested(), (pair,))
    module = program.module(check_guards=False)
    assert not plain_signature(module.graph, program)
    torch.testing.assert_close(module(pair), Nested()(pair))


def test_a_network_without_branches_is_copied_and_pickled_silently() -> None:
    model, inputs = Two().eval(), {"left": torch.rand(2, 3), "right": torch.rand(2, 3)}
    module, branches = traced_branches(model, inputs)
    assert branches
    made = without_branches(model, module, [branches[0].name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = copy.deepcopy(made)
    pickle.dumps(again)
    torch.testing.assert_close(again(**inputs), made(inputs["left"], inputs["right"]))


class Capitals(nn.Module):
    """Names that a trace writes in lower case, where two of them are one."""

    exec("def forward(self, X, x, Mask): return X - 2 * x + 5 * Mask")


@pytest.mark.parametrize("order", ["X x Mask", "x X Mask", "Mask x X"])
def test_inputs_keep_the_names_they_were_given_by(order: str) -> None:
    inputs = {name: torch.rand(4, 3) for name in order.split()}
    module, done = graph(Capitals(), inputs)
    assert done
    wanted = inputs["X"] - 2 * inputs["x"] + 5 * inputs["Mask"]
    torch.testing.assert_close(module(**inputs), wanted)
    torch.testing.assert_close(module(*inputs.values()), wanted)
    torch.testing.assert_close(fx.Interpreter(module).run(*inputs.values()), wanted)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        module(X=inputs["X"], x=inputs["x"], mask=inputs["Mask"])
