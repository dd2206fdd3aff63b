"""The space of steps."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.compress import Prune
from netwright.core.errors import TargetError
from netwright.workshop.plan import space_of
from netwright.workshop.point import key
from netwright.workshop.space import STEPS, Droppable, Space, check_steps, parse_steps, weight_bits

GROUPS = st.lists(st.integers(1, 200), min_size=1, max_size=5).map(
    lambda sizes: tuple((f"layer{number}", size) for number, size in enumerate(sizes))
)


@st.composite
def proposals(draw: st.DrawFn) -> tuple[Space, dict]:
    groups = draw(GROUPS)
    free = frozenset(draw(st.sets(st.sampled_from([name for name, _ in groups]))))
    space = Space(groups, draw(st.none() | st.just({"activation": "uint8"})), free=free)
    values: dict = {
        "thin": draw(st.integers(0, space.thinnest)),
        "saliency": draw(st.sampled_from(["magnitude", "taylor"])),
    }
    for name, _ in groups:
        values[f"offset/{name}"] = draw(st.integers(-4, 4)) / 4
    if space.int8 is not None:
        values["int8"] = draw(st.booleans())
    return space, values


def test_what_is_offered_is_what_may_be_proposed() -> None:
    whole = Space((("a", 8),), {}, (Droppable("b"),), True, (8, 4))
    assert whole.offered() == STEPS
    assert replace(whole, widths=(8,), codebooks=False, branches=()).offered() == ("prune", "int8")
    assert replace(whole, groups=(), widths=(4,), codebooks=False).offered() == ("branches", "int4")
    assert replace(whole, int8=None).offered() == ("prune", "branches", "codebooks")


@given(proposals())
@settings(max_examples=150, deadline=None)
def test_every_proposal_leaves_a_unit_in_every_group(given_: tuple[Space, dict]) -> None:
    space, values = given_
    steps = space.steps(values)
    assert len(steps) <= 2
    for step in steps:
        step.build()  # its settings are valid
    sizes = dict(space.groups)
    for step in steps:
        if step.method.endswith(":Prune"):
            pruned = Prune(**step.settings)
            assert isinstance(pruned.ratios, dict)
            assert pruned.ratios, "a step that does nothing is left out"
            for name, ratio in pruned.ratios.items():
                removed = math.floor(ratio * sizes[name] + 1e-9)  # what Prune takes
                assert 1 <= removed < sizes[name]
                wanted = sizes[name] * min(1.0, 2 ** (values[f"offset/{name}"] - values["thin"] / 4))
                left = sizes[name] - removed
                block = 1 if name in space.free or sizes[name] < 16 or wanted < 3 else 4 if wanted < 6 else 8
                assert abs(left - wanted) <= block / 2 + 1e-6 or left == 1
                assert left % block == 0
    assert any(step.method.endswith(":Int8") for step in steps) == bool(values.get("int8"))


@given(proposals())
@settings(max_examples=50, deadline=None)
def test_distributions_contain_what_may_be_proposed(given_: tuple[Space, dict]) -> None:
    space, values = given_
    distributions = space.distributions()
    assert set(distributions) == set(values)
    for name, value in values.items():
        assert distributions[name]._contains(distributions[name].to_internal_repr(value))


@pytest.mark.parametrize("int8", [None, {"activation": "uint8", "weight": "int8"}])
def test_the_ladder_is_valid_and_goes_from_small_to_whole(int8: dict | None) -> None:
    space = Space((("a", 64), ("b", 128)), int8)
    ladder = space.ladder()
    for values in ladder:
        for name, value in values.items():
            distribution = space.distributions()[name]
            assert distribution._contains(distribution.to_internal_repr(value))
    levels = [values["thin"] for values in ladder]
    assert max(levels) > 12
    assert min(levels) == 0
    keys = [key(space.steps(values)) for values in ladder if space.steps(values)]
    assert len(keys) == len(set(keys))
    if int8 is not None:
        both = [values["int8"] for values in ladder if values["thin"] == ladder[0]["thin"]]
        assert both == [True, False], "the middle rung is tried with and without"
        assert ladder[2] == {**ladder[2], "thin": 0, "int8": True}, "integers alone are tried early"


def test_without_gradients_units_are_ranked_by_magnitude_alone() -> None:
    space = Space((("a", 64),), None, gradients=False)
    assert list(space.distributions()) == ["thin", "offset/a"]
    assert space.size() == pytest.approx(math.log10(64))
    for values in space.ladder():
        assert set(values) == set(space.distributions())
        assert all(step.settings["saliency"] == "magnitude" for step in space.steps(values))


@pytest.mark.parametrize("size", [20, 36, 50, 84, 100])
def test_the_whole_network_stays_whole_however_wide_it_is(size: int) -> None:
    space = Space((("a", size),), {"activation": "uint8"})
    rungs = [space.steps(values) for values in space.ladder() if values["thin"] == 0]
    assert [[step.method for step in steps] for steps in rungs if steps] == [["netwright.compress:Int8"]]
    assert space.steps({"thin": 0, "offset/a": 0.5}) == ()


def test_neutral_values_do_nothing() -> None:
    assert Space((("a", 8),), {"activation": "uint8"}).steps({}) == ()
    assert Space((), None).distributions() == {}


def test_without_groups_only_precision_is_left() -> None:
    space = Space((), {"activation": "uint8"})
    assert list(space.distributions()) == ["int8"]
    (step,) = space.steps({"int8": True})
    assert step.settings == {"activation": "uint8"}
    assert space.ladder()[0] == {"int8": True}
    assert Space((), {"activation": "uint8"}).size() == pytest.approx(math.log10(2))


def test_offsets_move_one_group_only() -> None:
    space = Space((("a", 100), ("b", 100)), None)
    (step,) = space.steps({"thin": 4, "offset/a": -1.0, "offset/b": 0.5})
    assert step.settings["ratios"] == pytest.approx({"a": 1 - 0.24, "b": 1 - 0.72})
    (step,) = replace(space, free=frozenset("ab")).steps({"thin": 4, "offset/a": -1.0, "offset/b": 0.5})
    assert step.settings["ratios"] == pytest.approx({"a": 0.75, "b": 1 - 0.71})


def test_steps_are_named_in_any_order() -> None:
    assert parse_steps(None) is None
    assert parse_steps(" int8 , prune") == ("prune", "int8")
    assert parse_steps(["prune"]) == ("prune",)
    with pytest.raises(TargetError, match="'prun' is no step of optimize"):
        parse_steps("prun")
    with pytest.raises(TargetError, match="No step is named"):
        parse_steps([])


def test_steps_that_save_size_alone_need_a_target_of_it() -> None:
    for steps, sized in ((None, False), (("int4", "codebooks"), True), (("int8", "int4"), False)):
        check_steps(steps, sized)
    with pytest.raises(TargetError, match="int4 and codebooks save size only, and no target speaks of it"):
        check_steps(("int4", "codebooks"), False)


def test_heads_need_not_fill_blocks_but_channels_do() -> None:
    """Of 16 heads 11 may stay; of 16 hidden units 8 do."""
    units = SimpleNamespace(name="mlp", size=16, kind="units")
    graph = SimpleNamespace(groups=[SimpleNamespace(name="heads", size=16, kind="heads"), units])
    space = space_of(graph, ("prune",), int8=None, branches=(), codebooks=False, widths=(), gradients=True)
    (step,) = space.steps({"thin": 2})
    assert step.settings["ratios"] == {"heads": 5 / 16, "mlp": 0.5}


BRANCHES = (Droppable("second", ("b",)), Droppable("first", ("a",)))


def test_branches_go_with_their_groups_and_most_dispensable_first() -> None:
    space = Space((("a", 16), ("b", 16), ("c", 16)), None, BRANCHES)
    prune, drop = space.steps({"thin": 4, "branches": 1, "offset/c": -1.0})
    assert prune.settings["ratios"] == {"a": 0.5, "c": 0.75}
    assert drop.method == "netwright.compress:PruneBranches"
    assert drop.settings == {"drop": ["second"]}
    assert space.steps({"thin": 4, "branches": 2})[1].settings == {"drop": ["second", "first"]}
    assert [step.method for step in space.steps({"thin": 4, "branches": 0})] == ["netwright.compress:Prune"]
    for step in space.steps({"thin": 4, "branches": 2}):
        step.build()


def test_what_lies_in_a_lost_branch_does_not_count() -> None:
    space = Space((("a", 16), ("b", 16), ("c", 16)), {"activation": "uint8"}, BRANCHES, codebooks=True)
    conditions = space.search_space()
    values = {"thin": 4, "saliency": "taylor", **{f"offset/{name}": 0.25 for name in "abc"}, "branches": 1}
    floats, integers = {**values, "int8": False, "codebooks": 3}, {**values, "int8": True, "codebooks": 3}
    assert "offset/b" not in conditions.reduced(floats)
    assert "offset/a" in conditions.reduced(floats)
    assert "codebooks" not in conditions.reduced(integers)
    for change in ({"offset/b": -1.0}, {"offset/a": -1.0}):
        same_key = conditions.key(floats) == conditions.key({**floats, **change})
        assert same_key == (key(space.steps(floats)) == key(space.steps({**floats, **change})))
    assert space.steps(floats)[-1].settings == {"bits": 3, "groups": 1}
    assert space.steps(integers)[-1].method == "netwright.compress:Int8"


def test_the_ladder_tries_depth_and_ways_to_write() -> None:
    space = Space((("a", 64),), {"activation": "uint8"}, BRANCHES, codebooks=True)
    ladder = space.ladder()
    assert {values["branches"] for values in ladder} == {0, 1, 2}
    assert {(values["int8"], values["codebooks"]) for values in ladder} == {(True, 0), (False, 4), (False, 0)}
    for values in ladder:
        assert space.search_space().valid(values)
        space.search_space().check(values)
    assert [values["branches"] for values in Space((), None, BRANCHES).ladder()] == [2, 1]
    assert Space((), None, codebooks=True).ladder() == [{"codebooks": 4}]


def test_integers_may_have_weights_of_fewer_bits() -> None:
    space = Space((("a", 64),), {"activation": "uint8"}, codebooks=True, widths=(8, 4))
    neutral = {"thin": 0, "saliency": "magnitude", "offset/a": 0.0}
    wide, narrow = ({**neutral, "int8": True, "bits": bits} for bits in (8, 4))
    assert [step.settings for step in space.steps(wide)] == [{"activation": "uint8"}]
    assert [step.settings for step in space.steps(narrow)] == [{"activation": "uint8", "weight_bits": 4}]
    space.steps(narrow)[0].build()
    floats = {**narrow, "int8": False, "codebooks": 0}
    conditions = space.search_space()
    assert conditions.key(floats) == conditions.key({**floats, "bits": 8})
    assert conditions.key({**wide, "codebooks": 0}) != conditions.key({**narrow, "codebooks": 0})
    forms = {(values["int8"], values["bits"], values["codebooks"]) for values in space.ladder()}
    assert forms == {(True, 8, 0), (True, 4, 0), (False, 8, 4), (False, 8, 0)}
    assert space.size() == pytest.approx(math.log10(2 * 64 * 5))
    only = Space((), {"activation": "uint8"}, widths=(4,))
    assert list(only.distributions()) == ["int8"]
    assert only.steps({"int8": True})[0].settings["weight_bits"] == 4


@pytest.mark.parametrize(
    ("steps", "sized", "expected"),
    [
        (STEPS, True, (8, 4)),
        (STEPS, False, (8,)),
        (("int4",), True, (4,)),
        (("int4",), False, ()),
        (("prune",), True, ()),
    ],
)
def test_few_bits_are_tried_where_a_target_speaks_of_size(steps, sized, expected) -> None:
    assert weight_bits(steps, sized) == expected
