"""Slow, obvious references for `prunewise.core.labels`: one element at a time."""

from __future__ import annotations

import itertools

import numpy as np

from prunewise.core.labels import LabelStore, Layout


class NaiveStore:
    """Classes as sets; uniting takes forever and is plainly right."""

    def __init__(self, n: int) -> None:
        self.classes = [{i} for i in range(n)]

    def of(self, label: int) -> set[int]:
        return next(c for c in self.classes if label in c)

    def unite(self, a: int, b: int) -> None:
        one, other = self.of(a), self.of(b)
        if one is not other:
            one |= other
            self.classes.remove(other)


def elements(layout: Layout) -> np.ndarray:
    """For every element of the tensor, the labels it carries: an array of frozensets in the tensor's shape."""
    out = np.empty(layout.shape, dtype=object)
    for place in itertools.product(*(range(n) for n in layout.shape)):
        out[place] = frozenset(int(b.labels[tuple(place[d] for d in b.dims)]) for b in layout.blocks)
    return out


def pinned(store: LabelStore) -> set[int]:
    """Roots of all pinned classes."""
    return {int(r) for labels, _ in store.pins for r in store.roots(labels)}


def removed(store: LabelStore, layout: Layout, roots: set[int]) -> np.ndarray:
    """For every element: is it gone when the classes with these roots go?"""
    carried = elements(layout)
    root_of = store.roots(np.arange(len(store))).tolist()
    gone = np.zeros(layout.shape, dtype=bool)
    for place in np.ndindex(*layout.shape):
        gone[place] = any(root_of[x] in roots for x in carried[place])
    return gone
