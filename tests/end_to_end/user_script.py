"""A training script with the habits that people have, the same for the unmodified model and for a parallel one.

Each step is another habit of :data:`HABITS`: accumulation, clipping, a retained graph, ``autograd.grad``, batches and
hooks that stop a pass. In the first steps hooks are registered, a parameter is frozen and freed again,
and the script goes on with a copy of the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from autopar import InvariantError, Mesh, ParallelModule
from autopar.mesh import EXPERTS
from autopar.models import llama, moe
from tests.against_one_process import whole

ROWS, LENGTH, VOCAB = 4, 8, 24
OPTIMIZERS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 0.02, "momentum": 0.5},
    # a larger eps: where a gradient is all but zero, Adam divides rounding by rounding
    "AdamW": {"lr": 2e-3, "eps": 1e-4},
}
WATCHED, FROZEN, FREED, COPIED = 2, 6, 10, 12  # steps


class Net(nn.Module):
    """A transformer, or a mixture of experts, with an adapter that few steps use."""

    def __init__(self, experts: bool) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": VOCAB}
        self.body = moe.build(ff=12, experts=4, **sizes) if experts else llama.build(ff=24, **sizes)
        self.adapter = nn.Linear(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor, adapted: bool = False) -> Tensor:
        found = self.body(input_ids=input_ids, labels=labels)
        loss: Tensor = found["loss"]
        return loss + self.adapter(found["logits"]).square().mean() if adapted else loss


def build(mesh: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(EXPERTS in Mesh.parse(mesh).names).double()


def batch(step: int) -> dict[str, Tensor]:
    """Rows with unequally many labels."""
    generator = torch.Generator().manual_seed(step % 23)
    ids = (torch.randint(VOCAB, (ROWS, 1), generator=generator) + torch.arange(LENGTH) * (1 + step % 3)) % VOCAB
    kept = torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(0.2, 0.9, ROWS)[:, None]
    kept[:, 2] = True
    return {"input_ids": ids, "labels": ids.masked_fill(~kept, -100)}


class StopScriptError(Exception):
    """Raised by a hook of the script."""


class Script:
    """One of the two sides: a method for each habit, which gives the numbers that the script sees."""

    def __init__(self, module: nn.Module, optimizer: str) -> None:
        self.module, self.kind = module, optimizer
        self.optimizer: Any = getattr(torch.optim, optimizer)(module.parameters(), **OPTIMIZERS[optimizer])
        self.seen: list[float] = []  # by hooks

    def step(self, step: int, habits: tuple[Habit, ...]) -> tuple[list[float], dict[str, Tensor]]:
        """What the script sees in this step, and all gradients at its end."""
        self.happens(step)
        seen = habits[step % len(habits)](self, step)
        grads = self.grads()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=step % 4 != 1)
        seen, self.seen = [*seen, *self.seen], []
        return seen, grads

    def grads(self) -> dict[str, Tensor]:
        if isinstance(self.module, ParallelModule):
            return {name: grad.clone() for name, grad in self.module.full_grads().items()}
        named = self.module.named_parameters()
        return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}

    def loss(self, step: int, **choices: Any) -> Any:
        return self.module(**batch(step), **choices)

    def named(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def trained(self) -> list[nn.Parameter]:
        return [each for name, each in self.named().items() if each.requires_grad and "adapter" not in name]

    # ------------------------------------------------------------ what happens once

    def happens(self, step: int) -> None:
        if step == WATCHED:
            self.watch()
        if step in (FROZEN, FREED):
            norms = [each for name, each in self.named().items() if name in ("body.norm.weight", "body.tokens.weight")]
            for each in norms:
                each.requires_grad_(step == FREED)
        if step == COPIED:
            state = self.optimizer.state_dict()
            self.module = copy.deepcopy(self.module)
            self.optimizer = getattr(torch.optim, self.kind)(self.module.parameters(), **OPTIMIZERS[self.kind])
            self.optimizer.load_state_dict(state)
            self.watch()  # torch copies no hooks

    def watch(self) -> None:
        """Hooks on parameters: one that changes a gradient, one that looks at what has been added up."""
        for name, parameter in self.named().items():
            if name == "body.blocks.0.attn.q.weight":
                parameter.register_hook(lambda grad: grad * 0.5)
            if name == "body.blocks.0.attn.v.weight":
                parameter.register_post_accumulate_grad_hook(self.look)

    def look(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.seen.append(float(whole(parameter.grad).square().sum()))

    # ------------------------------------------------------------ habits

    def plain(self, step: int) -> list[float]:
        loss = self.loss(step)
        loss.backward()
        return [loss.item()]

    def adapted(self, step: int) -> list[float]:
        loss = self.loss(step, adapted=True)
        loss.backward()
        return [loss.item()]

    def trained_step(self, step: int) -> list[float]:
        """``train_step``, which is the loss and its backward pass."""
        module = self.module
        return [float(module.train_step(**batch(step)))] if isinstance(module, ParallelModule) else self.plain(step)

    def accumulated(self, step: int) -> list[float]:
        return [*self.plain(step), *self.adapted(step + 1), *self.trained_step(step + 2)]

    def accumulated_here(self, step: int) -> list[float]:
        """Without communication until the last."""
        with self.module.no_sync() if isinstance(self.module, ParallelModule) else nullcontext():
            found = [*self.plain(step), *self.adapted(step + 1)]
            asked = torch.autograd.grad(self.loss(step + 3), self.trained()[0])[0]
        found += [whole(asked).abs().max().item(), *self.plain(step + 2)]
        self.seen = []  # by a hook while the gradients of the others wait
        return found

    def begun_again(self, step: int) -> list[float]:
        """What a stopped accumulation has left is forgotten."""
        with self.module.no_sync() if isinstance(self.module, ParallelModule) else nullcontext():
            self.plain(step + 5)
        (self.module if step % 2 else self.optimizer).zero_grad()
        self.seen = []
        return self.plain(step)

    def clipped_by_torch(self, step: int) -> list[float]:
        found = self.plain(step)
        return [*found, float(whole(nn.utils.clip_grad_norm_(self.module.parameters(), 0.1)))]

    def clipped(self, step: int) -> list[float]:
        found, module = self.plain(step), self.module
        clip: Any = module.clip_grad_norm_ if isinstance(module, ParallelModule) else None
        norm = clip(0.1) if clip is not None else nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        return [*found, float(whole(norm))]

    def retained(self, step: int) -> list[float]:
        loss = self.loss(step)
        loss.retain_grad()
        loss.backward(retain_graph=True)
        (loss * 0.5).backward()
        return [loss.item(), loss.grad.item()]

    def backward_twice(self, step: int) -> list[float]:
        loss = self.loss(step)
        loss.backward()
        try:
            loss.backward()
        except (RuntimeError, InvariantError) as refusal:
            assert "second" in str(refusal), refusal
            return [loss.item()]
        raise AssertionError("a second backward pass was not refused")

    def asked_for(self, step: int) -> list[float]:
        parameters, loss = self.trained(), self.loss(step)
        before = [parameter.grad for parameter in parameters]
        found = torch.autograd.grad(loss, parameters)
        assert all(parameter.grad is grad for parameter, grad in zip(parameters, before, strict=True))
        for parameter, grad in zip(parameters, found, strict=True):
            parameter.grad = grad
        return [loss.item()]

    def of_some(self, step: int) -> list[float]:
        loss = self.loss(step)
        with torch.autograd.set_detect_anomaly(step % 2 == 0, check_nan=False):
            loss.backward(inputs=self.trained()[1::2])
        return [loss.item()]

    def of_two_losses(self, step: int) -> list[float]:
        first, second = self.loss(step), self.loss(step + 1, adapted=True)
        (first + 2 * second).backward()
        self.seen = self.seen[-1:]  # a pipeline gives the gradients of one after the other
        return [first.item(), second.item()]

    def stopped_forward(self, step: int) -> list[float]:
        """A label that is no class stops the forward pass; the script takes the next batch."""
        bad = batch(step)
        bad["labels"][:] = VOCAB + 10
        self.loss(step + 1)  # and nobody goes backward
        try:
            self.module(**bad)
        except (IndexError, RuntimeError):
            return [1.0, *self.plain(step)]
        return [0.0, *self.plain(step)]

    def stopped_backward(self, step: int) -> list[float]:
        """A hook raises; the script forgets the gradients that there are by then."""

        def stop(_: Any) -> None:
            raise StopScriptError

        handles = [each.register_post_accumulate_grad_hook(stop) for each in self.trained()[2:4]]
        try:
            self.plain(step)
        except StopScriptError:
            for handle in handles:
                handle.remove()
            self.optimizer.zero_grad()
            self.seen = []
            return self.plain(step)
        raise AssertionError("no hook was called")


Habit = Callable[[Script, int], list[float]]
HABITS: tuple[Habit, ...] = (
    Script.plain, Script.accumulated, Script.clipped_by_torch, Script.adapted, Script.retained, Script.backward_twice,
    Script.asked_for, Script.accumulated_here, Script.clipped, Script.of_some, Script.of_two_losses,
    Script.stopped_forward, Script.stopped_backward, Script.trained_step, Script.begun_again, Script.plain,
)  # fmt: skip
# what is left out is refused there, or stops one stage alone
OF_PIPELINES: tuple[Habit, ...] = (
    Script.trained_step, Script.accumulated, Script.clipped, Script.adapted, Script.backward_twice,
    Script.of_two_losses, Script.trained_step,
)  # fmt: skip
