"""What comes out of the cache is run by the Python that was written before; its graphs are read where one looks."""

from __future__ import annotations

import gc
import marshal
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import autopar
from autopar import Mesh, Plan
from autopar.cache import compiled
from autopar.cache.kept_program import KeptProgram
from autopar.codegen.python import emit
from autopar.compiler import compile_program
from autopar.ir.collectives import axes_used
from autopar.ir.program import AnyProgram, PipelinedProgram, text_digest
from autopar.ir.stored_graph import shelf_of
from autopar.runtime.execute_pipeline import open_groups
from autopar.runtime.rank_code import RankCode
from autopar.runtime.rank_graphs import INFERENCE
from autopar.runtime.written_code import WrittenCode, axes_of, code_of_model, code_of_stage, written
from autopar.zoo.named import named_model
from tests.cache.launches import some_of
from tests.cache.test_kept import CASES


def kept_of(program: AnyProgram, plan: Plan) -> AnyProgram:
    return KeptProgram.of(program, plan, written).read(plan, may_run=True)


def codes(program: AnyProgram) -> list[RankCode]:
    if not isinstance(program, PipelinedProgram):
        return [code_of_model(program)]
    wholes = [program, program.tail] if program.tail is not None else [program]
    return [code_of_stage(stage, whole.loss_in(stage)) for whole in wholes for stage in whole.stages]


@pytest.mark.parametrize("case", some_of(("pipeline", "mlp, zero"), CASES))
def test_the_python_is_that_of_the_graphs(case: str) -> None:
    name, mesh, plan = CASES[case]
    example = named_model(name)
    program = compile_program(example.model, mesh, plan, (), example.batch)
    found = kept_of(program, plan)
    assert text_digest(found) == text_digest(program) and axes_of(found) == axes_of(program)
    for ours, fresh in zip(codes(found), codes(program), strict=True):
        assert isinstance(ours, WrittenCode) and not isinstance(fresh, WrittenCode)
        assert (ours.axes, ours.gradients) == (fresh.axes, fresh.gradients)
        assert ours.axes_of_inference == fresh.axes_of_inference
        assert list(ours.graphs.usual) == list(fresh.graphs.usual) and list(ours.graphs.rare) == list(fresh.graphs.rare)
        for name in (*fresh.graphs.usual, *fresh.graphs.rare):
            assert list(ours.passed_on(name)) == list(fresh.passed_on(name))
            assert ours.function(name).__code__ == fresh.function(name).__code__
            assert emit({name: ours.graph(name)}, ours.program) == emit({name: fresh.graph(name)}, fresh.program)
    assert str(found) == str(program)


def test_a_step_reads_no_graph(cache_folder: Path) -> None:
    losses, modules = [], []
    for _ in range(2):
        example = named_model("gpt")
        module = autopar.parallelize(example.model, Mesh(dp=1))
        loss = module(**example.batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        modules.append(module)
    assert losses[0] == losses[1]
    for module in modules:
        assert shelf_of(module.program.graph) is not None
    assert "linear" in str(module.program) and shelf_of(module.program.graph) is None
    again = module(**example.batch)["loss"]
    assert again.item() == losses[0]


def nodes() -> int:
    gc.collect()
    return sum(isinstance(one, fx.Node) for one in gc.get_objects())


def test_no_nodes_stay_in_the_process(cache_folder: Path) -> None:
    """Neither of the program, which is bytes again once it is compiled, nor of what the compiler made on the way."""
    modules = []
    step("mlp")  # what torch keeps of a first trace
    for name in ("gpt", "gpt"):
        before, example = nodes(), named_model(name)
        modules.append(autopar.parallelize(example.model, Mesh(dp=1)))
        modules[-1](**example.batch)["loss"].backward()
        del example
        assert nodes() - before < 5  # those of torch's own
    assert len(list(modules[0].program.graph.nodes)) > 5


def test_a_graph_that_was_looked_into_is_written_anew() -> None:
    """Whoever looks may have changed it."""
    example = named_model("mlp")
    found = kept_of(compile_program(example.model, Mesh(), Plan(), (), example.batch), Plan())
    next(iter(found.graph.nodes))
    (code,) = codes(found)
    assert type(code) is RankCode
    other = replace(found, plan=Plan(compile="inductor"))
    assert other.plan.compile == "inductor" and type(code_of_model(found)) is RankCode


# ---------------------------------------------------------------- whose Python it is


def entry(folder: Path) -> Path:
    (found,) = folder.glob("*.program")
    return found


class Run(Exception):
    """Somebody else's code was run."""


def harm() -> bytes:
    """A table of code in which every module does harm when it is made."""
    source = "raise __import__('tests.cache.test_kept_program').cache.test_kept_program.Run"
    code = compile(source, "<harm>", "exec")
    table = {"functions": {"forward": (source, code)}, "rare": [], "gathered": {}, "gathers": b"", "gradients": None}
    table |= {"passed on": {}, "axes": [], "axes of inference": []}
    return zlib.compress(marshal.dumps({f"{main} {forward}": table for main in range(9) for forward in range(9)}))


def with_code(path: Path, code: bytes) -> list[bytes]:
    folder = compiled.Folder(path.parent, 1 << 30)
    parts = folder.read(path)
    assert parts is not None
    return [*parts[:-1], code]


def step(name: str = "mlp") -> float:
    example = named_model(name)
    found: torch.Tensor = autopar.parallelize(example.model, Mesh(dp=1))(**example.batch)["loss"]
    return found.item()


@pytest.mark.parametrize("who", ["nobody", "the file", "the folder"])
def test_python_that_others_may_have_written_is_not_run(who: str, cache_folder: Path) -> None:
    loss = step()
    path = entry(cache_folder)
    compiled.Folder(cache_folder, 1 << 30).write(path.stem, *with_code(path, harm()))
    if who == "nobody":
        with pytest.raises(Run):
            step()
        return
    (path if who == "the file" else cache_folder).chmod(0o666 if who == "the file" else 0o777)
    assert step() == loss


def test_python_from_another_machine_is_not_run(cache_folder: Path, tmp_path: Path) -> None:
    loss = step()
    path = entry(cache_folder)
    parts = [path.stem.encode(), *with_code(path, harm())]
    path.unlink()

    class Given(compiled.Delivery):
        def taken(self, longest: float) -> list[bytes]:
            return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "Delivery", Given)
        patch.setattr(compiled, "compile_program", None)
        assert step() == loss
    assert step() == loss and entry(cache_folder).stem == path.stem


def test_groups_of_all_stages_are_opened() -> None:
    """Also on ranks whose own stage communicates over fewer axes."""
    example = named_model("mlp")
    program = compile_program(example.model, Mesh(pp=2, dp=2), Plan(microbatches=2), (), example.batch)
    opened: list[list[str]] = []

    class Opens:
        def open(self, axes: list[str]) -> None:
            opened.append(axes)

    fake: Any = Opens()
    open_groups(program, fake)
    open_groups(kept_of(program, program.plan), fake)
    graphs = [graph for stage in program.stages for graph in stage.graphs.values()]
    assert opened[0] == opened[1] == axes_used(graphs) != [] and INFERENCE in program.stages[0].graphs
