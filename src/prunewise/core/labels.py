"""Labels: which indices of which tensor dimensions must live or die together.

A *label* is an integer. Each index along each dimension of each tensor may carry one; two indices whose labels have
been united belong to the same channel, and are removed together. `LabelStore` is a vectorised union-find.

A `Layout` says which labels a tensor carries. Most dimensions are labelled on their own. When a labelled dimension
is split in two (heads and head size, say) the labels become *joint* over both, until an operation uses one
of the two dimensions apart. A dimension without labels is fixed: nothing of it is ever removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LabelArray = npt.NDArray[np.int64]

# A reshape that would blow joint labels up beyond this many entries is not followed (its labels are pinned).
_MAX_JOINT = 1 << 22


class LabelStore:
    """Union-find over labels; all operations take arrays. Labels can be *pinned*: their channels must stay."""

    def __init__(self) -> None:
        self._parent: LabelArray = np.arange(4096, dtype=np.int64)
        self._touched = np.zeros(4096, dtype=bool)
        self._strong = np.zeros(4096, dtype=bool)
        self._count = 0
        self.pins: list[tuple[LabelArray, str]] = []
        self.contests: dict[int, LabelArray] = {}  # number of a pin -> the labels that the pinned ones gave way to
        self.muted = False  # while True, nothing is pinned

    def __len__(self) -> int:
        return self._count

    def fresh(self, n: int, *, strong: bool = False) -> LabelArray:
        """`n` new labels, each a class of its own; `strong` ones belong to a parameter."""
        start, end = self._count, self._count + n
        if end > len(self._parent):
            size = max(end, 2 * len(self._parent))
            parent = np.arange(size, dtype=np.int64)
            parent[:start] = self._parent[:start]
            touched = np.zeros(size, dtype=bool)
            touched[:start] = self._touched[:start]
            strengths = np.zeros(size, dtype=bool)
            strengths[:start] = self._strong[:start]
            self._parent, self._touched, self._strong = parent, touched, strengths
        self._count = end
        self._strong[start:end] = strong
        return np.arange(start, end, dtype=np.int64)

    def roots(self, labels: LabelArray) -> LabelArray:
        """The representative of each label's class, in the shape of `labels`."""
        parent = self._parent
        root = parent[labels]
        while True:
            above = parent[root]
            if np.array_equal(above, root):
                break
            root = above
        parent[labels] = root
        return root

    def unite(self, a: LabelArray, b: LabelArray) -> None:
        """Make the classes of `a` and `b` one, entry by entry (shapes broadcast)."""
        if a is b:
            return
        a, b = (side.reshape(-1) for side in np.broadcast_arrays(a, b))
        a, b = self.roots(a), self.roots(b)
        apart = a != b
        while apart.any():
            a, b = a[apart], b[apart]
            self._touched[a] = self._touched[b] = True
            low, high = np.minimum(a, b), np.maximum(a, b)
            # Where `high` repeats, the last write wins; the loop goes on until every pair is one class.
            self._parent[high] = low
            np.logical_or.at(self._strong, low, self._strong[high])
            a, b = self.roots(a), self.roots(b)
            apart = a != b

    def unite_along(self, labels: LabelArray, axis: int) -> LabelArray:
        """Make all labels along `axis` one class; returns the labels without that axis."""
        first = labels.take([0], axis=axis)
        self.unite(labels, first)
        return first.squeeze(axis)

    def pin(self, labels: LabelArray, reason: str) -> None:
        """The channels of these labels must stay; `reason` is shown to the user."""
        if not self.muted:
            self.pins.append((labels.reshape(-1), reason))

    def give_way(self, labels: LabelArray, to: LabelArray, reason: str) -> None:
        """Pin `labels`, because only one of two can be followed."""
        if not self.muted:
            self.contests[len(self.pins)] = to
        self.pin(labels, reason)

    def is_weak(self, labels: LabelArray) -> bool:
        """True when no parameter has any of these labels: constants and buffers only."""
        return not self._strong[self.roots(labels)].any()

    def is_untouched(self, labels: LabelArray) -> bool:
        """True when none of these labels was ever united with another."""
        return not self._touched[labels].any()


@dataclass(frozen=True)
class Block:
    """Labels over one dimension, or joint labels over several. `labels.ndim == len(dims)`."""

    dims: tuple[int, ...]
    labels: LabelArray


@dataclass(frozen=True)
class Layout:
    """The labels of one tensor: disjoint blocks; a dimension in no block is fixed."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()

    def block_at(self, dim: int) -> Block | None:
        """The block that labels `dim`, or None when the dimension is fixed."""
        for block in self.blocks:
            if dim in block.dims:
                return block
        return None

    def without(self, block: Block) -> Layout:
        """The same layout, `block` taken out (its dimensions become fixed)."""
        return Layout(self.shape, tuple(b for b in self.blocks if b is not block))

    def replace(self, block: Block, new: Block) -> Layout:
        """The same layout, `new` in the place of `block`."""
        return Layout(self.shape, tuple(new if b is block else b for b in self.blocks))

    def moved(self, shape: tuple[int, ...], to: dict[int, int]) -> Layout:
        """The layout of a tensor whose dimension `to[d]` is this one's `d`; `to` names every labelled dimension."""
        blocks = []
        for block in self.blocks:
            dims = [to[d] for d in block.dims]
            order = sorted(range(len(dims)), key=dims.__getitem__)
            labels = block.labels if len(dims) == 1 else block.labels.transpose(order)
            blocks.append(Block(tuple(sorted(dims)), labels))
        return Layout(shape, tuple(blocks))


def labelled(shape: tuple[int, ...], **dims: LabelArray) -> Layout:
    """A layout with one block a dimension: `labelled((8, 16), d1=labels)`."""
    blocks = tuple(Block((int(name[1:]),), labels) for name, labels in dims.items() if len(labels) > 1)
    return Layout(shape, blocks)


def fix(store: LabelStore, layout: Layout, dim: int, reason: str) -> Layout:
    """Nothing may be removed along `dim` any more.

    Joint labels are united along it, so that the block's other dimensions stay removable; a dimension that is
    labelled alone is pinned.
    """
    block = layout.block_at(dim)
    if block is None:
        return layout
    if len(block.dims) == 1:
        store.pin(block.labels, reason)
        return layout.without(block)
    axis = block.dims.index(dim)
    labels = store.unite_along(block.labels, axis)
    return layout.replace(block, Block(block.dims[:axis] + block.dims[axis + 1 :], labels))


def _pinned(store: LabelStore, layout: Layout, block: Block, reason: str) -> Layout:
    store.pin(block.labels, reason)
    return layout.without(block)


def fix_all(store: LabelStore, layout: Layout, reason: str) -> Layout:
    """Nothing of this tensor may be removed."""
    for block in layout.blocks:
        store.pin(block.labels, reason)
    return Layout(layout.shape)


def join(store: LabelStore, layouts: list[Layout], shape: tuple[int, ...], reason: str) -> Layout:
    """Element-wise combination of tensors that broadcast to `shape`: the labels of aligned indices are united."""
    result: Layout | None = None
    for layout in layouts:
        shift = len(shape) - len(layout.shape)
        aligned = layout.moved((1,) * shift + layout.shape, {d: d + shift for d in range(len(layout.shape))})
        result = aligned if result is None else _join_two(store, result, aligned, reason)
    assert result is not None
    # A dimension that the result broadcasts to but no input has (never labelled) is fixed.
    return Layout(shape, result.blocks)


def _join_two(store: LabelStore, x: Layout, y: Layout, reason: str) -> Layout:
    """`join` of two layouts of equal rank. A dimension of size 1 says nothing about the other side's."""
    shape = tuple(max(a, b) for a, b in zip(x.shape, y.shape, strict=True))
    both = [d for d in range(len(shape)) if x.shape[d] > 1 and y.shape[d] > 1]
    changed = True
    while changed:
        changed = False
        for d in both:
            p, q = x.block_at(d), y.block_at(d)
            if (p is None) == (q is None):
                if p is None or q is None or p.dims == q.dims:
                    continue
                # A table of constants (rotary embeddings, say) must not decide between heads and head size.
                if store.is_weak(q.labels):
                    y = _pinned(store, y, q, reason)
                    changed = True
                    break
                if store.is_weak(p.labels):
                    x = _pinned(store, x, p, reason)
                    changed = True
                    break
                # Joint on one side only: what the two do not have in common cannot be removed apart.
                common = set(p.dims) & set(q.dims)
                joint, single = (p, q) if len(p.dims) > len(q.dims) else (q, p)
                if len(single.dims) == 1 and single.dims[0] != min(joint.dims):
                    # A vector along the head size, say: whole heads stay removable, and not the same place of each.
                    x, y = fix(store, x, d, reason), fix(store, y, d, reason)
                    changed = True
                    break
                for extra in set(p.dims) - common:
                    x = fix(store, x, extra, reason)
                for extra in set(q.dims) - common:
                    y = fix(store, y, extra, reason)
            elif p is None:
                y = fix(store, y, d, reason)
            else:
                x = fix(store, x, d, reason)
            changed = True
            break
    blocks = list(x.blocks)
    for q in y.blocks:
        p = next((b for b in blocks if b.dims == q.dims), None)
        if p is not None:
            store.unite(p.labels, q.labels)
        else:
            blocks.append(q)
    return Layout(shape, tuple(blocks))


def tidy(store: LabelStore, dims: tuple[int, ...], labels: LabelArray, reason: str) -> Block | None:
    """A block without the axes that carry no information (size 1, or one class all along)."""
    kept = list(dims)
    for axis in reversed(range(labels.ndim)):
        if labels.shape[axis] == 1:
            labels = labels.squeeze(axis)
        else:
            first = labels.take([0], axis=axis)
            same = bool((labels == first).all()) or (
                labels.ndim > 1 and bool((store.roots(labels) == store.roots(first)).all())
            )
            if not same:
                continue
            labels = first.squeeze(axis)
        del kept[axis]
    if not kept:
        store.pin(labels.reshape(-1), reason)
        return None
    return Block(tuple(kept), labels)


def _segments(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest split of a reshape into independent pieces: (dimensions before, dimensions after)."""
    result = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [], []
        a = b = 1
        if i < len(old):
            a, before, i = old[i], [i], i + 1
        if j < len(new):
            b, after, j = new[j], [j], j + 1
        while a != b:
            if a < b and i < len(old):
                a, before, i = a * old[i], [*before, i], i + 1
            elif j < len(new):
                b, after, j = b * new[j], [*after, j], j + 1
            else:
                a, before, i = a * old[i], [*before, i], i + 1
        result.append((before, after))
    return result


def reshape(store: LabelStore, layout: Layout, shape: tuple[int, ...], reason: str) -> Layout:
    """The layout after `view`/`reshape` to `shape`. Labels stay joint where a labelled dimension is split."""
    if shape == layout.shape:
        return layout
    if 0 in shape:
        return Layout(shape, fix_all(store, layout, reason).blocks)
    segments = _segments(layout.shape, shape)
    home = {d: k for k, (before, _) in enumerate(segments) for d in before}
    owner: dict[int, Block] = {}  # segment -> the one block whose labels pass through it

    # One block is followed; a second one in the same segment would need labels for pairs. Labels that nothing is
    # tied to yet (those of an expanded dimension, or a fresh weight's) give way, then the minor to the major
    # dimension: of a fresh weight, as the weight has them (heads before their size), in whatever order einsum takes them.
    def precedence(block: Block) -> tuple[bool, bool, tuple[int, ...]]:
        fresh = len(block.dims) == 1 and store.is_untouched(block.labels)
        return store.is_weak(block.labels), fresh, (int(block.labels.min()),) if fresh else block.dims

    order = sorted(layout.blocks, key=precedence)
    survivors = []
    for block in order:
        own = {home[d] for d in block.dims}
        first = next((owner[s] for s in own if s in owner and _is_real(layout, segments[s], block)), None)
        if first is not None:
            store.give_way(block.labels, first.labels, reason)
            continue
        owner.update(dict.fromkeys(own, block))
        survivors.append(block)
    blocks = []
    for block in survivors:
        touched = sorted({home[d] for d in block.dims})
        inner = [d for s in touched for d in segments[s][0]]
        sizes = [layout.shape[d] for d in inner]
        if int(np.prod(sizes)) > max(_MAX_JOINT, 8 * block.labels.size):
            store.pin(block.labels, reason)
            continue
        axes = sorted(range(len(block.dims)), key=lambda a: inner.index(block.dims[a]))
        labels = block.labels.transpose(axes)
        labels = labels.reshape([layout.shape[d] if d in block.dims else 1 for d in inner])
        outer = [d for s in touched for d in segments[s][1]]
        labels = np.broadcast_to(labels, sizes).reshape([shape[d] for d in outer])
        new = tidy(store, tuple(outer), labels, reason)
        if new is not None:
            blocks.append(new)
    return Layout(shape, tuple(blocks))


def _is_real(layout: Layout, segment: tuple[list[int], list[int]], block: Block) -> bool:
    """False where a segment only renames dimensions (one to one), so that blocks cannot meet in it."""
    return len([d for d in segment[0] if layout.shape[d] > 1]) > 1 or any(d in block.dims for d in segment[0])
