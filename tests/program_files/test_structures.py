"""Structures of inputs and outputs as JSON: they come back, and nothing is imported because a file names it."""

from __future__ import annotations

import collections
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from autopar.ir.parse import parse
from autopar.program_files.program_file import load, save
from autopar.program_files.structures import structure_from_json, structure_to_json
from tests.texts import MLP

Point = collections.namedtuple("Point", "x y")


def test_structures_come_back() -> None:
    for tree in ((1, [2]), {"a": 1, "b": {}}, 3, collections.OrderedDict(z=1, a=2), (torch.Size([1]), ()), None):
        spec = pytree.tree_structure(tree)
        assert structure_from_json(json.loads(json.dumps(structure_to_json(spec)))) == (spec, [])
    assert structure_from_json(structure_to_json(None)) == (None, [])


def test_a_class_that_is_not_installed() -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    for name in ("transformers.no_such.Output", "mylib.Output", "transformers", "os.path"):
        for context, expected in (('["loss"]', {"loss": 0}), ("null", (0,)), ("{", (0,))):
            found, unknown = structure_from_json([1, {"type": name, "context": context, "children_spec": [leaf]}])
            assert (found, unknown) == (pytree.tree_structure(expected), [name])


def test_structures_import_nothing_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('this was executed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    leaf = {"type": None, "context": None, "children_spec": []}
    factory = {"default_factory_module": "evil_module", "default_factory_name": "x", "dict_context": ["a"]}
    found, _ = structure_from_json(
        [1, {"type": "collections.defaultdict", "context": factory, "children_spec": [leaf]}]
    )
    assert found == pytree.tree_structure({"a": 0})
    structure_from_json([1, {"type": "evil_module.Output", "context": "null", "children_spec": [leaf]}])
    member = json.dumps([{"__enum__": True, "fqn": "evil_module:E", "name": "A"}])
    with pytest.raises(ValueError, match="enumeration members are not supported"):
        structure_from_json([1, {"type": "builtins.dict", "context": member, "children_spec": [leaf]}])


# ---------------------------------------------------------------- output classes


def test_output_classes_of_transformers_come_back(tmp_path: Path) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    spec = pytree.tree_structure(outputs.CausalLMOutputWithPast(loss=torch.ones(1), logits=torch.ones(2)))
    save(replace(parse(MLP), out_spec=spec), tmp_path / "out")
    assert load(tmp_path / "out").out_spec == spec


def test_unknown_classes_become_plain_ones_with_a_note(tmp_path: Path) -> None:
    spec = pytree.tree_structure((Point(1, [2]), collections.defaultdict(int, a=1)))
    save(replace(parse(MLP), out_spec=spec), tmp_path / "out")
    with pytest.warns(UserWarning, match=r"outputs use collections.defaultdict, .*Point, which is not"):
        again = load(tmp_path / "out")
    assert again.out_spec == pytree.tree_structure(({"x": 1, "y": [2]}, {"a": 1}))


def test_transformers_of_the_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Python was started inside a directory that holds a folder of that name."""
    planted = tmp_path / "transformers" / "models" / "llama"
    planted.mkdir(parents=True)
    for folder in (planted, *list(planted.parents)[:2]):
        (folder / "__init__.py").write_text("raise SystemExit('this was executed')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    leaf = {"type": None, "context": None, "children_spec": []}
    tree = {"type": "transformers.models.llama.modeling_llama.Output", "context": "null", "children_spec": [leaf]}
    assert structure_from_json([1, tree])[1] == [tree["type"]]


def test_damaged_structures() -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    deep: dict[str, object] = leaf
    for _ in range(10_000):
        deep = {"type": "builtins.list", "context": "null", "children_spec": [deep]}
    keys = {"type": "builtins.dict", "context": '["a"]', "children_spec": [leaf, leaf]}
    for tree in (deep, keys, {**leaf, "type": [1]}, {**leaf, "type": "builtins.dict"}):
        with pytest.raises(ValueError):
            structure_from_json([1, tree])
