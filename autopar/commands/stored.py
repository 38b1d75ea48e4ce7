"""``autopar show DIR``: the program, or the family of programs, that a directory holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.commands.batch_sizes import sizes_json, sizes_text
from autopar.commands.tables import held_json, held_table, print_json, stdout, traffic_json, traffic_table
from autopar.mesh import Mesh

if TYPE_CHECKING:  # which import torch
    from autopar.families.family import Family
    from autopar.ir.program import AnyProgram

    Text = Callable[[AnyProgram, AnyProgram], str]  # of the program as it was split, and as a whole


def is_stored(name: str) -> bool:
    """Whether ``name`` is the directory of a program, not that of a model."""
    from autopar.zoo.hub_configs import is_folder

    return Path(name).is_dir() and not is_folder(name)


def load_either(directory: str) -> AnyProgram | Family:
    """What is in ``directory``. Raises ProgramFileError."""
    from autopar.program_files.family_file import holds_family, load_family
    from autopar.program_files.program_file import load

    return load_family(directory) if holds_family(directory) else load(directory)


def mesh_of(program: AnyProgram | Family) -> Mesh:
    template: Any = getattr(program, "template", program)
    found: Mesh = template.mesh
    return found


@dataclass(frozen=True)
class Shown:
    """What ``autopar show`` prints of a directory.

    Attributes:
        program: the program; of a family the one with expressions for sizes.
        first: the program; of a family that of its first sizes, which has numbers.
        family: None for a program of one size.
    """

    program: AnyProgram
    first: AnyProgram
    family: Family | None

    @classmethod
    def of(cls, directory: str) -> Shown:
        """Raises ProgramFileError."""
        found: Any = load_either(directory)
        if hasattr(found, "template"):
            return cls(found.template, found.first_program, found)
        return cls(found, found, None)

    def print(self, directory: str, text: Text | None, rank: int, as_json: bool) -> None:
        """``text`` of the program, with what a rank holds and sends; without, only tables."""
        from autopar.analysis.footprint import held, sent

        holdings, traffic = held(self.first), sent(self.first, rank)
        if as_json:
            family = {"family": sizes_json(self.family)} if self.family is not None else {}
            own = {"directory": directory, "mesh": dict(self.first.mesh.axes), "passes": list(self.first.passes)}
            more = {"parameters": held_json(holdings), "traffic": traffic_json(traffic)}
            print_json(
                {**own, **family, "text": text(self.program, self.program) if text is not None else None, **more}
            )
            return
        if self.family is not None:
            print(sizes_text(self.family), end="\n\n")
        if text is not None:
            print(text(self.program, self.program), end="\n\n")
        of_first = "" if self.family is None else ", of the first sizes"
        title = f"sent by rank {rank} of {self.first.mesh} in a step{of_first}"
        stdout().print(held_table(holdings), traffic_table(title, traffic), sep="\n")
