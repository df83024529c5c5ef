"""Whose AdamW: chosen by what can be imported, built by Megatron, its steps counted where it counts them."""

from __future__ import annotations

import importlib
import types

import pytest
import torch

from megamug.errors import UserError
from megamug.training import adam
from tests.training.test_optim import backward, trainer_of


class FusedAdam(torch.optim.Optimizer):
    """Stands in for Transformer Engine's and apex's: their arguments, their state (steps are counted by group), and the
    update of AdamW (Loshchilov and Hutter 2019) written down."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode, capturable=False):
        assert adam_w_mode and not capturable
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                root = (state["exp_avg_sq"] / (1 - b2**t)).sqrt_().add_(group["eps"])
                p.addcdiv_(state["exp_avg"] / (1 - b1**t), root, value=-group["lr"])


@pytest.fixture
def machine(monkeypatch):
    """One with a GPU and the modules that are named in the list."""
    installed: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def load(name: str):
        if name not in installed:
            raise ImportError(f"No module named {name}")
        return types.SimpleNamespace(FusedAdam=type(name, (FusedAdam,), {}))

    monkeypatch.setattr(importlib, "import_module", load)
    return installed


def test_others_are_there_where_they_are_asked_for(machine):
    machine.append("apex.optimizers")
    assert adam.choose("auto")[:2] == ("torch", None)
    with pytest.raises(UserError, match=r"optimizer.fused\(te\) cannot be imported .* set optimizer.fused=auto"):
        adam.choose("te")
    machine.append("transformer_engine.pytorch.optimizers")
    which, found, reason = adam.choose("te")
    assert (which, found.__name__, reason) == ("te", "transformer_engine.pytorch.optimizers", "optimizer.fused=te")
    assert adam.choose("apex")[0] == "apex" and adam.choose("torch")[:2] == ("torch", None)


def test_a_cpu_has_torchs(machine, monkeypatch):
    machine.append("transformer_engine.pytorch.optimizers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert adam.choose("auto")[:2] == ("torch", None)
    with pytest.raises(UserError, match="needs a GPU"):
        adam.choose("te")


@pytest.mark.parametrize("distributed", [False, True])
def test_megatron_builds_the_one_chosen_and_it_updates_as_torchs(world, monkeypatch, distributed):
    """Three steps of both, with the steps so far restored in between, as after a resume. `eps` is large: gradients that
    are rounding alone must not become whole updates."""
    found = {}
    for kernel in (None, FusedAdam):
        choice = ("torch", None, "") if kernel is None else ("te", kernel, "")
        monkeypatch.setattr(adam, "choose", lambda _, choice=choice: choice)
        stage, models, optimizer, config = trainer_of(distributed=distributed, learning_rate=1e-2, eps=1e-3)
        assert {type(part.optimizer) for part in optimizer.parts} == {kernel or torch.optim.AdamW}
        for step in (1, 2, 3):
            backward(stage, models, config, world, step)
            norm, _ = optimizer.prepare(step)
            optimizer.apply(norm)
            assert optimizer.updates_done() == step
            for group in (group for part in optimizer.parts for group in part.optimizer.param_groups):
                group.pop("step", None)
            optimizer.restore_step(step)
        found[kernel] = torch.cat([p.detach().flatten() for p in stage.parameters()])
    torch.testing.assert_close(found[FusedAdam], found[None], rtol=1e-5, atol=1e-6)
