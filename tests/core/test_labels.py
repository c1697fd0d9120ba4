"""Labels against slow references: union-find, and what each move of a tensor does to them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunewise.core import labels as lab
from prunewise.core.labels import Block, LabelStore, Layout, fix, join, labelled, reshape
from tests.oracle.labels import NaiveStore, pinned, removed

PAIRS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40)


@given(PAIRS, st.integers(1, 5))
def test_union_find_agrees_with_sets(pairs: list[tuple[int, int]], chunk: int) -> None:
    store, naive = LabelStore(), NaiveStore(20)
    labels = store.fresh(20)
    for start in range(0, len(pairs), chunk):
        part = np.array(pairs[start : start + chunk], dtype=np.int64).reshape(-1, 2)
        store.unite(part[:, 0], part[:, 1])
        for a, b in part.tolist():
            naive.unite(a, b)
    roots = store.roots(labels)
    for i in range(20):
        assert set(np.flatnonzero(roots == roots[i]).tolist()) == naive.of(i)
        assert roots[i] == min(naive.of(i))


@given(PAIRS, st.sets(st.integers(0, 19)))
def test_strength_and_touch_follow_the_class(pairs: list[tuple[int, int]], strong: set[int]) -> None:
    store, naive = LabelStore(), NaiveStore(20)
    for i in range(20):
        store.fresh(1, strong=i in strong)
    for a, b in pairs:
        store.unite(np.array([a]), np.array([b]))
        naive.unite(a, b)
    for i in range(20):
        assert store.is_weak(np.array([i])) == (not naive.of(i) & strong)
        assert store.is_untouched(np.array([i])) == (len(naive.of(i)) == 1)


def test_store_grows() -> None:
    store = LabelStore()
    a, b = store.fresh(5000), store.fresh(5000, strong=True)
    store.unite(a, b)
    assert len(store) == 10000
    assert (store.roots(b) == a).all()
    assert not store.is_weak(a)


def test_unite_broadcasts() -> None:
    store = LabelStore()
    table = store.fresh(6).reshape(2, 3)
    assert lab.LabelStore.unite_along(store, table, 1).tolist() == [0, 3]
    assert store.roots(table).tolist() == [[0, 0, 0], [3, 3, 3]]


@st.composite
def layouts(draw: Any) -> tuple[LabelStore, Layout]:
    """A tensor of up to four dimensions, some of them labelled, two of them perhaps jointly."""
    store = LabelStore()
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    wide = [d for d, n in enumerate(shape) if n > 1]
    chosen = [d for d in wide if draw(st.booleans())]
    blocks = []
    if len(chosen) >= 2 and draw(st.booleans()):
        a, b, *chosen = chosen
        blocks.append(Block((a, b), store.fresh(shape[a] * shape[b]).reshape(shape[a], shape[b])))
    blocks += [Block((d,), store.fresh(shape[d], strong=draw(st.booleans()))) for d in chosen]
    for _ in range(draw(st.integers(0, 3))):  # some are one class already
        if len(store):
            pair = [draw(st.integers(0, len(store) - 1)) for _ in range(2)]
            store.unite(np.array(pair[:1]), np.array(pair[1:]))
    return store, Layout(shape, tuple(blocks))


def some_classes(draw: Any, store: LabelStore) -> Any:
    """Roots of classes to remove, none of them pinned."""
    roots = sorted({int(r) for r in store.roots(np.arange(len(store)))} - pinned(store)) if len(store) else []
    return draw(st.sets(st.sampled_from(roots))) if roots else set()


@given(st.data())
@settings(max_examples=80)
def test_reshape_moves_every_element_with_its_labels(data: Any) -> None:
    store, layout = data.draw(layouts())
    total = math.prod(layout.shape)
    shape, left = [], total
    while left > 1:
        size = data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        shape.append(size)
        left //= size
    result = reshape(store, layout, tuple(shape), "test")
    assert result.shape == tuple(shape)
    gone = some_classes(data.draw, store)
    # What is gone before is gone after, in the order of memory.
    np.testing.assert_array_equal(removed(store, layout, gone).reshape(-1), removed(store, result, gone).reshape(-1))


@given(st.data())
@settings(max_examples=60)
def test_join_removes_the_same_of_all(data: Any) -> None:
    """Element-wise: an element of the result is gone where, and only where, each input's element is gone."""
    store = LabelStore()
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)))
    inputs = []
    for _ in range(data.draw(st.integers(1, 3))):
        own = tuple(n if data.draw(st.booleans()) else 1 for n in shape[data.draw(st.integers(0, len(shape) - 1)) :])
        wide = [d for d, n in enumerate(own) if n > 1 and data.draw(st.booleans())]
        blocks: list[Block] = []
        if len(wide) >= 2 and data.draw(st.booleans()):
            a, b, *wide = wide
            blocks.append(Block((a, b), store.fresh(own[a] * own[b], strong=True).reshape(own[a], own[b])))
        blocks += [Block((d,), store.fresh(own[d], strong=data.draw(st.booleans()))) for d in wide]
        inputs.append(Layout(own, tuple(blocks)))
    out_shape = np.broadcast_shapes(*(i.shape for i in inputs))
    result = join(store, inputs, out_shape, "test")
    gone = some_classes(data.draw, store)
    want = removed(store, result, gone)
    union = np.zeros(out_shape, dtype=bool)
    for layout in inputs:
        union |= np.broadcast_to(removed(store, layout, gone), out_shape)
    np.testing.assert_array_equal(want, union)
    for layout in inputs:  # along a dimension that the input has in full, it loses what the result loses
        shift = len(out_shape) - len(layout.shape)
        mine = removed(store, layout, gone)
        for d, n in enumerate(layout.shape):
            if n > 1:
                lost = mine.all(axis=tuple(a for a in range(mine.ndim) if a != d))
                lost_after = want.all(axis=tuple(a for a in range(want.ndim) if a != d + shift))
                assert (lost <= lost_after).all()
                others_full = all(m > 1 or out_shape[a + shift] == 1 for a, m in enumerate(layout.shape))
                if others_full and layout.shape == tuple(out_shape):
                    np.testing.assert_array_equal(lost, lost_after)


@given(st.data())
@settings(max_examples=40)
def test_fix_leaves_nothing_to_remove_along_a_dimension(data: Any) -> None:
    store, layout = data.draw(layouts())
    dim = data.draw(st.integers(0, len(layout.shape) - 1))
    result = fix(store, layout, dim, "because")
    assert result.block_at(dim) is None
    gone = some_classes(data.draw, store)
    lost = removed(store, layout, gone)
    np.testing.assert_array_equal(lost, removed(store, result, gone))
    assert (lost == lost.take([0], axis=dim)).all()


def test_fix_names_the_reason_where_a_dimension_stands_alone() -> None:
    store = LabelStore()
    fix(store, labelled((2, 3), d1=store.fresh(3)), 1, "because")
    assert [reason for _, reason in store.pins] == ["because"]


def test_a_dimension_that_is_split_keeps_joint_labels() -> None:
    store = LabelStore()
    x = labelled((2, 12), d1=store.fresh(12))
    split = reshape(store, x, (2, 3, 4), "split")
    (block,) = split.blocks
    assert block.dims == (1, 2)
    assert block.labels.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert not store.pins
    back = reshape(store, split, (2, 12), "merge")
    assert back.blocks[0].labels.tolist() == list(range(12))


def test_flatten_repeats_labels_over_fixed_dimensions() -> None:
    store = LabelStore()
    x = labelled((2, 3, 4), d1=store.fresh(3))
    assert reshape(store, x, (2, 12), "flat").blocks[0].labels.tolist() == np.repeat(np.arange(3), 4).tolist()


def test_two_labelled_dimensions_merged_leave_one() -> None:
    store = LabelStore()
    x = labelled((3, 4), d0=store.fresh(3, strong=True), d1=store.fresh(4, strong=True))
    merged = reshape(store, x, (12,), "merged")
    assert len(merged.blocks) == 1
    assert len(store.pins) == 1
    assert len(store.pins[0][0]) in (3, 4)


def test_constants_give_way() -> None:
    """A table of constants must not decide between heads and head size."""
    store = LabelStore()
    weight = Layout((3, 4), (Block((0, 1), store.fresh(12, strong=True).reshape(3, 4)),))
    table = labelled((1, 4), d1=store.fresh(4))
    joined = join(store, [weight, table], (3, 4), "rope")
    assert [(b.dims, b.labels.tolist()) for b in joined.blocks] == [((0,), [0, 4, 8])]  # heads can still go
    assert [sorted(labels.tolist()) for labels, _ in store.pins] == [list(range(12, 16))]


@pytest.mark.parametrize("empty", [(0,), (2, 0)])
def test_empty_tensors_are_fixed(empty: tuple[int, ...]) -> None:
    store = LabelStore()
    assert reshape(store, Layout((0, 3)), empty, "empty") == Layout(empty)


def test_moved_transposes_joint_labels() -> None:
    store = LabelStore()
    x = Layout((3, 4), (Block((0, 1), store.fresh(12).reshape(3, 4)),))
    (block,) = x.moved((4, 3), {0: 1, 1: 0}).blocks
    assert block.dims == (0, 1)
    assert block.labels.tolist() == np.arange(12).reshape(3, 4).T.tolist()
