"""ColumnPlan: the pieces it describes are the columns that each Linear of a group needs."""

import pytest
from models import METHODS, swin, vit

import efft_kernels as ek
from efft_kernels.columns import plan_columns

NAMES = ["efft1", "efft2", "efft2-shared", "efft1-part", "efft2-part", "fact-tt"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_the_columns_of_each_slot(name, make, masked):
    for spec in ek.plan(make(), METHODS[name]).groups:
        plan = plan_columns(spec.slots, spec.N, masked=masked)
        # (draw of v, core, column) of each column of the updates side by side
        columns = [(i // plan.cores_per_draw, core, n) for i, core in enumerate(plan.cores) for n in range(spec.N)]
        pieces, at = [], 0
        for width, times in zip(plan.widths, plan.uses):
            pieces += [columns[at : at + width]] * times
            at += width
        assert at == len(columns)
        pieces += [[None] * width for width in plan.zeros]
        used = [i for takes in plan.takes for i in takes if i < sum(plan.uses)]
        assert sorted(used) == list(range(sum(plan.uses)))  # every repetition once
        draws = {}
        for slot, takes in zip(spec.slots, plan.takes):
            got = [column for i in takes for column in pieces[i]]
            want = [None if p.core is None else (p.core, p.start + i) for p in slot.parts for i in range(p.width)]
            assert [column and column[1:] for column in got] == want
            draws.setdefault(slot.call, set()).update(column[0] for column in got if column)
        if masked:
            owners = [draw for found in draws.values() for draw in found]
            assert len(owners) == len(set(owners))  # no two calls share a mask


@pytest.mark.parametrize("name", NAMES)
def test_slots_of_one_call_share_one_value_of_u(name):
    for spec in ek.plan(vit(), METHODS[name]).groups:
        plan = plan_columns(spec.slots, spec.N, masked=True)
        values = [(n, i) for n, (count, size) in enumerate(plan.shares) for i in range(count) for _ in range(size)]
        assert sorted(plan.downs) == list(range(len(spec.slots)))
        pairs = {(slot.call, values[down]) for slot, down in zip(spec.slots, plan.downs)}
        assert len(pairs) == plan.calls == len({slot.call for slot in spec.slots})
