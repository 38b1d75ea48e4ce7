"""What a report says, as plain data: :func:`dataclasses.asdict` makes JSON of it, which the page draws.

All bytes are those of one rank unless a name says otherwise. Repeated blocks of a model occur once, with their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FORM = "autopar report 1"  # of the document; the number grows where a field changes its meaning


@dataclass(frozen=True)
class Axis:
    """``about``: what its ranks share out. ``groups``: the first ones, of ``count``."""

    name: str
    size: int
    about: str
    count: int
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Choice:
    """A field of the plan. ``about``: the sentences of its documentation."""

    name: str
    value: str
    usual: str
    about: str


@dataclass(frozen=True)
class Reason:
    """What was chosen for ``count`` parameters on an axis. ``instead``: the alternatives, by their estimated cost."""

    axis: str
    chosen: str
    names: tuple[str, ...]
    count: int
    instead: str


@dataclass(frozen=True)
class Segment:
    """Indices ``start`` to ``stop`` of a dim, and who has them: ``owners`` are positions on the axes of the drawing."""

    start: int
    stop: int
    owners: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DrawnDim:
    """One side of a rectangle.

    Attributes:
        dim: of the tensor.
        size: its elements, in the whole tensor.
        axes: of the mesh, that split it; an owner has a position for each.
        segments: at most :data:`autopar.report.parts.MOST_SEGMENTS`.
        left_out: how many there are beyond these.
    """

    dim: int
    size: int
    axes: tuple[str, ...]
    segments: tuple[Segment, ...]
    left_out: int


@dataclass(frozen=True)
class Drawing:
    """A tensor as a rectangle: at most two of its dims, the split ones first, rows before columns."""

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: str
    layout: str
    bytes: int
    rank_bytes: int
    dims: tuple[DrawnDim, ...]
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Parameter:
    """``drawing``: a position in :attr:`Report.drawings`. ``places``: the pipeline ranks that have it, of all copies.

    ``reasons``: lines on why it is laid out as it is.
    """

    name: str
    target: str
    aliases: tuple[str, ...]
    drawing: int
    places: tuple[int, ...]
    reasons: tuple[str, ...]
    buffer: bool = False


@dataclass(frozen=True)
class Where:
    """Copies ``first`` to ``last`` of a repeated module are on these pipeline ranks."""

    first: int
    last: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """A module, or ``times`` of them that are alike, called ``0..79``. ``bytes``: of all their whole tensors."""

    name: str
    path: str
    times: int
    bytes: int
    where: tuple[Where, ...]
    parameters: tuple[Parameter, ...]
    children: tuple[Module, ...]


@dataclass(frozen=True)
class Call:
    """A node of the graph of a block.

    Attributes:
        kind: ``input``, ``output``, ``operator``, ``view`` (moves nothing), ``collective``, or ``entrance`` (a
            collective that sends in the backward pass only).
        types: of what it gives, as text.
        axis, sent_bytes: of a collective, forward.
        backward, backward_bytes: the collective of the backward pass, and its bytes.
    """

    name: str
    label: str
    kind: str
    module: str
    source: str
    types: str
    parameters: tuple[str, ...]
    axis: str
    sent_bytes: int
    backward: str
    backward_bytes: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """One block as a graph. ``edges``: pairs of positions in ``calls``. ``copies``: blocks that are alike."""

    name: str
    copies: tuple[str, ...]
    calls: tuple[Call, ...]
    edges: tuple[tuple[int, int], ...]
    left_out: int


@dataclass(frozen=True)
class Moment:
    """What is held at one moment: ``held`` has bytes in the order of :attr:`Memory.kinds`."""

    at: float
    phase: str
    held: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Of the ranks of one pipeline place over a step. ``at`` of a moment goes from 0 to 1.

    ``peak``: at ``moments[highest]``, in the phase that this one has.
    """

    ranks: str
    place: int
    kinds: tuple[str, ...]
    moments: tuple[Moment, ...]
    highest: int
    peak: int


@dataclass(frozen=True)
class Device:
    """A device that ranks have to fit. ``needed``: bytes that the largest rank needs of it, with the allowance for the
    driver, the communication library and the allocator. ``helps``: changes, and about how many bytes each saves."""

    bytes: int
    needed: int
    helps: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Sent:
    """``bytes`` of one rank of the pipeline rank ``place`` in one step, in ``operations`` collectives or messages."""

    place: int
    phase: str
    axis: str
    collective: str
    operations: int
    bytes: int


@dataclass(frozen=True)
class Span:
    """A compute of a pipeline rank, in units of one forward."""

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Pipeline:
    """``bubble``: idle time over computing time. ``spans``: in the first :data:`autopar.report.steps.MOST_SPANS`."""

    schedule: str
    stages: int
    microbatches: int
    bubble: float
    words: Mapping[str, str]
    spans: tuple[Span, ...]
    left_out: int


@dataclass(frozen=True)
class Report:
    """One program.

    Attributes:
        axes: from the outermost to the innermost, by which ranks are numbered.
        parameter_bytes, rank_parameter_bytes: of the whole model; of a rank that holds most.
        optimizer: whose states :attr:`memory` counts.
        text: the program, with repeated blocks folded.
    """

    model: str
    mesh: str
    ranks: int
    axes: tuple[Axis, ...]
    choices: tuple[Choice, ...]
    reasons: tuple[Reason, ...]
    parameter_bytes: int
    rank_parameter_bytes: int
    modules: Module
    drawings: tuple[Drawing, ...]
    blocks: tuple[Block, ...]
    memory: tuple[Memory, ...]
    optimizer: str
    device: Device | None
    traffic: tuple[Sent, ...]
    pipeline: Pipeline | None
    passes: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Document:
    """One report, or two to be compared with ``differences`` in words."""

    reports: tuple[Report, ...]
    differences: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"form": FORM, **asdict(self)}
