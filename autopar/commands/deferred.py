"""The commands, each imported when it is called: ``autopar --help`` needs no torch, which takes seconds to import."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# name -> the module in this folder, its function, and the first paragraph of that one's docstring (tested)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "show": (
        "show", "show",
        "Print the program of MODEL on a mesh: the text form, or with --rank what that rank runs.",
    ),
    "mesh": (
        "mesh", "mesh_command",
        "Print the groups of the mesh AXES: ranks that communicate with each other, an axis at a time.",
    ),
    "schedule": (
        "schedule", "schedule_command",
        "Check a pipeline schedule and draw it: F and I and W take one unit of time, B takes two, messages "
        "none.",
    ),
    "check": (
        "check", "check_command",
        "Compare the parallel MODEL with the unmodified one: loss, outputs and every gradient, in float64.",
    ),
    "verify": (
        "verify", "verify_command",
        "Prove that all ranks compute MODEL's loss and gradients and cannot hang: nothing runs on a device.",
    ),
    "coverage": (
        "coverage", "coverage",
        "Build small models of many architectures, parallelise each, simulate it in float64, compare and "
        "measure.",
    ),
    "train": (
        "train", "train_command",
        "Train MODEL over a mesh, on text or on batches of your own; by itself it starts one process per "
        "rank (torchrun).",
    ),
    "compile": (
        "compile", "compile_command",
        "Write the program of MODEL on a mesh to DIR: the graphs as text, constants, a manifest with every "
        "layout.",
    ),
    "cache": (
        "cache", "cache_command",
        "Say where compiled programs are kept from launch to launch, how large they are, and of what; or delete them.",
    ),
    "report": (
        "report", "report_command",
        "Write a page that shows how MODEL is split: ranks, parameters, a block, memory, traffic, "
        "pipeline, program.",
    ),
    "fit": (
        "fit", "fit_command",
        "List the meshes and plans on which MODEL fits: memory, bytes sent by axis, bubble; and why others "
        "do not fit.",
    ),
    "export": (
        "export", "export_command",
        "Write a program for other tools: a file for each rank, and manifest.json, which says what they "
        "are.",
    ),
    "export-weights": (
        "export_weights", "export_weights_command",
        "Write the weights of a training checkpoint as safetensors files, with the config: for "
        "from_pretrained.",
    ),
    "run": (
        "run", "run",
        "Run the forward pass of a saved program over its mesh; weights and inputs that are not given are "
        "random.",
    ),
    "diff": (
        "diff", "diff_command",
        "Print what differs: layouts, collectives, the bytes that a rank sends and holds; repeated blocks "
        "are one line.",
    ),
    "replay": (
        "replay", "replay",
        "Run a pass on the program in FILE, which a failed pass left behind, and print the result.",
    ),
}  # fmt: skip


class Deferred(TyperCommand):
    """A command of which only the name and the help are known until it is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name, help=COMMANDS[name][2], add_help_option=False)

    def loaded(self) -> Any:
        """The command itself."""
        module, function, _ = COMMANDS[str(self.name)]
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
        app.command(self.name)(getattr(importlib.import_module(f"autopar.commands.{module}"), function))
        return typer.main.get_command(app)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.loaded().make_context(info_name, args, parent=parent, **extra)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        return self.loaded().shell_complete(ctx, incomplete)


class Commands(TyperGroup):
    """The group of all commands, in the order of the table."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: Any = {name: Deferred(name) for name in COMMANDS}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)
