"""Plain configs compared and hashed by what they build, wherever in the code its class lies.

A `_target_` counts by its last name, `LogitNormal` of `mmdit.flow.LogitNormal`: classes may move
between modules, and runs that were begun before go on.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """A key whose values differ; None stands for a key that is not there."""

    key: str  # in full, `training.steps`
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r}, now {self.now!r}"


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str] = ()
) -> list[Difference]:
    """The keys in which two configs differ, sorted.

    Args:
        free: keys that may differ, with all below them; `*` stands for any text.

    Example:
        >>> differences({"ema": {"decay": 0.9}}, {"ema": {"decay": 0.99}})
        [Difference(key='ema.decay', before=0.9, now=0.99)]
    """
    one, other = dict(_flat(portable(before))), dict(_flat(portable(now)))
    return [
        Difference(key, one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
        and not any(fnmatchcase(key, name) or fnmatchcase(key, f"{name}.*") for name in free)
    ]


def config_hash(config: Any) -> str:
    """Eight hexadecimal digits of the content of a plain config."""
    text = json.dumps(portable(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def portable(config: Any) -> Any:
    """A plain config whose targets are the last names of what they build."""
    if isinstance(config, Mapping):
        return {
            key: str(value).rpartition(".")[2] if key == "_target_" else portable(value)
            for key, value in config.items()
        }
    return [portable(item) for item in config] if isinstance(config, list | tuple) else config


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
