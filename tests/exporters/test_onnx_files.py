"""What is in ONNX files: names, versions, messages, references into other files, dialects; and the command."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.__main__ import main
from autopar.compiler import compile_program
from autopar.errors import ExportError
from autopar.exporters.export import export
from autopar.exporters.job import Job
from autopar.exporters.whole_tensors import WholeTensors

onnx = pytest.importorskip("onnx")
onnx_ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from autopar.exporters import onnx_file  # noqa: E402
from autopar.exporters.collective_schemas import DOMAIN, SCHEMAS, register  # noqa: E402
from autopar.exporters.onnx_check import check_files  # noqa: E402
from autopar.exporters.onnx_dialects import to_tensorrt  # noqa: E402
from autopar.exporters.onnx_rank import attributes, set_attributes  # noqa: E402
from autopar.exporters.verify import verify  # noqa: E402
from tests.exporters.small_network import ALLOWED, network, written  # noqa: E402


def test_names_versions_and_shapes(tmp_path: Path) -> None:
    program, model = network(Mesh(tp=2), source=True)
    export(program, tmp_path / "out", "onnx", weights_from=model, opset=21, ir=9)
    folder = tmp_path / "out" / "onnx"
    assert sorted(path.name for path in folder.iterdir()) == [
        "logical.onnx", "rank0.onnx", "rank0.safetensors", "rank1.onnx", "rank1.safetensors",
    ]  # fmt: skip
    found = onnx.load(folder / "rank1.onnx")
    assert found.ir_version == 9 and {entry.domain: entry.version for entry in found.opset_import}[""] == 21
    assert [entry.name for entry in found.graph.input] == ["ids", "labels"]
    assert [entry.name for entry in found.graph.output] == ["loss", "logits"]
    values = {entry.name: onnx.numpy_helper.to_array(entry) for entry in found.graph.initializer}
    assert (values["up.weight"] == model.up.weight[16:].detach().numpy()).all()  # type: ignore[union-attr, index]
    assert model.state_dict().keys() <= values.keys()
    names = [name for node in found.graph.node for name in (node.name, *node.output)]
    assert max(Counter(names).values()) == 1


def test_without_weights_state_stands_among_the_inputs(tmp_path: Path) -> None:
    program, model = network(Mesh(tp=2))
    export(program, tmp_path / "out", "onnx", verify=True)
    found = onnx.load(tmp_path / "out" / "onnx" / "rank1.onnx")
    assert {entry.name for entry in found.graph.input} == {"ids", "labels", *model.state_dict()}


class Repeats(nn.Module):
    """One value is two outputs, and one an input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.up(x)
        return {"first": y, "second": y, "third": x}


def test_outputs_that_are_one_value_have_their_own_names(tmp_path: Path) -> None:
    model = Repeats()
    program = compile_program(model, Mesh(tp=2), Plan(check_numerics=False), (torch.randn(2, 4),))
    assert verify(*written(program, model, tmp_path)).errors.keys() == {"first", "second", "third"}


def test_stages_send_and_receive(tmp_path: Path) -> None:
    program, model = network(Mesh(pp=2, tp=2), Plan(check_numerics=False, microbatches=1))
    job, found = written(program, model, tmp_path)
    assert verify(job, found).worst <= ALLOWED
    messages = [
        (path.stem, node.op_type, attributes(node)["group"])
        for path in sorted(tmp_path.glob("*.onnx"))
        for node in onnx.load(path, load_external_data=False).graph.node
        if node.op_type in ("Send", "Recv")
    ]
    assert ("rank1-stage0", "Send", [1, 3]) in messages and ("rank3-stage1", "Recv", [1, 3]) in messages


def test_the_checks_read_what_was_written(tmp_path: Path) -> None:
    """A collective whose group is another one is refused."""
    job, _ = written(*network(Mesh(tp=2)), tmp_path)
    files = ["rank0.onnx", "rank1.onnx"]
    check_files(tmp_path, files, whole=True)
    model = onnx.load(tmp_path / "rank1.onnx", load_external_data=False)
    set_attributes(next(node for node in model.graph.node if node.domain == DOMAIN), group=[1, 0])
    onnx.save(model, tmp_path / "rank1.onnx")
    with pytest.raises(ExportError, match="take part"):
        check_files(tmp_path, files, whole=True)


def test_shapes_of_collectives() -> None:
    register()
    members = {"group": [0, 1, 2], "group_name": "tp", "collective_id": 0}
    given = {
        "AllGather": {"axis": 1},
        "ReduceScatter": {"axis": 1, "reduce_op": "sum"},
        "AllReduce": {"reduce_op": "max"},
    }
    given |= {"Broadcast": {"root": 0}, "AllToAll": {}, "Recv": {"dtype": 1, "shape": [2, 6]}}
    expected = {"AllGather": [2, 18], "ReduceScatter": [2, 2]}
    assert given.keys() | {"Send"} == SCHEMAS.keys()
    for operator, more in given.items():
        inputs = [] if operator == "Recv" else ["x"]
        node = onnx.helper.make_node(operator, inputs, ["y"], domain=DOMAIN, **members, **more)
        x = onnx.helper.make_tensor_value_info("x", 1, [2, 6])
        graph = onnx.helper.make_graph([node], "g", [x], [onnx.helper.make_empty_tensor_value_info("y")])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(DOMAIN, 1)])
        (y,) = onnx.shape_inference.infer_shapes(model).graph.output
        assert [dim.dim_value for dim in y.type.tensor_type.shape.dim] == expected.get(operator, [2, 6]), operator


def test_references_into_files(tmp_path: Path) -> None:
    """The bytes at a reference, cut by its slices, are the part that a rank's own file would have."""
    program, model = network(Mesh(dp=2, tp=2))
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), weights)
    export(program, tmp_path / "a", "pt2", weights="reference", weights_from=weights)
    export(program, tmp_path / "b", "onnx", weights_from=weights)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    part = manifest["formats"]["pt2"]["parts"][3]
    assert part["weights"].keys() == model.state_dict().keys()
    own = safetensors.torch.load_file(tmp_path / "b" / "onnx" / "rank3.safetensors")
    for name, entry in part["weights"].items():
        content = Path(entry["file"]).read_bytes()[entry["offset"] : entry["offset"] + entry["bytes"]]
        whole = torch.frombuffer(bytearray(content), dtype=getattr(torch, entry["dtype"]))
        whole = whole.view(model.state_dict()[entry["tensor"]].shape)
        for dim, ranges in entry["slices"].items():
            rows = [row for first, stop in ranges for row in range(first, stop)]
            whole = whole.index_select(int(dim), torch.tensor(rows))
        assert torch.equal(whole, own[name]), name
    del manifest, own
    with pytest.raises(ExportError, match="is in no safetensors file"):
        export(program, tmp_path / "c", "onnx", weights="reference", weights_from=model)


def test_several_sources_of_weights(tmp_path: Path) -> None:
    """The first that has a name is taken, whatever kind of source it is."""
    first, second = {"a": torch.zeros(2)}, {"a": torch.ones(2), "b": torch.ones(2)}
    safetensors.torch.save_file(first, tmp_path / "first.safetensors")
    safetensors.torch.save_file(second, tmp_path / "second.safetensors")
    for one in (first, tmp_path / "first.safetensors"):
        for other in (second, tmp_path / "second.safetensors"):
            found = WholeTensors.of([one, other])  # type: ignore[list-item]
            assert float(found.find(["a"], (2,)).sum()) == 0 and float(found.find(["b"], (2,)).sum()) == 2
            assert (found.in_file(["a"]) is None) == isinstance(one, dict)
    with pytest.raises(ExportError, match="not persistent"):
        found.find(["c"], (2,))


def test_the_dialect_of_tensorrt(tmp_path: Path) -> None:
    program, model = network(Mesh(tp=2))
    export(program, tmp_path / "out", "onnx", weights_from=model, onnx_dialect="tensorrt")
    found = onnx.load(tmp_path / "out" / "onnx" / "rank1.onnx", load_external_data=False)
    nodes = [attributes(node) for node in found.graph.node if node.op_type == "DistCollective"]
    assert all(not node.domain for node in found.graph.node) and nodes
    for given in nodes:
        assert given["collective_operation"] == "all_reduce" and given["reduce_op"] in ("sum", "max")
        assert given["groups"] == [0, 1] and given["nb_rank"] == given["group_size"] == 2 and given["root"] == -1


def test_unequal_parts_have_no_form_in_tensorrt(tmp_path: Path) -> None:
    node = onnx.helper.make_node(
        "AllToAll", ["x", "send", "receive"], ["y"], domain=DOMAIN, group=[0, 1], group_name="ep", collective_id=0
    )
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(ExportError, match="unequal parts"):
        to_tensorrt(model, "rank0.onnx")


def test_the_logical_model_says_what_lies_where(tmp_path: Path) -> None:
    program, model = network(Mesh(dp=2, tp=2), source=True)
    export(program, tmp_path / "out", "onnx", weights_from=model)
    found = onnx.load(tmp_path / "out" / "onnx" / "logical.onnx")
    (configuration,) = found.configuration
    assert found.ir_version >= 11 and list(configuration.device) == ["rank0", "rank1", "rank2", "rank3"]
    assert not {node.domain for node in found.graph.node} & {DOMAIN}
    specs = {
        spec.tensor_name: spec
        for node in found.graph.node
        for entry in node.device_configurations
        for spec in entry.sharding_spec
    }
    up, down = specs["up.weight"], specs["down.weight"]
    assert [(dim.axis, dim.simple_sharding[0].num_shards) for dim in up.sharded_dim] == [(0, 2)]
    assert [(dim.axis, dim.simple_sharding[0].dim_value) for dim in down.sharded_dim] == [(1, 32)]
    assert [list(group.value) for group in up.index_to_device_group_map] == [[0, 2], [1, 3]]
    assert "down.bias" not in specs  # whole on all ranks
    assert onnx_ir.load(tmp_path / "out" / "onnx" / "rank0.onnx").graph.num_nodes() > 0


def test_a_model_that_torch_cannot_write_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks are exported all the same, and the manifest says why there is no unsplit model."""

    def fails(job: Job) -> None:
        raise ExportError("no logical.onnx: grouped products")

    monkeypatch.setattr(onnx_file, "write_logical", fails)
    program, model = network(Mesh(tp=2), source=True)
    with pytest.warns(UserWarning, match="grouped products"):
        export(program, tmp_path / "out", "onnx", weights_from=model)
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["formats"]["onnx"]
    assert "grouped products" in found["no_logical"] and "logical" not in found


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model by name, then of a program on disk with weights beside it."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["autopar", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    small = ("mlp", "--mesh", "tp=2")
    out = run("export", *small, "--format", "onnx,pt2", "--verify", "-o", str(tmp_path / "a"))
    assert "onnx/rank1.onnx" in out and "pt2/rank0.pt2" in out
    run("compile", *small, "-o", str(tmp_path / "program"))
    out = run(
        "export", str(tmp_path / "program"), "--format", "onnx", "--rank", "1", "-o", str(tmp_path / "b"), "--json"
    )
    assert {"manifest.json", "onnx/rank1.onnx"} <= json.loads(out)["files"].keys()


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    program, model = network(Mesh(tp=2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all of it")
    for words, given in (
        ("there is no format 'onxn'\nWay out: one of", {"format": "onxn"}),
        ("holds no export", {"directory": tmp_path / "full"}),
        ("a program holds no weights", {"weights": "safetensors"}),
        ("is no choice\nWay out: one of safetensors", {"weights": "some", "weights_from": model}),
        ("opset 3", {"opset": 3}),
        ("ir 99", {"ir": 99}),
        ("leave out --rank", {"rank": 0, "verify": True}),
    ):
        arguments = {"directory": tmp_path / "new", "format": "onnx", **given}
        with pytest.raises((ExportError, ValueError), match=words):
            export(program, **arguments)  # type: ignore[arg-type]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_an_export_is_replaced_and_files_of_others_stay(tmp_path: Path) -> None:
    program, model = network(Mesh(tp=2))
    target = tmp_path / "out"
    for formats in ("pt2", "chakra"):
        export(program, target, formats, weights_from=model)
    assert sorted(path.name for path in target.iterdir()) == ["chakra", "manifest.json"]
    notes = target / "chakra" / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(ExportError, match="not of the export there: chakra/notes.txt"):
        export(program, target, "pt2", weights_from=model)
    assert notes.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a file"):
        export(program, tmp_path / "file", "pt2", weights_from=model)
