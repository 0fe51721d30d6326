"""Which columns of its group's updates each Linear takes: integers, worked out once for a set of Linears."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .configs import Slot


@dataclass(frozen=True)
class ColumnPlan:
    """How the pairs of some slots are cut out of two tensors, so that the gradient of each cut is one operation.

    One tensor has the updates of ``cores`` side by side, [P, len(cores) * N]. It is split into pieces of ``widths``
    columns; piece i is handed out ``uses[i]`` times, and blocks of zeros of ``zeros`` columns follow the pieces. Slot s
    concatenates ``takes[s]``, numbers in the resulting list: [piece 0, ..., piece 0, piece 1, ..., zeros 0, ...].

    The other tensor has the values of u, [calls, K, P]: one for all slots, or one for each call if factor dropout draws
    masks. Slots that share a call share its value: ``shares`` has (how many calls, slots of each), in the order of the
    tensor, and slot s gets number ``downs[s]`` of the values so repeated.
    """

    slots: tuple[Slot, ...]
    cores: tuple[int, ...]
    cores_per_draw: int  # number of neighbouring cores that are multiplied with the same masked v
    widths: tuple[int, ...]
    uses: tuple[int, ...]
    zeros: tuple[int, ...]
    takes: tuple[tuple[int, ...], ...]
    piece_per_core: bool  # each piece is the update of one core, and used once
    shares: tuple[tuple[int, int], ...]
    downs: tuple[int, ...]

    @property
    def calls(self) -> int:
        return sum(count for count, _ in self.shares)


def plan_columns(slots: Sequence[Slot], N: int, *, masked: bool) -> ColumnPlan:
    """The plan for these slots of a group whose v has N columns.

    Args:
        masked: whether factor dropout draws masks, one for each core, and of u and v one for each call. Cores that
            several calls use then occur several times.
    """
    slots, calls = tuple(slots), {}
    for slot in slots:
        calls.setdefault(slot.call if masked else 0, []).append(slot)
    if masked:
        of_call = {call: _unique(core for slot in found for core in slot.cores) for call, found in calls.items()}
        sizes = {len(cores) for cores in of_call.values()}
        cores_per_draw = sizes.pop() if len(sizes) == 1 else 1
    else:
        of_call = {0: sorted({core for slot in slots for core in slot.cores})}
        cores_per_draw = len(of_call[0])
    cores, position = [], {}
    for call, found in of_call.items():
        position.update({(call, core): len(cores) + i for i, core in enumerate(found)})
        cores += found
    runs = [_runs(slot, {core: position[slot.call if masked else 0, core] for core in slot.cores}, N) for slot in slots]
    widths, uses, zeros, takes = _pieces(runs, len(cores) * N)
    ordered = sorted(calls.values(), key=len)
    shares = tuple(Counter(len(found) for found in ordered).items())
    number = {id(slot): i for i, slot in enumerate(slot for found in ordered for slot in found)}
    return ColumnPlan(
        slots=slots,
        cores=tuple(cores),
        cores_per_draw=cores_per_draw,
        widths=widths,
        uses=uses,
        zeros=zeros,
        takes=takes,
        piece_per_core=widths == (N,) * len(cores) and uses == (1,) * len(cores),
        shares=tuple((count, size) for size, count in shares),
        downs=tuple(number[id(slot)] for slot in slots),
    )


def _unique(cores: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(cores))


def _runs(slot: Slot, position: dict[int, int], N: int) -> list[tuple[int | None, int]]:
    """(first column, or None for zeros; width) of each stretch of neighbouring columns that the slot needs"""
    runs = []
    for core, start, width in slot.parts:
        if core is not None:
            start += position[core] * N
        else:
            start = None
        before = runs[-1] if runs else None
        if before and (before[0] is start is None or (None not in (before[0], start) and sum(before) == start)):
            runs[-1] = (before[0], before[1] + width)
        else:
            runs.append((start, width))
    return runs


def _pieces(runs: list[list[tuple[int | None, int]]], total: int) -> tuple:
    """widths, uses, zeros and takes of a ColumnPlan"""
    times = Counter(run for needs in runs for run in needs)
    widths, uses, place, at, n = [], [], {}, 0, 0
    for run in sorted(run for run in times if run[0] is not None):
        start, width = run
        if start > at:
            widths.append(start - at)
            uses.append(0)
        widths.append(width)
        uses.append(times[run])
        place[run] = n
        at, n = start + width, n + times[run]
    if at < total:
        widths.append(total - at)
        uses.append(0)
    zeros = [run[1] for run in times if run[0] is None]
    place |= {(None, width): n + i for i, width in enumerate(zeros)}
    takes = []
    for needs in runs:
        takes.append(tuple(place[run] for run in needs))
        for run in needs:
            place[run] += run[0] is not None  # the next slot gets the next repetition
    return tuple(widths), tuple(uses), tuple(zeros), tuple(takes)
