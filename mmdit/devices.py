"""Choosing the device to compute on."""

import torch

from mmdit.errors import UserError


def available(device: torch.device | str) -> torch.device:
    """The device named 'cpu', 'cuda', 'cuda:1', ..., or 'auto': cuda if available, else cpu.

    Raises:
        UserError: the device is not available, or is 'meta', which computes nothing.
    """
    if not isinstance(device, torch.device | str):
        raise UserError(
            f"device={device} must be the name of a device, such as cpu or cuda:1, or auto"
        )
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:
        count = torch.cuda.device_count()
        raise UserError(
            f"device={device} is not available here: use device=cpu or auto (torch "
            f"{torch.__version__} sees {count or 'no'} CUDA device{'s' * (count != 1)})"
        ) from error
    if found.type == "meta":
        raise UserError("device=meta computes nothing: use device=cpu or auto")
    return found
