"""Build models from descriptions in files of unknown origin: on meta, where nothing is allocated.

A description may ask for any size. So the model is first built where that costs nothing, and
compared with the shapes in the file's header; it gets memory only if they match.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdit.bounds import DEEPEST, MOST_BUILT
from mmdit.checkpoints.diagnosis import explain_infinite
from mmdit.checkpoints.values import LIMITS, not_finite
from mmdit.errors import UserError, first_line
from mmdit.registry import build

FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


class Unfilled(TorchFunctionMode):
    """Turns `nn.init` off, which would take seconds only for its values to be replaced."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


class Bounded(TorchFunctionMode):
    """Stops code that creates more tensors than any model has.

    Raises:
        UserError: the next tensor would exceed the limit.
    """

    made = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.made += func in FACTORIES
        if self.made > MOST_BUILT:
            raise UserError(
                f"its description is that of a model of more than {MOST_BUILT:,} tensors, twice as "
                "many as any supported model has"
            )
        return func(*args, **(kwargs or {}))


def build_on_meta(description: dict[str, Any]) -> Any:
    """The module of a description, without memory for its tensors.

    Raises:
        UserError: the description does not describe a model.
    """
    expect_shallow(description)
    try:
        with torch.device("meta"), Unfilled(), Bounded():
            module = build(description)
    except UserError:
        raise
    except Exception as error:  # a file may ask for anything, so any error may follow
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"its description cannot be built ({what})") from error
    return module


def expect_shallow(description: Any) -> None:
    """Refuse a description that is nested more deeply than that of any model.

    Raises:
        UserError: it is.
    """
    level, depth = [description], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise UserError(f"its description is nested more than {DEEPEST} levels deep")
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [x for items in inner for x in items if isinstance(x, dict | list)]


def filled(description: dict[str, Any], tensors: Mapping[str, Tensor], source: Path) -> nn.Module:
    """The module of a description, in eval mode on the CPU, with these tensors as its weights.

    The description must have been compared with the tensors before (`build_on_meta`). The module is
    built again, because buffers that its state dict lacks must be computed on a real device.

    Args:
        description: see `mmdit.registry`.
        tensors: the module's state dict; converted to the dtypes that the module has.
        source: the file, for messages.

    Raises:
        UserError: a tensor has values that are NaN or infinite.
    """
    expect_finite_weights(tensors, source)
    with torch.device("cpu"), Unfilled():
        module: nn.Module = build(description)
    own = {key: tensors[key].to(like.dtype) for key, like in module.state_dict().items()}
    module.load_state_dict(own, assign=True)
    return module.eval()


def expect_finite_weights(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse weights that are not finite.

    Raises:
        UserError: a tensor has values that are NaN or infinite.
    """
    floats = {key: tensor for key, tensor in tensors.items() if tensor.dtype in LIMITS}
    if bad := not_finite(floats):
        raise UserError(explain_infinite(source, bad, None))
