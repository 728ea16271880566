"""The class of public formats, and functions that read sizes from a file's keys and shapes."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from mmdit.bounds import MOST_BLOCKS
from mmdit.checkpoints.headers import Info
from mmdit.checkpoints.tables import Form, Rule, reshaped, rows
from mmdit.errors import UserError

Infos = Mapping[str, Info]
Description = dict[str, Any]
Reader = Callable[[Infos, Description], Description]


# Names that training wrappers put before every key of the model in them.
WRAPPERS = (
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "base_model", "state_dict"),
    *("model", "net", "network", "diffusion_model", "transformer", "mmdit", "dit", "denoiser"),
    *("ema", "ema_model", "model_ema", "online_model", "student", "generator", "averaged_model"),
)
# Keys of adapters (LoRA and the like), as PEFT, kohya, LyCORIS and ComfyUI name them.
ADAPTERS = re.compile(
    r"(^|[._])(lora|lokr|hada|loha|oft|boft|ia3|vera|lycoris|fourierft)_|[._]lora\."
    r"|\.dora_scale$|\.diff(_b)?$"
)


class Argument(NamedTuple):
    """A constructor argument of a model that a format stores as a tensor.

    Attributes:
        name: the argument.
        read: from the tensor to its value.
        write: from the value to the tensor.
    """

    name: str
    read: Callable[[Tensor], Any]
    write: Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Format:
    """One model in one layout.

    Attributes:
        kind: which model: mmdit, autoencoder, clip_l, clip_g, clip_image, t5, controlnet.
        layout: 'original' or 'diffusers'; 'gguf' of T5 in GGUF files.
        prefixes: what its keys may begin with in a file; the first is used for writing.
        mark: regular expression of keys that only this format has.
        describe: from shapes and hints to a description of the architecture (see
            `mmdit.registry`).
        rules: the table of rules for a description.
        constants: our tensors that the format does not store; they follow from the description.
        arguments: arguments that the format stores as tensors, by their key, which may be missing.
        copies: keys of tensors that are stored twice, with the key of the original.
        identity: key of a projection that is stored as the identity if we have none.
        another: whether unprefixed keys of this format belong to another model, by their shapes.
        wide: regular expression of keys whose tensors overflow in float16 and stay in float32.
        extras: regular expressions of keys in published files that no model needs; ignored.
    """

    kind: str
    layout: str
    prefixes: tuple[str, ...]
    mark: str
    describe: Callable[[Infos, Description], Description]
    rules: Callable[[Description], list[Rule]]
    constants: tuple[str, ...] = ()
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""
    another: Callable[[Infos], bool] = lambda _: False
    wide: str = r"(?!)"
    extras: tuple[str, ...] = ()

    def prefixes_in(self, keys: Iterable[str], parts: Sequence[str] = ()) -> dict[str, str]:
        """The prefixes under which `keys` hold this model, and the wrapper's share of each.

        A prefix is a published one, or one with the names of training wrappers or of a part before
        it. Published ones come first.

        Args:
            keys: the keys of a file.
            parts: names of nested dicts in the file (see `Archive.parts`).
        """
        wrappers = "|".join(re.escape(name) for name in (*WRAPPERS, *parts))
        known = "|".join(re.escape(prefix) for prefix in self.prefixes)
        pattern = re.compile(rf"(((?:(?:{wrappers})\.){{0,4}}?)(?:{known}))(?:{self.mark})")
        found = {match[1]: match[2] for key in keys if (match := pattern.match(key))}
        published = [prefix for prefix in self.prefixes if prefix in found]
        return {**{prefix: found[prefix] for prefix in published}, **found}


# Reading sizes


def shapes(infos: Infos, pattern: str, dims: int) -> list[tuple[int, ...]]:
    """Shapes of the non-empty tensors with `dims` axes whose whole key matches the pattern."""
    compiled = re.compile(pattern)
    return [
        info.shape
        for key, info in infos.items()
        if len(info.shape) == dims and all(info.shape) and compiled.fullmatch(key)
    ]


def count(infos: Infos, pattern: str) -> int:
    """The number of blocks, from the numbers in their keys.

    A number counts if at least half of the numbers up to it are present: a missing block is still
    counted, a stray `blocks.999999` is not.

    Raises:
        UserError: there are more blocks than any model has.
    """
    there = sorted({int(number) for number in numbers(infos, pattern) if len(number) < 8})
    found = 1 + max((n for i, n in enumerate(there, start=1) if n < 2 * i), default=0)
    if found > MOST_BLOCKS:
        raise UserError(
            f"its keys number {found:,} blocks, as in {pattern}; {MOST_BLOCKS} is several times "
            "what any supported model has"
        )
    return found


def numbers(infos: Infos, pattern: str) -> list[str]:
    """The first group of each key that begins with the pattern."""
    compiled = re.compile(pattern)
    return [match[1] for key in infos if (match := compiled.match(key))]


def heads(name: str, width: int, depth: int, norms: Mapping[int, int], hints: Description) -> int:
    """The number of attention heads, which shapes only determine if heads are normalized.

    Args:
        name: class of the model, for messages.
        width: channels of a token.
        depth: number of blocks.
        norms: sizes of the norms of queries and keys, with their counts; empty without norms.
        hints: may hold num_heads.

    Raises:
        UserError: nothing determines it.
    """
    if norms:
        return max(1, width // max(norms, key=lambda size: norms[size]))
    if "num_heads" in hints:
        return hints["num_heads"]
    if width == 64 * depth:  # the paper's rule (Sec. 4)
        return depth
    raise UserError(
        f"{name} of width {width} and depth {depth}: the file does not state the number of heads, "
        "and the rule of the public models (width = 64 depth) does not hold; give num_heads="
    )


# Forms that several formats share


def convolution(p: int) -> Form:
    """The form of our matrix over patches: their convolution with a p x p kernel."""
    return reshaped(lambda ours: (ours[0], ours[1] // p**2, p, p))


def fused(ours: str, theirs: str) -> list[Rule]:
    """Rules for Q, K and V, which are thirds of a single matrix in the public file."""
    return [Rule(f"{ours}{part}\\.", f"{theirs}qkv.", rows(i, 3)) for i, part in enumerate("qkv")]
