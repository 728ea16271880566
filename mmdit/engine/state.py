"""What changes while a run trains: weights, averages, moments and the number of steps made.

All else follows from the config, so this is what a checkpoint holds and what a resumed run needs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.engine.ema import EMA
from mmdit.engine.optimizers import load_moments, moments, rates_of, room_for, set_lr
from mmdit.engine.posthoc import PostHoc
from mmdit.registry import describe
from mmdit.runs import tensors as tensor_files
from mmdit.runs.checkpoint import FROZEN, Checkpoint, checkpoints_in
from mmdit.runs.saving import Saver

OPPONENT = "opponent"  # under which its weights and moments are kept


class Opponent(NamedTuple):
    """A module that is trained alongside the model by its own loss, and is not part of it.

    Such as the heads of a discriminator. Checkpoints keep it with the moments, for training alone.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer  # of its weights

    def tensors(self) -> dict[str, Tensor]:
        """Its weights and moments."""
        own = {**self.module.state_dict(), **moments(self.module, self.optimizer)}
        return {f"{OPPONENT}.{name}": tensor for name, tensor in own.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, among others."""
        prefix = f"{OPPONENT}."
        own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        weights = self.module.state_dict()
        self.module.load_state_dict({name: own[name] for name in weights})
        kept = {name: x for name, x in own.items() if name not in weights}
        load_moments(self.module, self.optimizer, kept)


class TrainState:
    """A module in training, after some number of steps.

    Args:
        module: what is trained; it and its average have been placed on their devices.
        ema: the running average of its weights.
        optimizer: updates its weights.
        schedule: factor of the optimizer's learning rate at each step.
        kept: from a module to what checkpoints hold of it, as an adapter; None is all.
        opponent: what is trained beside the module, if anything.
        posthoc: averages kept beside `ema`, from which others are made after training.

    Attributes:
        step: number of steps made.
        trained: the module and its opponent, each with its optimizer.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        ema: EMA[Any],
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        posthoc: PostHoc | None = None,
        kept: Callable[[nn.Module], nn.Module] | None = None,
        opponent: Opponent | None = None,
    ) -> None:
        self.module, self.ema, self.optimizer = module, ema, optimizer
        self.schedule, self.posthoc = schedule, posthoc
        self.opponent, self._kept = opponent, kept
        self.step = 0
        self.trained = [(module, optimizer), *([opponent] if opponent else [])]
        self._rates = [rates_of(each) for _, each in self.trained]

    @property
    def whole(self) -> nn.Module:
        """All that losses train: the module, with its opponent if there is one."""
        return nn.ModuleList([self.module, self.opponent.module]) if self.opponent else self.module

    @property
    def device(self) -> torch.device:
        """Where the module is trained."""
        return next(self.module.parameters()).device

    def set_rate(self) -> float:
        """Set the learning rates of the next step; returns that of the first group of weights."""
        factor = self.schedule(self.step)
        for (_, optimizer), rates in zip(self.trained, self._rates, strict=True):
            set_lr(optimizer, [rate * factor for rate in rates])
        return self._rates[0][0] * factor

    def advance(self, run: Path, *, last: bool, writes: bool) -> None:
        """Count a step that was made, and take its weights into the averages.

        Args:
            run: run folder, where snapshots are kept.
            last: whether it is the last step.
            writes: whether this process is the one that writes.
        """
        self.step += 1
        self.ema.update(self.step)
        if self.posthoc is not None:
            self.posthoc.update(self.step, run, last=last, writes=writes)

    def save(self, saver: Saver, *, finished: bool, figures: Mapping[str, float]) -> None:
        """Write a checkpoint; returns when training may go on.

        Args:
            finished: whether the run has reached its last step.
            figures: what the manifest says of the run up to here.
        """
        kept = self.posthoc.tensors() if self.posthoc else {}
        if self.opponent is not None:
            kept |= self.opponent.tensors()
        tensors = self.weights()
        tensors["optimizer"] = moments(self.module, self.optimizer) | kept
        saver.save(
            step=self.step,
            finished=finished,
            tensors=tensors,
            descriptions=self.describe(),
            metrics=figures,
        )

    def describe(self) -> dict[str, Any]:
        """What the trained and the averaged module can be built from again."""
        return {name: describe(module) for name, module in self.kept().items()}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """What checkpoints hold of the weights: raw, averaged, and what both share."""
        if self._kept is None:
            return weights_of(self.module, self.ema)
        return {name: module.state_dict() for name, module in self.kept().items()}

    def kept(self) -> dict[str, nn.Module]:
        """The trained and the averaged module, as checkpoints hold them."""
        both = {"raw": self.module, "ema": self.ema.module}
        return both if self._kept is None else {k: self._kept(m) for k, m in both.items()}

    def load(self, saver: Saver) -> Checkpoint | None:
        """Go on from the newest undamaged checkpoint of a run, if there is one."""
        checkpoint = saver.latest()
        if checkpoint is None:
            return None
        kept = room_for(self.module, saver.facts(checkpoint, "optimizer"))
        saver.load(checkpoint, {**self.weights(), "optimizer": kept})
        if self.posthoc is not None:
            self.posthoc.take(kept)
        if self.opponent is not None:
            self.opponent.load(kept)
        load_moments(self.module, self.optimizer, kept)
        self.step = checkpoint.step
        return checkpoint


def weights_of(module: nn.Module, ema: EMA[Any]) -> dict[str, dict[str, Tensor]]:
    """All weights by their groups in a checkpoint: raw, averaged, and what both share."""
    raw, averaged = module.state_dict(), ema.module.state_dict()
    frozen = {key: raw.pop(key) for key in list(raw) if key in ema.shared}
    return {
        "raw": raw,
        "ema": {key: averaged[key] for key in raw},
        **({FROZEN: frozen} if frozen else {}),
    }


def take_frozen(run: Path, module: nn.Module, ema: EMA[Any]) -> bool:
    """Load what nobody trains from a run's newest checkpoint; whether there was one.

    A run goes on with the very autoencoder and encoders that it began with, even where they would
    by now come out differently.
    """
    for checkpoint in reversed(checkpoints_in(run, warn=False)):
        folder = checkpoint.group(FROZEN)
        if folder.is_dir() and checkpoint.fault(FROZEN) is None:
            tensor_files.read_into(folder, weights_of(module, ema).get(FROZEN, {}))
            return True
    return False
