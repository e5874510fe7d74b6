"""A row of slots is split among heads without gaps."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2sf.cache.layout import Layout
from a2sf.cache.scoring import EMPTY
from a2sf.cache.slots import SLOT_OVERHEAD_BYTES, Slots
from a2sf.policy import Heads
from tests.head_slots import head_of

CPU = torch.device("cpu")

rows_of_heads = st.integers(1, 4).flatmap(
    lambda heads: st.lists(
        # Few distinct widths, so that neighbours are often equal.
        st.tuples(*[st.integers(1, 3)] * heads),
        min_size=1,
        max_size=5,
    ).map(tuple)
)


def make(slots: Heads, rows: int = 2) -> Slots:
    return Slots.empty(rows=rows, slots=slots, head_dim=3, dtype=torch.float32, device=CPU)


@given(rows_of_heads)
def test_runs_cover_each_head_once_and_merge_equal_neighbours(slots: Heads) -> None:
    layout = Layout.packed(slots)
    covered = []
    for run in layout.runs:
        for layer in range(run.layers.start, run.layers.stop):
            heads = range(run.heads.start, run.heads.stop)
            assert {slots[layer][head] for head in heads} == {run.width}
            covered += [(layer, head) for head in heads]
    every = [(layer, head) for layer, row in enumerate(slots) for head in range(len(row))]
    assert covered == every
    for one, other in itertools.pairwise(layout.runs):
        assert one.width != other.width or one.layers != other.layers


@given(rows_of_heads)
def test_rectangles_are_views_of_the_heads_memory(slots: Heads) -> None:
    cache = make(slots)
    for tensor in (*cache.keys, *cache.values, cache.score):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    cache.position.copy_(torch.arange(cache.position.numel()).view_as(cache.position))
    for run, part in cache.parts:
        for index, layer in enumerate(range(run.layers.start, run.layers.stop)):
            for at, head in enumerate(range(run.heads.start, run.heads.stop)):
                for row in range(2):
                    mine = head_of(cache, layer, row, head)
                    assert torch.equal(part.position[index, row, at], mine.position)
                    assert torch.equal(part.score[index, row, at], mine.score)
                    assert torch.equal(part.keys[index][row, at], mine.keys)
                    assert torch.equal(part.values[index][row, at], mine.values)
        part.position.fill_(EMPTY)
    assert (cache.position == EMPTY).all(), "rectangles are views, and leave nothing out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(rows_of_heads, st.integers(1, 4))
def test_slots_take_the_bytes_of_the_formula(dtype: torch.dtype, slots: Heads, rows: int) -> None:
    cache = Slots.empty(rows=rows, slots=slots, head_dim=3, dtype=dtype, device=CPU)
    slot = 2 * 3 * dtype.itemsize + SLOT_OVERHEAD_BYTES
    assert cache.nbytes == rows * sum(map(sum, slots)) * slot


def test_equal_heads_and_a_narrower_view_of_them_are_one_run() -> None:
    layout = Layout.packed(((8, 8), (8, 8), (8, 8)))
    assert [run.shape for run in layout.runs] == [(3, 2, 8)]
    narrow = layout.narrowed(((5, 5), (5, 5), (5, 5)))
    assert [(run.shape, run.width) for run in narrow.runs] == [((3, 2, 8), 5)]
    assert narrow.offsets == layout.offsets


def test_writes_to_a_narrower_view_do_not_change_the_rest_of_the_row() -> None:
    cache = make(((4, 6), (5, 5)))
    view = cache.view(slice(1, 2), ((4, 2), (1, 5)))
    for _, part in view.parts:
        part.position.fill_(7)
    for layer, head in itertools.product(range(2), range(2)):
        width = view.layout.slots[layer][head]
        here = head_of(cache, layer, 1, head).position
        assert (here[:width] == 7).all()
        assert (here[width:] == EMPTY).all()
        assert (head_of(cache, layer, 0, head).position == EMPTY).all()


def filled(counts: Heads, width: int, rng: random.Random) -> Slots:
    """Slots whose row holds the given number of tokens, in any slots of each head."""
    cache = make(tuple((width,) * len(row) for row in counts), rows=1)
    for layer, row in enumerate(counts):
        for head, count in enumerate(row):
            mine = head_of(cache, layer, 0, head)
            for position, slot in enumerate(rng.sample(range(width), count)):
                mine.position[slot] = position
                mine.score[slot] = rng.random()
                mine.keys[slot], mine.values[slot] = torch.rand(2, 3)
    return cache


@given(rows_of_heads, st.integers(0, 99))
def test_a_copied_row_holds_each_head_s_tokens_in_its_first_slots(slots: Heads, seed: int) -> None:
    rng = random.Random(seed)
    counts = tuple(tuple(rng.randint(0, width) for width in row) for row in slots)
    source = filled(counts, 6, rng)
    cache = make(slots)
    before = cache.score[0].clone()
    cache.copy_row(1, source, 0, counts)
    for layer, row in enumerate(counts):
        for head, count in enumerate(row):
            theirs, mine = head_of(source, layer, 0, head), head_of(cache, layer, 1, head)
            assert mine.stored() == theirs.stored()
            assert (mine.position[:count] != EMPTY).all()
            assert (mine.position[count:] == EMPTY).all()
            for slot, position in enumerate(theirs.position.tolist()):
                if position != EMPTY:
                    (at,) = (mine.position == position).nonzero().flatten().tolist()
                    assert torch.equal(mine.keys[at], theirs.keys[slot])
                    assert torch.equal(mine.values[at], theirs.values[slot])
    assert torch.equal(cache.score[0], before)
    cache.move_row(0, 1)
    for name in ("position", "score"):
        assert torch.equal(getattr(cache, name)[0], getattr(cache, name)[1])


def test_heads_are_ordered_by_falling_number_of_slots() -> None:
    locations = make(((3, 9, 9, 1), (5, 5, 5, 6))).head_locations
    assert locations.order.tolist() == [[1, 2, 0, 3], [3, 0, 1, 2]]
    assert locations.vectors.tolist() == [[0, 3, 12, 21], [0, 5, 10, 15]]
    assert locations.marks.tolist() == [[0, 3, 12, 21], [22, 27, 32, 37]]
