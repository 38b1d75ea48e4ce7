"""The embedding look-up when each rank has some of the table's rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.operators.registry import operator


def within(ids: Tensor, total: int, chosen: Tensor, outside: int) -> Tensor:
    """``chosen``; but ``outside`` for ids that are none of ``total``: what is looked up by it then raises."""
    return torch.where((ids >= 0) & (ids < total), chosen, outside)


@operator
def embedding_rows(table: Tensor, ids: Tensor, rank: Tensor, padding_idx: int = -1, total: int = 0) -> Tensor:
    """Rows ``rank * len(table)`` and following of a table: the rows that are here, zeros for the others.

    table (V / n, H), ids (...) of global row numbers, rank int64 scalar; returns (..., H), a summand of the look-up.
    As in ``F.embedding``, no gradient reaches the row ``padding_idx``, and an id outside of the ``total`` rows of the
    whole table is refused on every rank (unless that is 0: unknown, as in older programs). (Shoeybi et al. 2019,
    section 3.)
    """
    rows = table.shape[0]
    local = ids - rank * rows
    here = (local >= 0) & (local < rows)
    places = local.clamp(0, rows - 1)
    found = F.embedding(within(ids, total, places, rows) if total else places, table)
    if padding_idx >= 0:
        found = torch.where((ids == padding_idx).unsqueeze(-1), found.detach(), found)
    return torch.where(here.unsqueeze(-1), found, torch.zeros((), dtype=found.dtype, device=found.device))
