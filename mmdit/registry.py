"""Registry of classes by name: builds modules from the plain data in a checkpoint.

A checkpoint describes a module as `{"class": "MMDiT", "depth": 24, ...}`: data only. `build` looks
the name up here, so that nothing named in a file is ever imported by path.
"""

import functools
import inspect
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from mmdit.checks import did_you_mean, listed, nearest
from mmdit.errors import UserError

T = TypeVar("T")
_classes: dict[str, type] = {}
PLAIN: dict[Any, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a text"),
    NoneType: (NoneType, "null"),
}


def register(cls: type[T]) -> type[T]:
    """Class decorator: make `cls` buildable by name, and make its instances describable.

    Each instance records the arguments of its constructor, including defaults (keyword-only; plain
    data or registered instances). So `describe(instance)` can be stored as JSON, and
    `build(describe(instance))` gives the same architecture.

    Raises:
        UserError: another module has registered a class of this name.
    """
    known = _classes.get(cls.__name__)
    if known is not None and known.__module__ != cls.__module__:
        raise UserError(
            f"{cls.__module__} registers a class {cls.__name__}, a name that {known.__module__} "
            "uses already: checkpoints could not distinguish them; choose another name"
        )
    _classes[cls.__name__] = cls
    if cls.__init__ is object.__init__:  # no arguments: the name is all there is to record
        cls._description = {"class": cls.__name__}  # type: ignore[attr-defined]
        return cls
    original = cls.__init__
    signature = _signature(cls)

    @functools.wraps(original)
    def remember(self: Any, **arguments: Any) -> None:
        for name in arguments:
            if name not in signature.parameters:
                hint = did_you_mean(nearest(name, signature.parameters))
                raise UserError(f"{cls.__name__} has no argument {name!r}.{hint}")
            _check(cls.__name__, name, arguments[name], signature.parameters[name].annotation)
        try:
            bound = signature.bind(self, **arguments)
        except TypeError as error:
            raise UserError(f"{cls.__name__}: {error}") from None
        original(self, **arguments)
        bound.apply_defaults()
        plain = {name: _plain(value) for name, value in bound.arguments.items() if name != "self"}
        self._description = {"class": cls.__name__, **plain}

    remember.__signature__ = signature  # type: ignore[attr-defined]
    cls.__init__ = remember  # type: ignore[method-assign]
    return cls


def _signature(cls: type) -> inspect.Signature:
    """Signature of a constructor, with `**shared` replaced by the arguments of its base class."""
    first, *above = (base for base in cls.__mro__ if "__init__" in vars(base))
    own = inspect.signature(first.__init__)  # type: ignore[misc]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: p for name, p in own.parameters.items() if p.kind not in variadic}
    if above and named.keys() != own.parameters.keys():
        named = {**_signature(above[0]).parameters, **named}
    return own.replace(parameters=[*named.values()])


def _check(cls: str, name: str, value: Any, annotation: Any) -> None:
    """Check that a value from a config or a file has the plain type of its annotation."""
    if get_origin(annotation) is Sequence:
        listed(f"{cls}: {name}", value)
        for i, item in enumerate(value):
            _check(cls, f"{name}[{i}]", item, get_args(annotation)[0])
        return
    asked = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if not all(kind in PLAIN for kind in asked):
        return
    # Python counts a bool as an int; we do not.
    of_kind = asked if not isinstance(value, bool) else {bool} & {*asked}
    if not any(isinstance(value, PLAIN[kind][0]) for kind in of_kind):
        expectation = " or ".join(PLAIN[kind][1] for kind in asked)
        raise UserError(f"{cls}: {name}={value!r} must be {expectation}")
    if isinstance(value, int) and abs(value) >= 2**63:  # torch counts in 64 bits
        raise UserError(f"{cls}: {name}, of {len(str(value))} digits, must be below 2^63")


def describe(instance: Any) -> dict[str, Any]:
    """The description `{"class": name, **arguments}` of an instance of a registered class."""
    return dict(instance._description)


def build(description: dict[str, Any]) -> Any:
    """Build an instance of a registered class from its description.

    Raises:
        UserError: no class of this name is registered, or an argument is invalid.
    """
    if not isinstance(description, dict):
        raise UserError(
            f"a description of a class must be a table of arguments, not {description!r}"
        )
    arguments = {key: _rebuilt(value) for key, value in description.items()}
    name = arguments.pop("class", None)
    if not isinstance(name, str) or name not in _classes:
        hint = did_you_mean(nearest(str(name), _classes))
        raise UserError(
            f"the checkpoint names the class {name!r}, which is not known here.{hint} A class of "
            "your own must be imported first: imports=[<module>]"
        )
    cls = _classes[name]
    if arguments and not inspect.signature(cls).parameters:
        raise UserError(f"{name} takes no arguments, but is given {', '.join(arguments)}")
    return cls(**arguments)


def _rebuilt(value: Any) -> Any:
    return build(value) if isinstance(value, dict) and "class" in value else value


def _plain(value: Any) -> Any:
    """Plain data: descriptions for registered instances; lists and dicts become Python's own."""
    if hasattr(value, "_description"):
        return describe(value)
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value]
