"""What ranks of tests are forked from: all is imported, and a first program compiled, once and not by each of them.

No process group is made and no backward pass runs here: what starts threads does not survive a fork.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

import pytest  # noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.distributed.tensor.debug
import torch.profiler

import autopar.__main__
import autopar.checkpoint
import autopar.commands.train
import autopar.commands.training_run
import autopar.zoo.named  # noqa: F401
from autopar.compiler import compile_program
from autopar.mesh import Mesh
from autopar.plan import Plan
from tests.against_one_process import Tiny, tiny_batch

with suppress(ImportError):
    import_module("tqdm").tqdm.monitor_interval = 0  # torch shows its progress while it exports, watched by a thread
with suppress(ImportError):
    import transformers.models.llama.modeling_llama  # noqa: F401

with suppress(Exception), torch.random.fork_rng():  # what is wrong with the compiler is for the tests to say
    for mesh in (Mesh(dp=2), Mesh(tp=2)):
        compile_program(Tiny(), mesh, Plan(zero=1, check_numerics=False), (), tiny_batch())
