"""What scripts ask of the values of their configs."""

from omegaconf import DictConfig, OmegaConf

from mmdit.checks import COUNTS, seed_number, whole_number


def whole(config: DictConfig, name: str, least: int = 1, most: int = COUNTS) -> int:
    """A whole number of a config, by its full name: `training.batch_size`.

    Raises:
        UserError: it is none, or too small or large.
    """
    value = OmegaConf.select(config, name, throw_on_missing=True)
    return whole_number(name, value, least, most)


def seed_of(config: DictConfig, name: str = "seed", *, images: int = 1) -> int:
    """A seed of a config, from which so many images are counted.

    Raises:
        UserError: it is none, or too large for them.
    """
    return seed_number(name, OmegaConf.select(config, name, throw_on_missing=True), images=images)
