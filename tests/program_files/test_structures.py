"""Structures of inputs and outputs as JSON: they come back, and nothing is imported because a file names it."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from autopar.program_files.structures import structure_from_json, structure_to_json


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
