"""Planted bugs of order: collectives, waits and memory in the code of ranks, messages and schedules of pipelines."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.tables import OutputKind
from autopar.schedules.instructions import Compute, Instruction, Kind, Receive, Send
from tests.proof.planting import Codes, bug, drop, edited, found, line_with, texts, with_list

Lines = list[str]


def _changed(program: Program, function: str, change: Callable[[Lines, int, int], None], *ranks: int) -> Codes:
    return edited(texts(program, list(ranks)), function, change)


def _move(lines: Lines, source: int, behind: int) -> None:
    lines.insert(behind, lines.pop(source))


# ---------------------------------------------------------------- collectives of single ranks


@bug("collectives swapped on one rank", "dp tp")
def gradients_of_one_shape_in_another_order(program: Program) -> Codes:
    """No rank hangs: gate's gradient is added to up's."""

    def swap(lines: Lines, start: int, end: int) -> None:
        one, other = (line_with(lines, start, end, "comm.all_reduce", "f64[12,16]", place=place) for place in (0, 1))
        _move(lines, one, other)

    return _changed(program, "backward", swap, 1)


@bug("collectives swapped on one rank", "dp tp")
def sums_of_other_sizes_in_another_order(program: Program) -> Codes:
    def swap(lines: Lines, start: int, end: int) -> None:
        one = line_with(lines, start, end, "comm.all_reduce", '"dp"', "f64[16,12]")
        other = line_with(lines, start, end, "comm.all_reduce", '"dp"', "f64[12,16]")
        _move(lines, one, other)

    return _changed(program, "backward", swap, 3)


@bug("collectives swapped on one rank", "dp tp")
def operands_of_two_sums_exchanged(program: Program) -> Codes:
    def exchange(lines: Lines, start: int, end: int) -> None:
        one, other = (line_with(lines, start, end, "comm.all_reduce", "f64[12,16]", place=place) for place in (0, 1))
        _move(lines, one, other - 1)
        one = other - 1
        names = [re.search(r"all_reduce\((\w+)", lines[place]).group(1) for place in (one, other)]  # type: ignore[union-attr]
        for place, name, new in ((one, *names), (other, *names[::-1])):
            lines[place] = re.sub(rf"\b{name}\b", new, lines[place])

    return _changed(program, "backward", exchange, 2)


@bug("ranks that wait for each other", "dp tp")
def sums_over_two_axes_in_a_circle(program: Program) -> Codes:
    def swap(lines: Lines, start: int, end: int) -> None:
        first = line_with(lines, start, end, "comm.all_reduce", '"tp"')
        second = line_with(lines, first, end, "comm.all_reduce", '"dp"')
        lines[first:first] = [lines.pop(place) for place in range(second, second - 1, -1)]
        needed = lines[first].split("(")[1].split(",")[0]
        made = line_with(lines, first + 1, end, f" {needed} = ")
        lines[first:first] = [lines.pop(made)]
        _define_before(lines, start, end, first)

    return _changed(program, "backward", swap, 1, 2)


def _define_before(lines: Lines, start: int, end: int, place: int) -> None:
    """Move what the line at ``place`` needs, and what that needs, in front of it."""
    known = set(re.findall(r"\w+", " ".join(lines[start:place])))
    for name in re.findall(r"\b([a-z]\w*)\b", lines[place].partition("=")[2].partition(";")[0]):
        defining = [n for n in range(place + 1, end) if lines[n].lstrip().startswith(f"{name} = ")]
        if name not in known and defining:
            lines.insert(place, lines.pop(defining[0]))
            _define_before(lines, start, end, place)
            return _define_before(lines, start, end, place + 1)
    return None


@bug("ranks that wait for each other", "dp tp")
def sum_that_one_rank_leaves_out(program: Program) -> Codes:
    def leave_out(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "comm.all_reduce", '"dp"')
        lines[place] = re.sub(r"comm\.all_reduce\((\w+), \S+ \"sum\"\)", r"\1", lines[place])

    return _changed(program, "backward", leave_out, 1)


@bug("ranks that wait for each other", "net")
def sum_that_one_rank_does_twice(program: Program) -> Codes:
    def repeat(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "comm.all_reduce", '"dp"', place=-1)
        lines.insert(place, re.sub(r"; del \w+", "", lines[place]))

    return _changed(program, "backward", repeat, 0)


@bug("wrong op", "dp tp")
def largest_on_one_rank(program: Program) -> Codes:
    def other(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "comm.all_reduce", '"sum"')
        lines[place] = lines[place].replace('"sum"', '"max"')

    return _changed(program, "forward", other, 1)


# ---------------------------------------------------------------- waits


@bug("missing wait", "buckets")
def wait_left_out(program: Program) -> Codes:
    def leave_out(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "comm.wait")
        lines[place] = re.sub(r"comm\.wait\((\w+), '[^']*'\)", r"\1", lines[place])

    return edited(texts(program), "backward", leave_out)


@bug("missing wait", "buckets")
def wait_in_the_program_left_out(program: Program) -> None:
    drop(found(program, "backward", "wait")[0])


@bug("missing wait", "buckets")
def read_before_the_wait(program: Program) -> Codes:
    def read(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "comm.wait")
        started = re.search(r"wait\((\w+)", lines[place]).group(1)  # type: ignore[union-attr]
        lines.insert(place, f"    early = aten_neg({started})  # f64[]")

    return edited(texts(program), "forward", read)


@bug("missing wait", "buckets")
def wait_over_another_group(program: Program) -> Codes:
    def other(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "comm.wait")
        lines[place] = lines[place].replace("'dp+sp'", "'dp'")

    return edited(texts(program), "backward", other)


@bug("missing wait", "buckets")
def written_while_it_is_summed(program: Program) -> Codes:
    def write(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "comm.start_all_reduce")
        name = re.search(r"start_all_reduce\((\w+)", lines[place]).group(1)  # type: ignore[union-attr]
        lines[place] = re.sub(rf"; del {name}", "", lines[place])
        lines.insert(place + 1, f"    {name} = aten_mul__Scalar({name}, 0.5)  # f64[]")

    return edited(texts(program), "backward", write)


# ---------------------------------------------------------------- memory


@bug("memory used again too early", "dp tp")
def value_that_is_still_needed(program: Program) -> Codes:
    """``all_reduce * rsqrt`` is written over ``all_reduce``, which the residual path adds later."""

    def write(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "aten_mul_Tensor(all_reduce, rsqrt)")
        lines[place] = lines[place].replace("aten_mul_Tensor", "aten_mul__Tensor")

    return edited(texts(program), "forward", write)


@bug("memory used again too early", "dp tp")
def parameter_that_is_written(program: Program) -> Codes:
    def write(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "aten_mul__Tensor(", "p_norm_weight)")
        lines[place] = re.sub(r"_Tensor\((\w+), (\w+)\)", r"_Tensor(\2, \1)", lines[place])

    return edited(texts(program), "backward", write)


@bug("memory used again too early", "dp tp")
def saved_value_that_is_written(program: Program) -> Codes:
    def write(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "aten_mul_Tensor(", "mul_10)")
        lines[place] = re.sub(r"aten_mul_Tensor\((\w+), (\w+)\)", r"aten_mul__Tensor(\2, \1)", lines[place])

    return edited(texts(program), "backward", write)


@bug("memory used again too early", "dp tp")
def written_before_the_last_read(program: Program) -> Codes:
    def write(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "aten_mul__Tensor(", "p_norm_weight)")
        reader = line_with(lines, start, end, "aten_mul_Tensor(", "mul_10)")
        lines[place] = re.sub(r"; del \w+, ", "; del ", lines[place])
        _move(lines, place, reader)

    return edited(texts(program), "backward", write)


@bug("memory used again too early", "dp tp")
def view_whose_base_is_written(program: Program) -> Codes:
    """A half of the queries is written where the other product reads all of them."""

    def write(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "aten_neg(getitem")
        lines[place] = re.sub(r"aten_neg\((\w+)\)", r"aten_mul__Scalar(\1, -1)", lines[place])
        product = line_with(lines, start, end, "aten_mul_Tensor(transpose, c_cos)")
        dropped = line_with(lines, start, end, "; del transpose")
        lines[dropped] = lines[dropped].replace("; del transpose", "")
        _move(lines, product, place)

    codes = texts(program)
    for rank, code in codes.items():
        codes[rank] = code.replace(
            "aten_mul__Tensor =", "aten_mul__Scalar = torch.ops.aten.mul_.Scalar\naten_mul__Tensor ="
        )
    return edited(codes, "forward", write)


@bug("memory used again too early", "net")
def deleted_too_early(program: Program) -> Codes:
    def delete(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "aten_gelu(")
        name = re.search(r"aten_gelu\((\w+)\)", lines[place]).group(1)  # type: ignore[union-attr]
        lines[place] = lines[place].replace("  # ", f"; del {name}  # ")

    return edited(texts(program), "forward", delete)


# ---------------------------------------------------------------- messages


def _posted_late(steps: list[Instruction]) -> list[Instruction]:
    """Each receive right before the compute that needs it."""
    made: list[Instruction] = []
    waiting = [step for step in steps if isinstance(step, Receive)]
    for step in steps:
        if isinstance(step, Receive):
            continue
        if isinstance(step, Compute):
            kind = Kind.F if step.kind is Kind.F else Kind.B
            needed = [r for r in waiting if (r.kind, r.stage, r.microbatch) == (kind, step.stage, step.microbatch)]
            made += needed
        made.append(step)
    return made


@bug("messages", "pipeline")
def receives_in_another_order(program: PipelinedProgram) -> Any:
    """The first two microbatches are taken for each other."""

    def swap(steps: list[Instruction]) -> list[Instruction]:
        first, second = [n for n, step in enumerate(steps) if isinstance(step, Receive)][:2]
        steps[first], steps[second] = steps[second], steps[first]
        return steps

    return with_list(program, 1, swap)


@bug("messages", "pipeline")
def sends_in_another_order(program: PipelinedProgram) -> Any:
    def swap(steps: list[Instruction]) -> list[Instruction]:
        first, second = [n for n, step in enumerate(steps) if isinstance(step, Send)][:2]
        steps[first], steps[second] = steps[second], steps[first]
        return steps

    return with_list(program, 0, swap)


@bug("messages", "pipeline")
def microbatch_of_another_message(program: PipelinedProgram) -> Any:
    """Microbatch 0 runs twice on the second stage, microbatch 1 never."""

    def change(steps: list[Instruction]) -> list[Instruction]:
        return [Compute(Kind.F, 1, 0) if step == Compute(Kind.F, 1, 1) else step for step in steps]

    return with_list(program, 1, change)


@bug("messages", "pipeline")
def sent_to_another_stage(program: PipelinedProgram) -> Any:
    def change(steps: list[Instruction]) -> list[Instruction]:
        return [Send(Kind.F, 0, 0, 0) if step == Send(Kind.F, 0, 0, 1) else step for step in steps]

    return with_list(program, 0, change)


@bug("messages", "pipeline")
def receive_left_out(program: PipelinedProgram) -> Any:
    def change(steps: list[Instruction]) -> list[Instruction]:
        steps.remove(next(step for step in steps if isinstance(step, Receive)))
        return steps

    return with_list(program, 0, change)


@bug("messages", "pipeline")
def gradient_for_nobody(program: PipelinedProgram) -> Any:
    """The second stage sends no gradients back."""

    def change(steps: list[Instruction]) -> list[Instruction]:
        return [step for step in steps if not isinstance(step, Send)]

    return with_list(program, 1, change)


@bug("messages", "pipeline")
def value_of_another_name(program: PipelinedProgram) -> Any:
    from dataclasses import replace

    first, *rest = program.stages
    outputs = [replace(out, target="1.add") if out.kind is OutputKind.SENT else out for out in first.outputs]
    return replace(program, stages=(replace(first, outputs=tuple(outputs)), *rest))


@bug("schedule that hangs", "pipeline")
def backward_before_forward(program: PipelinedProgram) -> Any:
    def change(steps: list[Instruction]) -> list[Instruction]:
        first = next(n for n, step in enumerate(steps) if isinstance(step, Compute) and step.kind is Kind.B)
        steps.insert(0, steps.pop(first))
        return steps

    return with_list(program, 0, change)


@bug("schedule that hangs", "pipeline")
def all_forwards_awaited_before_a_backward(program: PipelinedProgram) -> Any:
    """Rank 0 waits for a gradient before its last forward, rank 1 for that forward before its first backward."""

    def change(steps: list[Instruction]) -> list[Instruction]:
        forwards = [s for s in steps if isinstance(s, Compute | Receive) and s.kind is Kind.F]
        return [*forwards, *(s for s in steps if s not in forwards)]

    return with_list(program, 1, change)


@bug("schedule that hangs", "pipeline")
def hangs_where_sends_wait(program: PipelinedProgram) -> Any:
    """Each rank posts its receives when it needs them: both stand in a send."""
    for rank in (0, 1):
        program = with_list(program, rank, _posted_late)
    return program


# ---------------------------------------------------------------- the code of single ranks of a pipeline


@bug("collectives swapped on one rank", "pipeline dp")
def sums_of_a_stage_in_another_order(program: PipelinedProgram) -> Codes:
    """Of two gradients of one shape, once all microbatches are done."""

    def swap(lines: Lines, start: int, end: int) -> None:
        sums = [place for place in range(start, end) if "comm.all_reduce(" in lines[place]]
        types = [lines[place].partition("  # ")[2] for place in sums]
        one = next(n for n, kind in enumerate(types) if kind in types[n + 1 :])
        other = types.index(types[one], one + 1)
        _move(lines, sums[one], sums[other])

    return edited(texts(program, [3]), "reduce_gradients", swap)


@bug("ranks that wait for each other", "pipeline dp")
def sum_that_one_rank_of_a_stage_leaves_out(program: PipelinedProgram) -> Codes:
    def leave_out(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "comm.all_reduce", '"dp"')
        lines[place] = re.sub(r"comm\.all_reduce\((\w+), \S+ \"sum\"\)", r"\1", lines[place])

    return edited(texts(program, [2]), "reduce_gradients", leave_out)


@bug("memory used again too early", "pipeline")
def received_value_that_is_written(program: PipelinedProgram) -> Codes:
    def write(lines: Lines, start: int, end: int) -> None:
        place = line_with(lines, start, end, "aten_mul_Tensor(add_6, rsqrt)")
        lines[place] = lines[place].replace("aten_mul_Tensor", "aten_mul__Tensor")

    return edited(texts(program, [2, 3]), "forward", write)


@bug("schedule that hangs", "pipeline")
def schedule_of_one_rank_of_a_stage(program: PipelinedProgram) -> Codes:
    """One of two ranks that sum over tp does the second forward before the first backward."""
    lines = texts(program, [3])[3].splitlines()
    lines.remove("# F1.1")
    lines.insert(lines.index("# B1.0"), "# F1.1")
    return {3: "\n".join(lines) + "\n"}


@bug("schedule that hangs", "pipeline")
def message_that_one_rank_does_not_send(program: PipelinedProgram) -> Codes:
    return {3: texts(program, [3])[3].replace("# SEND B1.1 -> 0\n", "")}
