"""What scripts ask of the values of their configs."""

from omegaconf import DictConfig, OmegaConf

from mmdit.errors import UserError

LIMIT = 2**63  # torch counts and seeds in 64 bits


def whole(config: DictConfig, name: str, least: int = 1) -> int:
    """A whole number of a config, by its full name: `training.batch_size`.

    Raises:
        UserError: it is none, or too small or large.
    """
    value = OmegaConf.select(config, name, throw_on_missing=True)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value} must be a whole number of at least {least}")
    if value >= LIMIT:
        raise UserError(f"{name}={value} must be a whole number below 2^63")
    return value
