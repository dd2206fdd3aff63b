"""The compiled kernels: what they compute, and which tensors they take."""

import math
import os
import threading
from array import array

import pytest
import torch
from torch import nn

from netwright.core.errors import SettingError
from netwright.optim import _compiled, _fused
from netwright.optim.diffgrad import DiffGrad
from netwright.optim.lion import Lion

KINDS = [Lion, DiffGrad]
compiled = pytest.mark.skipif(_compiled.load() is None, reason="needs a C++ compiler")


def moved(kind, params, grads, times=3, **form):
    optimizer = kind(params, lr=0.01, **form)
    for _ in range(times):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return optimizer


def counted(monkeypatch):
    """The number of rows of every run of a kernel from now on."""
    seen = []

    def counting(kernel, rows, *scalars):
        seen.append(len(rows))
        return run(kernel, rows, *scalars)

    run = _fused.run
    for module in ("lion", "diffgrad"):
        monkeypatch.setattr(f"netwright.optim.{module}.run", counting)
    return seen


def close(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def both(kind, make, grads, monkeypatch, rows):
    """Compare the default form, whose kernel is to take ``rows`` rows a step, with the plain one."""
    seen = counted(monkeypatch)
    left, right = make(), make()
    moved(kind, left, grads)
    assert seen == [rows] * 3
    moved(kind, right, [grad.clone() for grad in grads], fused=False)
    close(left, right)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_large_and_small_tensors_over_chunks_and_threads(kind, threads):
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 100_003, 1, 3, 32_768, 70_001, 15, 16_384]
    start = [torch.randn(size, generator=generator) for size in sizes]
    grads = [torch.randn(size, generator=generator) for size in sizes]
    left, right = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        moved(kind, left, grads, fused=True)
    finally:
        torch.set_num_threads(before)
    moved(kind, right, grads, foreach=False)
    close(left, right)
    assert kind is DiffGrad or all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_of_one_line(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (40_000,), (7, 5)]
    left, right = ([torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(2))
    rows = list(zip(left, right, strict=True))
    whole = [torch.cat([entry.double().flatten() for entry in entries]) for entries in (left, right)]
    assert math.isclose(_fused.run(_fused.SQUARES, [(a,) for a in left]), whole[0].dot(whole[0]).item(), rel_tol=1e-13)
    assert math.isclose(_fused.run(_fused.DISTANCE, rows), (whole[0] - whole[1]).square().sum().item(), rel_tol=1e-13)
    for kernel, scalar, expected in (
        (_fused.LERP, 0.1, lambda a, b: torch.lerp(a, b, 0.1)),
        (_fused.LERP, 0.75, lambda a, b: torch.lerp(a, b, 0.75)),
        (_fused.ADD, -0.3, lambda a, b: torch.add(a, b, alpha=-0.3)),
        (_fused.SCALE, 0.7, lambda a, _: a * 0.7),
    ):
        into = [entry.clone() for entry in left]
        _fused.run(kernel, [row[: kernel.arrays] for row in zip(into, right, strict=True)], scalar)
        for got, a, b in zip(into, left, right, strict=True):
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, expected(a, b), rtol=tolerance, atol=tolerance)


@compiled
def test_sums_that_are_not_numbers_are_passed_on():
    into, value, offset = torch.ones(2), torch.tensor([math.nan, 1.0]), torch.zeros(2)
    assert math.isnan(_fused.run(_fused.SQUARES, [(value,)]))
    assert math.isnan(_fused.run(_fused.ADD_AND_LOOK, [(into, value, offset)], 1.0, 1.0))
    assert math.isnan(into[0])
    assert into[1] == 2.0


@compiled
def test_missing_memory_is_an_error(monkeypatch):
    """A kernel is told of more elements than there is memory for the sums of their chunks."""
    table, starts, scalars = array("Q", [0]), array("q", [0, 2**62]), array("d", [])
    places = [entry.buffer_info()[0] for entry in (table, starts, scalars)]
    assert _compiled.load().netwright_run(_fused.SQUARES.number, 0, 1, 1, *places, 1) == -1.0

    class Full:
        netwright_run = staticmethod(lambda *_: -1.0)

    monkeypatch.setattr(_compiled, "load", Full)
    for kernel, scalars in ((_fused.SQUARES, ()), (_fused.SCALE, (2.0,))):
        with pytest.raises(MemoryError, match="No memory for a step"):
            _fused.run(kernel, [(torch.ones(2),)], *scalars)


@compiled
def test_a_sum_does_not_depend_on_the_number_of_threads():
    values = [(torch.randn(300_000, generator=torch.Generator().manual_seed(0)),)]
    before = torch.get_num_threads()
    sums = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums.add(_fused.run(_fused.SQUARES, values))
    torch.set_num_threads(before)
    assert len(sums) == 1


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_spreads_as_in_the_plain_form(kind):
    gradient = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45, 0.0, 1.0])
    left, right = (nn.Parameter(torch.ones(8)) for _ in range(2))
    moved(kind, [left], [gradient], fused=True)
    moved(kind, [right], [gradient], foreach=False)
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8, equal_nan=True)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_another_layout_are_taken(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 6, generator=generator)
    grads = [torch.randn(6, 5, generator=generator).t(), torch.randn(1, 6, generator=generator).expand(5, 6)]
    both(kind, lambda: [nn.Parameter(start.clone()), nn.Parameter(start.clone())], grads, monkeypatch, 2)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_negated_on_reading_are_taken(kind, monkeypatch):
    start = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    negated = torch.complex(start, start).conj().imag  # a view that negates on reading
    assert negated.is_neg()
    both(kind, lambda: [nn.Parameter(start.clone())], [negated], monkeypatch, 1)
    one = torch.complex(start[0, :1], start[0, :1]).conj().imag
    assert one.is_neg()
    assert one.is_contiguous()
    monkeypatch.undo()
    both(kind, lambda: [nn.Parameter(torch.ones(1))], [one], monkeypatch, 1)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_parameters_are_taken(kind, monkeypatch):
    start = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0))
    for grad in (start.sin().to(memory_format=torch.channels_last), start.sin()):
        with monkeypatch.context() as patch:
            last = lambda: [nn.Parameter(start.clone(memory_format=torch.channels_last))]  # noqa: E731
            both(kind, last, [grad], patch, 1)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_with_gaps_are_left_to_torch(kind, monkeypatch):
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        both(kind, lambda: [start.clone()[:, ::2].detach().requires_grad_()], [start[:, :3].cos()], patch, 0)
    with pytest.raises(SettingError, match="has gaps or repeats in memory"):
        kind([start[:, ::2].detach().requires_grad_()], fused=True)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_of_mixed_types_each_goes_its_way(kind, monkeypatch):
    types = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float32]
    make = lambda: [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in types]  # noqa: E731
    both(kind, make, [torch.full((3,), 0.5, dtype=dtype) for dtype in types], monkeypatch, 4)
    with pytest.raises(SettingError, match=r"fused=True is not possible here: a tensor is of type torch\.bfloat16"):
        kind(make(), fused=True)


class Labelled(torch.Tensor):
    """A subclass, whose operations could mean anything."""


@compiled
def test_subclasses_and_other_devices_are_left_to_torch():
    plain = torch.ones(3)
    assert _fused.unfit((plain, plain)) is None
    assert "is a Labelled" in _fused.unfit((plain, plain.as_subclass(Labelled)))
    assert "is on meta" in _fused.unfit((plain.to("meta"),))
    assert "of type torch.int64" in _fused.unfit((torch.ones(3, dtype=torch.int64),))
    assert "have the shapes" in _fused.unfit((plain, torch.ones(2)))
    assert "state of a tensor has another layout" in _fused.unfit((torch.ones(3, 2), torch.ones(2, 3).t()), (0, 1))


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_is_replaced_between_steps(kind):
    def run(**form):
        param = nn.Parameter(torch.linspace(-1, 1, 40).view(4, 10))
        optimizer = kind([param], lr=0.01, **form)
        for time in range(6):
            if time == 2:
                param.data = param.data.clone()
            if time == 4:
                optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].clone()
            param.grad = torch.cos(param.detach() * (time + 1))
            optimizer.step()
        return param.detach()

    close([run()], [run(fused=False)])


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_changes_its_type_or_shape_is_never_read_beyond_its_end(kind):
    param = nn.Parameter(torch.ones(64, 64))
    optimizer = moved(kind, [param], [torch.ones(64, 64)])
    param.data = torch.ones(2, 2)
    param.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()
    optimizer = moved(kind, [other := nn.Parameter(torch.ones(3))], [torch.ones(3)], fused=True)
    other.data = other.data.to(torch.bfloat16)
    other.grad = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(SettingError, match="fused=True is not possible here"):
        optimizer.step()


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_backward_through_a_parameter_that_has_moved_is_an_error(kind):
    param = nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    torch.autograd.backward(loss, retain_graph=True)
    moved(kind, [param], [torch.ones(3)], fused=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


@compiled
def test_threads_may_step_at_once():
    def step(place):
        params = [nn.Parameter(torch.ones(70_000))]
        moved(Lion, params, [torch.ones(70_000)], times=5)
        results[place] = params[0].detach()

    results = [None] * 4
    threads = [threading.Thread(target=step, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, results[0]) for result in results)


@compiled
def test_a_forked_process_steps_on():
    param = nn.Parameter(torch.ones(200_000))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        optimizer = moved(Lion, [param], [torch.ones(200_000)], times=1, fused=True)

        def step():
            optimizer.step()
            return param[::20_000].tolist() == [param[0].item()] * 10 and param[0].item() < 0.985

        child = os.fork()
        if child == 0:
            os._exit(0 if step() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert step()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_by_torch_it_is_the_same_and_not_compiled_for_every_step(kind):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(compile_it):
        params = [nn.Parameter(torch.linspace(-1, 1, 4)), nn.Parameter(torch.ones(2, 3))]
        optimizer = kind(params, lr=0.01)
        step = torch.compile(optimizer.step, backend=backend) if compile_it else optimizer.step
        for time in range(7):
            optimizer.param_groups[0]["lr"] = 0.01 / (time + 1)
            for param in params:
                param.grad = torch.cos(param.detach() * (time + 1))
            step()
        return [param.detach() for param in params]

    torch.compiler.reset()
    close(run(True), run(False))
    torch.compiler.reset()
    assert 1 <= len(graphs) <= 4  # without state, with it, and with numbers that turned out to change
