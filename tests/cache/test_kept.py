"""A program out of the cache is the one that was put in, whatever one asks of it; what cannot be kept is refused."""

from __future__ import annotations

import pickle
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import autopar
from autopar import Mesh, Plan
from autopar.cache.packing import packed, unpacked
from autopar.compiler import compile_program
from autopar.ir.guards import Guards
from autopar.ir.node import origin, values
from autopar.ir.program import AnyProgram
from autopar.zoo.named import named_model
from tests.cache.launches import Launch, Launches, launched, said, some_of, text_of
from tests.cache.test_changed_code import model

CASES = {
    "mlp, zero": ("mlp", Mesh(dp=2, tp=2), Plan(zero=3)),
    "a tied weight": ("gpt", Mesh(tp=2), Plan()),
    "pipeline": ("mlp", Mesh(pp=2, dp=2), Plan(microbatches=2)),
    "a tail": ("gpt", Mesh(pp=2), Plan(microbatches=5, schedule="zb-h1")),
    "statistics": ("cnn", Mesh(dp=2), Plan()),
    "experts": ("moe", Mesh(ep=2), Plan(record_load=True)),
    "a sequence in parts": ("llama", Mesh(sp=2), Plan()),
    "of transformers": ("hf:llama", Mesh(dp=2, tp=2), Plan()),
    "it sets its own config": ("hf:bert", Mesh(dp=2), Plan(recompute="full")),
    "experts of transformers": ("hf:mixtral", Mesh(dp=2, ep=2), Plan()),
    "encoder and decoder": ("hf:t5", Mesh(pp=2, dp=2), Plan(microbatches=2)),
    "one rank": ("bert", Mesh(dp=1), Plan()),
    "precision": ("gpt", Mesh(dp=2, tp=2), Plan(precision=autopar.Precision(param="bf16", reduce="fp32"))),
    "recurrent": ("lstm", Mesh(dp=2), Plan()),
}
QUICK = ("pipeline",)


def differs(one: Any, other: Any, where: str = "") -> str:
    """Where two programs, or parts of them, are not the same; empty if they are."""
    if isinstance(one, fx.Graph) and isinstance(other, fx.Graph):
        one, other = list(map(facts_of_node, one.nodes)), list(map(facts_of_node, other.nodes))
    if type(one) is not type(other):
        return f"{where}: {type(one)} and {type(other)}"
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
        return "" if same else where
    if is_dataclass(one) and not isinstance(one, type):
        names = [entry.name for entry in fields(one) if entry.name != "of_rows"]
        return first(differs(getattr(one, name), getattr(other, name), f"{where}.{name}") for name in names)
    if isinstance(one, Mapping):
        if list(one) != list(other):
            return f"{where}: other keys"
        return first(differs(one[key], other[key], f"{where}[{key}]") for key in one)
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)}"
        return first(differs(a, b, f"{where}[{number}]") for number, (a, b) in enumerate(zip(one, other)))
    return "" if one == other else f"{where}: {one} and {other}"


def first(found: Any) -> str:
    return next(filter(None, found), "")


def facts_of_node(node: fx.Node) -> Any:
    users = [user.name for user in node.users]
    return (
        node.name, node.op, node.target, repr(node.args), repr(node.kwargs), node.type, users, values(node),
        origin(node), sorted(vars(node)),
    )  # fmt: skip


def labels(guards: Guards) -> dict[str, list[str]]:
    return {
        "readings": sorted(f"{one.label} {one.by_type}" for one in guards.readings),
        "absent": sorted(label for *_, label in guards.absent),
        "quiet": sorted(label for _, label in guards.quiet),
        "contents": sorted(f"{one.label} {len(one.items)}" for one in guards.contents),
        "written": sorted(label for *_, label in guards.written),
        "effects": sorted(f"{key}={value!r}" for _, key, value in guards.effects),
        "values": [str(one.looks) for one in guards.values],
    }


def twice(name: str, mesh: Mesh, plan: Plan) -> tuple[AnyProgram, Launch, Launch]:
    """What the compiler gave, and what two launches have of it."""
    found, made = [], list[AnyProgram]()

    def compiler(*call: Any) -> AnyProgram:
        made.append(compile_program(*call))
        return made[-1]

    for _ in range(2):
        example = named_model(name)
        found.append(launched(example.model, mesh=mesh, plan=plan, kwargs=example.batch, compiler=compiler))
    return made[0], found[0], found[1]


@pytest.mark.parametrize("case", some_of(QUICK, CASES))
def test_it_is_the_same_program(case: str, cache_folder: Path, tmp_path: Path) -> None:
    with said() as messages:
        made, kept, found = twice(*CASES[case])
    assert (kept.compiled, found.compiled) == (1, 0), messages
    assert differs(made, kept.program) == "" and differs(made, found.program) == ""
    assert labels(kept.guards) == labels(found.guards)
    assert found.guards.hold()
    one, other = made, found.program
    assert text_of(one) == text_of(other) and one.memory() == other.memory()
    ranks = range(one.mesh.world_size)
    assert [one.rank(rank).code for rank in ranks] == [other.rank(rank).code for rank in ranks]
    names = [entry.target for entry in one.inputs]
    assert [one.explain(name) for name in names[:3]] == [other.explain(name) for name in names[:3]]
    for number, program in enumerate((one, other)):
        program.save(tmp_path / str(number))
    written = [{path.name: path.read_bytes() for path in (tmp_path / number).iterdir()} for number in "01"]
    assert written[0] == written[1]


def test_plans_keep_what_differs_between_stages_and_take_the_rest_from_the_reader() -> None:
    plan = Plan(seed=1, zero=1, tensor={"a.*": "column"})
    parts = [plan, Plan(seed=1, zero=1, tensor={"a.*": "column"}, microbatches=3)]
    first_part, second = unpacked(packed(parts, plan), Plan(seed=5, zero=1, tensor={"a.*": "column"}))
    assert first_part.seed == second.seed == 5
    assert (first_part.microbatches, second.microbatches) == (1, 3)


def test_tensors_keep_their_strides() -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    for tensor in (
        whole,
        whole.transpose(0, 2),
        whole[:, 1:, ::2],
        whole[:1].expand(5, 3, 4),
        torch.tensor(3),
        whole[:0],
    ):
        (back,) = unpacked(packed([tensor], Plan()), Plan())
        assert back.stride() == tensor.stride() and torch.equal(back, tensor) and back.dtype == tensor.dtype


class Evil:
    def __reduce__(self) -> Any:
        return eval, ("1",)


def test_bytes_find_nothing_but_programs() -> None:
    with pytest.raises(pickle.UnpicklingError, match="builtins.eval is no part of a program"):
        unpacked(zlib.compress(pickle.dumps(Evil())), Plan())


# ---------------------------------------------------------------- what forward leaves, and looks at


def test_what_forward_leaves_is_left(launches: Launches) -> None:
    body = "self.calls = 'some'\nself.seen = x"
    launches.write(**{"model_file.py": model(body)})
    kept, found = launches.launch(), launches.launch()
    assert (kept.compiled, found.compiled) == (1, 0)
    for launch in (kept, found):
        launch.guards.replay()
    assert found.model.calls == "some" and repr(found.model.seen) == repr(kept.model.seen)


CACHED = """if self.table is None:
    self.table = torch.arange(4.0) * settings.SHIFT
x = x + self.table"""


def test_what_forward_makes_once_is_made(launches: Launches) -> None:
    launches.write(**{"model_file.py": model(CACHED, init="self.table = None")})
    kept, found = launches.launch(), launches.launch()
    assert (kept.compiled, found.compiled) == (1, 0)
    assert torch.equal(found.model.table, kept.model.table)
    launches.edit("settings.py", "1.5", "2.5")
    changed = launches.launch()
    assert changed.compiled == 1 and changed.model.table[1] == 2.5


@pytest.mark.slow
def test_what_was_made_goes_where_the_rest_differs(launches: Launches) -> None:
    launches.write(**{"model_file.py": model(CACHED + "\nx = x * OTHER", head="OTHER = 2", init="self.table = None")})
    launches.launch()
    with launches.imported() as module:
        net = module.build()
        module.OTHER = 3
        found = launched(net)
    assert found.compiled == 1 and net.table is not None


@pytest.mark.slow
def test_a_branch_on_values_is_that_of_the_batch(launches: Launches) -> None:
    script = model("if (given > 2).any():\n    x = x * 2").replace("x = self.up(x)", "given, x = x, self.up(x)")
    launches.write(**{"model_file.py": script})
    small, large = torch.ones(4, 4), torch.full((4, 4), 3.0)
    assert [launches.launch(batch).compiled for batch in (small, large, small, large)] == [1, 1, 0, 0]
    assert launches.launch(small).text != launches.launch(large).text


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "the number of the process": ("import os\nx = x + (os.getpid() > 0)", "uses .*getpid"),
    "the rank": ("x = x + (torch.distributed.is_initialized() and torch.distributed.get_rank())", "get_rank"),
    "a file": ("open(settings.__file__).close()", "open"),
    "an address": ("x = x + (id(self) > 0)", "uses builtins.id"),
    "the arguments of the process": ("import sys\nx = x + len(sys.argv)", "sys.argv"),
    "all attributes": ("x = x + len(vars(self))", "vars"),
    "a name of the machine": ("import platform as other\nx = x + len(other.node())", "platform.node"),
    "threads": ("x = x + torch.get_num_threads()", "get_num_threads"),
    "code that was generated": ("exec('pass')", "exec"),
    "an object in C": ("import random\nx = x + (self.random is None)", "random.Random|other random numbers"),
    "all variables of the environment": ("x = x + len(dict(os.environ))", "all environment variables"),
}


@pytest.mark.parametrize("name", some_of(("the rank",), REFUSED))
def test_what_differs_between_processes_is_not_kept(name: str, launches: Launches) -> None:
    body, words = REFUSED[name]
    init = "import random\nself.random = random.Random(0)" if name == "an object in C" else ""
    launches.write(**{"model_file.py": model(body, init=init)})
    with said() as messages:
        assert [launches.launch().compiled for _ in range(2)] == [1, 1]
    assert any(message.startswith("not kept in the cache") for message in messages)
    assert re.search(words, " ".join(messages)), messages


VARIABLES: dict[str, Callable[[], str]] = {
    "in forward": lambda: model("x = x * float(os.environ.get('MY_SCALE', '1'))"),
    "by getenv": lambda: model("x = x * float(os.getenv('SCALE', '1'))"),
    "before, and remembered": lambda: model(
        "x = x * scale()",
        head="@functools.cache\ndef scale():\n    return float(os.environ.get('MY_SCALE', '1'))\nscale()",
    ),
}


@pytest.mark.parametrize("name", some_of(("before, and remembered",), VARIABLES))
def test_variables_of_the_environment(name: str, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    launches.write(**{"model_file.py": VARIABLES[name]()})
    assert launches.launch().compiled == 1
    monkeypatch.setenv("UNREAD", "2")
    assert launches.launch().compiled == 0
    for variable in ("MY_SCALE", "SCALE"):
        monkeypatch.setenv(variable, "2")
    assert launches.launch().compiled == 1


def test_notes_are_given_again(launches: Launches) -> None:
    body = "from torch.utils.checkpoint import checkpoint\nx = checkpoint(torch.relu, x, use_reentrant=False)"
    launches.write(**{"model_file.py": model(body)})
    heard = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            launches.launch()
        heard.append([str(one.message) for one in caught if "checkpoint" in str(one.message)])
    assert heard[0] == heard[1] != []
