"""The weights of a model on one rank: parameters and buffers under their own names, as DTensors in place of whole ones.

They are whole on every rank until the first program lays them out. Then each rank keeps its part; on a pipeline, the
ranks of a stage keep the tensors that the stage uses. :mod:`autopar.weights.stored` describes how one tensor is stored.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.communication.agreement import digest_of
from autopar.communication.connect import Connection
from autopar.dtensors.dtensor import HELD, local_of, parameter_of
from autopar.errors import InvariantError
from autopar.ir.layout import Layout
from autopar.ir.program import AnyProgram, weight_layouts
from autopar.ir.stacked_parameters import by_member, is_stacked, member_names
from autopar.ir.tables import InputKind
from autopar.mesh import PIPELINE
from autopar.pipeline.stages import first_ranks, held_elsewhere, homes_of
from autopar.weights.absent import Absent, Table, outline
from autopar.weights.identity import Holder, become, give_to_optimizers, mark_gone
from autopar.weights.initial_weights import agree_on_whole, check_copies
from autopar.weights.meshes import Meshes
from autopar.weights.stacks import Stack, stack
from autopar.weights.stored import Stored, cut
from autopar.weights.translation import forget_translation, translate_state

ALONE = "To save on rank 0: state = model.full_state_dict(rank0_only=True) on all ranks, then write it on rank 0."
Flags = tuple[dict[str, bool], dict[str, bool]]


def _skip(key: str, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    state.pop(prefix + key, None)


class Weights:
    """The parameters (and split buffers) of a module tree as DTensors, in place, under their own names.

    ``layouts`` is None until :meth:`lay_out` has been called; until then every rank holds them whole, uncopied.
    Without a ``connection`` (an ordinary module, or a process that was not launched) they stay as they are.

    Attributes:
        absent: the tensors that only other pipeline stages hold.
        first: on a pipeline, parameter or buffer name -> the first pipeline rank that holds it.
        homes: on a pipeline, parameter or buffer name -> the stages that hold it.
        stacks: the parameters that stand for several of the model.
    """

    def __init__(self, root: nn.Module, connection: Connection | None = None, initial: str = "rank0") -> None:
        self.root, self.connection = root, connection
        self.layouts: dict[str, Layout] | None = None
        self.initial = initial
        self.absent: list[Absent] = []
        self.first: dict[str, int] = {}
        self.homes: dict[str, tuple[int, ...]] = {}
        self.stacks: list[Stack] = []
        self._given_back: list[tuple[Table, str, DTensor]] = []
        self._order = {name: place for place, (*_, name) in enumerate(tables(root))}
        self._forms: dict[nn.Module, dict[str, Stored]] = {}  # module -> key in it -> form
        self._trained = [(table, key) for module, table, key, _ in tables(root) if table is module._parameters]
        if connection is None:
            return
        if any(isinstance(table[key], DTensor) for _, table, key, _ in tables(root)):
            raise ValueError(
                "the model has DTensor parameters already\n"
                "Way out: parallelize an ordinary model, and that once; Plan(zero=3) and Mesh(tp=n) do what "
                "fully_shard and parallelize_module do."
            )
        self._meshes = Meshes(connection.of_stage())
        self._place({})
        give_to_optimizers()

    @property
    def is_laid_out(self) -> bool:
        """Whether it is known what part of each tensor this rank holds."""
        return self.connection is None or self.layouts is not None

    def requires_grad(self) -> tuple[bool, ...]:
        """Of each parameter, those of other pipeline stages too."""
        try:
            return tuple([table[key].requires_grad for table, key in self._trained])
        except (KeyError, AttributeError):  # one was taken from the model
            found = [table.get(key) for table, key in self._trained]
            return tuple([tensor is not None and tensor.requires_grad for tensor in found])

    def take_in(self) -> bool:
        """Know the parameters that the model has by now; whether they are others. The next program lays them out."""
        self._hold_again()
        held = [(table, key) for module, table, key, _ in tables(self.root) if table is module._parameters]
        absent = [(missing.table, missing.key) for missing in self.absent]
        known = {(id(table), key) for table, key in self._trained}
        if self.stacks or absent or known == {(id(table), key) for table, key in held}:
            return False
        self._trained = held
        return True

    def flags(self) -> Flags:
        """Whether each parameter requires a gradient: as this rank has it, and as it believes others have it."""
        held = {
            name: tensor.requires_grad for name, tensor in self._named().items() if isinstance(tensor, nn.Parameter)
        }
        return held, {missing.name: missing.outline.requires_grad for missing in self.absent}

    def learn_flags(self, of_ranks: Sequence[Flags]) -> bool:
        """Believe what the stages that hold a parameter say of it; whether that is news to any rank.

        ``of_ranks``: :meth:`flags` of all.
        """
        known = {name: flag for held, _ in of_ranks for name, flag in held.items()}
        news = any(known.get(name, flag) != flag for _, believed in of_ranks for name, flag in believed.items())
        for missing in self.absent:
            if missing.outline.is_floating_point() and missing.name in known:
                missing.outline.requires_grad_(known[missing.name])
        return news

    def lay_out(self, program: AnyProgram) -> None:
        """Keep this rank's part of each tensor, as the first program requires; later programs must require the same.

        A parameter that is a DTensor stays the same object, so an optimizer keeps it. The module loses the tensors that
        only other pipeline stages hold, and an optimizer skips them. Raises InvariantError for a program that requires
        another layout than the present one.
        """
        if self.connection is None:
            return
        layouts, unused = weight_layouts(program), _unused(program)
        if self.layouts is None:
            agree_on_whole(self._named(), self.connection, self.initial)
            self._stack(program)
            self.first = first_ranks(program)
            self.homes = homes_of(program)
            self._leave_out(held_elsewhere(program, self._stage))
            self._place(layouts)
            self.layouts = {name: layout for name, layout in layouts.items() if name not in unused}
        else:
            self._take_in(program, layouts, unused)
        for name, layout in layouts.items():
            held = self.layouts.get(name, layout)
            if layout != held and name not in unused:
                raise InvariantError(
                    f"this call wants parameter '{name}' as {layout}, and it is held as {held} since the first call\n"
                    "Way out: say how it is split, e.g. Plan(tensor={'" + name + "': 'column'})."
                )

    def check_copies(self) -> None:
        """Raise RanksDifferError where ranks hold different numbers as the same part of a tensor; collective."""
        if self.connection is not None:
            check_copies(self._named(), self.layouts or {}, self.connection)

    def _named(self) -> dict[str, Tensor]:
        """The tensors of this rank, each under the first of its names."""
        named: dict[int, tuple[str, Tensor]] = {}
        for _, table, key, name in tables(self.root):
            named.setdefault(id(table[key]), (name, table[key]))
        return dict(named.values())

    @property
    def _stage(self) -> int:
        return self.connection.comm.coordinates.get(PIPELINE, 0) if self.connection is not None else 0

    def _take_in(self, program: AnyProgram, layouts: Mapping[str, Layout], unused: Container[str]) -> None:
        """Hold the parameters that have come into the model since the last program as this one requires them."""
        assert self.connection is not None and self.layouts is not None
        fresh = self._fresh()
        late = set(fresh) | {name for name in layouts if name not in self.layouts and name not in unused}
        if not late:
            return
        agree_on_whole(fresh, self.connection, self.initial)
        kept = {name: layout for name, layout in self.layouts.items() if name not in late}
        self.layouts = {name: layout for name, layout in layouts.items() if name not in unused} | kept
        self.first, self.homes = first_ranks(program) | self.first, homes_of(program) | self.homes
        self._leave_out(held_elsewhere(program, self._stage).intersection(late))
        self._place(layouts, only=late)
        self._trained = self._of_all_stages()

    def _of_all_stages(self) -> list[tuple[Table, str]]:
        """Where parameters are, in the order of the model, which is the same on all ranks; outlines of absent ones."""
        away = {(id(one.table), one.key): {one.key: one.outline} for one in self.absent}
        modules = self.root.named_modules(remove_duplicate=False)
        places = [(module._parameters, key) for _, module in modules for key in module._parameters]
        found = [(away.get((id(table), key), table), key) for table, key in places]
        return [(table, key) for table, key in found if table[key] is not None]

    def _fresh(self) -> dict[str, Tensor]:
        """The parameters that no program has laid out: they have come into the model since the last one."""
        return {
            name: table[key]
            for module, table, key, name in tables(self.root)
            if table is module._parameters and not isinstance(table[key], DTensor)
        }

    @property
    def pinned(self) -> dict[str, Layout] | None:
        """The layouts of tensors that are held by them; None before the first program."""
        if self.layouts is None or self.connection is None:
            return self.layouts
        fresh = self._fresh()
        known = {name: layout for name, layout in self.layouts.items() if name not in fresh}
        holders = {name: vars(tensor).get(HELD) for name, tensor in self._named().items() if name not in self.layouts}
        renamed = {name: holder.form.layout for name, holder in holders.items() if holder is not None}
        return known | {name: layout for name, layout in renamed.items() if layout.axes}

    def _stack(self, program: AnyProgram) -> None:
        """Put one parameter in place of those that the program takes stacked."""
        places = {name: (table, key) for _, table, key, name in tables(self.root)}
        for port, entry in program.takes(InputKind.PARAMETER):
            if is_stacked(entry.target):
                members = [places[name] for name in member_names(entry.target, port.value.shape[0])]
                parameters = [table[key] for table, key in members]
                self.stacks.append(stack(self.root, entry.target, members))
                for parameter in parameters:
                    self._empty(parameter, entry.target)
                    mark_gone(parameter, entry.target)
        replaced = {(id(table), key): one.place for one in self.stacks for table, key in one.members}
        self._trained = [replaced.get((id(table), key), (table, key)) for table, key in self._trained]

    def _leave_out(self, names: Set[str]) -> None:
        outlines: dict[int, Tensor] = {}  # tied tensors stay tied
        for module, table, key, name in list(tables(self.root)):
            if name not in names:
                continue
            tensor, table[key] = table[key], None
            if id(tensor) not in outlines:
                outlines[id(tensor)] = outline(tensor)
                self._empty(tensor, name)
            emptied = tensor if isinstance(tensor, DTensor) else None
            self.absent.append(Absent(table, key, name, outlines[id(tensor)], emptied))
            module.register_load_state_dict_pre_hook(partial(_skip, key))  # type: ignore[no-untyped-call]
        away = {(id(missing.table), missing.key): {missing.key: missing.outline} for missing in self.absent}
        self._trained = [(away.get((id(table), key), table), key) for table, key in self._trained]

    def _empty(self, tensor: Tensor, name: str) -> None:
        """Let a DTensor have no elements, so that an optimizer that still has it holds no memory by it."""
        if isinstance(tensor, DTensor):
            form, own = self._meshes.of(Layout.whole([0]), name)
            held = parameter_of(cut(local_of(tensor).new_empty(0), form, own), tensor.requires_grad)
            torch.utils.swap_tensors(tensor, held)  # type: ignore[no-untyped-call]

    def of_model(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors under the names of the unmodified model, in its order where there are stacks."""
        if not self.stacks:
            return dict(tensors)
        found = by_member(tensors)
        return {name: found[name] for name in sorted(found, key=lambda name: self._order.get(name, len(self._order)))}

    @contextmanager
    def traceable(self) -> Iterator[None]:
        """Ordinary tensors in place of DTensors: the data of those that are whole on this rank, else meta tensors."""
        replaced: list[tuple[Table, str, Tensor | None]] = []
        made: dict[int, Tensor] = {}
        for _, table, key, _ in tables(self.root):
            tensor = table[key]
            if isinstance(tensor, DTensor):
                replaced.append((table, key, tensor))
                if id(tensor) not in made:
                    made[id(tensor)] = _ordinary(tensor)
                table[key] = made[id(tensor)]
        for missing in self.absent:
            replaced.append((missing.table, missing.key, None))
            missing.table[missing.key] = missing.outline
        try:
            with ExitStack() as apart:
                for one in self.stacks:
                    apart.enter_context(one.apart())
                yield
        finally:
            for table, key, held in replaced:
                table[key] = held

    def _hold_again(self) -> None:
        for table, key, held in self._given_back:
            table[key] = held
        self._given_back.clear()

    @contextmanager
    def given_back_on_failure(self) -> Iterator[None]:
        """Put ordinary parameters in place of the DTensors if what is within fails before the first program.

        The user's model then runs as before. They share their memory with the DTensors, which return at the next try.
        """
        self._hold_again()
        try:
            yield
        except BaseException:
            made: dict[int, Tensor] = {}
            for _, table, key, _ in tables(self.root) if self.layouts is None else ():
                held = table[key]
                if isinstance(held, DTensor):
                    self._given_back.append((table, key, held))
                    table[key] = made.setdefault(id(held), _ordinary(held))
            raise

    def _place(self, layouts: Mapping[str, Layout], only: Container[str] | None = None) -> None:
        placed: dict[int, Tensor] = {}
        self._meshes.prefer(layouts.values())
        for module, table, key, name in tables(self.root):
            tensor = table[key]
            if only is not None and name not in only:
                continue
            layout = layouts.get(name, Layout.whole(tensor.shape))
            if not isinstance(tensor, nn.Parameter | DTensor) and not layout.axes:
                if not tensor.is_meta:
                    table[key] = tensor.to(self._meshes.device)  # a whole buffer stays an ordinary tensor
                continue
            form, own = self._meshes.of(layout, name)
            self._forms_of(module)[key] = form
            if id(tensor) not in placed:
                result = _placed(tensor, form, own)
                placed[id(tensor)] = placed[id(result)] = result
            table[key] = placed[id(tensor)]

    def shared_with_copies(self) -> dict[int, Any]:
        """For ``copy.deepcopy``: what a copy of the model has in common with it, by identity."""
        holders = [vars(tensor).get(HELD) for tensor in self._named().values()]
        meshes = [tensor.device_mesh for tensor in self._named().values() if isinstance(tensor, DTensor)]
        return {id(thing): thing for thing in (*holders, *meshes) if thing is not None}

    def copied(self, before: nn.Module, root: nn.Module) -> Weights:
        """These weights for ``root``, a deep copy of the model ``before``."""
        pairs = list(zip(before.modules(), root.modules(), strict=True))
        moved: dict[int, Table] = {id(old._parameters): new._parameters for old, new in pairs}
        moved.update({id(old._buffers): new._buffers for old, new in pairs})
        made = object.__new__(Weights)
        vars(made).update(vars(self), root=root, _forms={})
        made.absent = [replace(one, table=moved[id(one.table)]) for one in self.absent]
        made.stacks = [one.moved(moved) for one in self.stacks]
        made._trained = [(moved.get(id(table), table), key) for table, key in self._trained]
        forms = {id(module): found for module, found in self._forms.items()}
        for old, new in pairs:
            own = forms.get(id(self.root if old is before else old))
            if own is not None:
                made._forms[new] = dict(own)
                forget_translation(new)
                translate_state(new, made._forms[new], made._announce)
        return made

    def _announce(self, what: str) -> None:
        """Let the ranks compare that they do ``what`` now, for which they communicate. Raises RanksDifferError."""
        if self.connection is not None and not self.connection.mesh.is_pipelined:
            agreement = self.connection.comm.agreement
            agreement.start(digest_of(what), lambda: what, f"every rank calls {what}. {ALONE}")
            agreement.settle()

    def _forms_of(self, module: nn.Module) -> dict[str, Stored]:
        if module not in self._forms:
            self._forms[module] = {}
            translate_state(module, self._forms[module], self._announce)
        return self._forms[module]


def tables(root: nn.Module) -> Iterator[tuple[nn.Module, Table, str, str]]:
    """(module, its table, key in the table, full name) of every parameter and buffer, under each of its names."""
    for path, module in root.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield module, table, key, f"{path}.{key}" if path else key


def _unused(program: AnyProgram) -> set[str]:
    """The names of parameters and buffers without which the program does: they stay as they are held."""
    found = program.takes(InputKind.PARAMETER, InputKind.BUFFER)
    return {name for port, entry in found if not port.is_used for name in (entry.target, *entry.aliases)}


def _placed(tensor: Tensor, form: Stored, own: Connection) -> Tensor:
    holder = Holder(form, own)
    before: Holder | None = getattr(tensor, HELD, None)
    if before is not None and before.own is own and before.form == form:
        return tensor  # whole before and now, or under another name in the model
    return become(tensor, holder) if isinstance(tensor, nn.Parameter) else holder.cut(tensor)


def _ordinary(tensor: DTensor) -> Tensor:
    if not all(placement.is_replicate() for placement in tensor.placements):
        return outline(tensor)
    plain = local_of(tensor)
    return nn.Parameter(plain, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain
