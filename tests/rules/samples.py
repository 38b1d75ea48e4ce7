"""Sample calls for every rule: operator -> calls. A rule without a sample fails the suite; add one here.

Sizes are small, with dims that divide by 2, by 3 and by neither, of size 1, broadcast, merged and negative. The tables
stand in samples_pointwise.py, samples_views.py, samples_compute.py and samples_algebra.py.
"""

from __future__ import annotations

from typing import Any

import torch

from autopar.verification.rule_check import Sample
from tests.rules.samples_algebra import ALGEBRA, FOURIER, PARTS, PLACES
from tests.rules.samples_compute import CONTRACTIONS, RECURRENT, REDUCTIONS, SPATIAL
from tests.rules.samples_pointwise import LOSSES, POINTWISE, from_schema
from tests.rules.samples_views import COLLECTIVES, INDEXING, SEGMENTS, VIEWS

aten = torch.ops.aten

SAMPLES: dict[Any, list[Sample]] = {
    **POINTWISE, **LOSSES, **VIEWS, **SEGMENTS, **INDEXING,
    **COLLECTIVES, **CONTRACTIONS, **REDUCTIONS, **SPATIAL, **RECURRENT,
    **ALGEBRA, **FOURIER, **PARTS, **PLACES,
}  # fmt: skip

# operators whose elements are arbitrary: there is nothing to compare
NOT_COMPARED = {aten.empty_like.default, aten.new_empty.default, aten.empty.memory_format}


def samples_of(target: Any) -> list[Sample]:
    """The samples of an operator; pointwise ones without any get some from their schema."""
    if target in SAMPLES:
        return SAMPLES[target]
    if isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable and _elementwise(target):
        return from_schema(target)
    raise LookupError(f"no sample for {name_of(target)}: add one in tests/rules/samples.py")


def _elementwise(target: Any) -> bool:
    from autopar.rules import rule_for
    from autopar.rules.pointwise import broadcast

    return rule_for(target) is broadcast


def name_of(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


def tagged_pointwise() -> list[Any]:
    """Every functional operator of aten that torch tags as pointwise."""
    found = []
    for name in dir(aten):
        packet = getattr(aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            for overload in (getattr(packet, name) for name in packet.overloads()):
                results = any(argument.is_out for argument in overload._schema.arguments)
                number = torch.Tag.data_dependent_output in overload.tags  # aten.equal gives a bool, not a tensor
                if torch.Tag.pointwise in overload.tags and not overload._schema.is_mutable and not results | number:
                    found.append(overload)
    return found
