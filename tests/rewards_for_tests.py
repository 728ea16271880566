"""Rewards of one's own, good and bad, for `reward.function=tests.rewards_for_tests:<name>`."""

from torch import Tensor


def brightness(images: Tensor, texts: list[str]) -> Tensor:
    assert len(images) == len(texts)
    return images.double().flatten(1).mean(1)


def not_finite(images: Tensor, texts: list[str]) -> list[float]:
    return [float("nan")] * len(images)


def too_few(images: Tensor, texts: list[str]) -> list[float]:
    return [1.0]


def constant(images: Tensor, texts: list[str]) -> list[float]:
    return [1.0] * len(images)


def failing(images: Tensor, texts: list[str]) -> list[float]:
    raise KeyError("weights")
