"""What a public format is, and how sizes are read from a file's keys and shapes."""

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


# Attributes of training wrappers, which stand before every key of what they wrap.
WRAPPERS = (
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "base_model", "state_dict"),
    *("model", "net", "network", "diffusion_model", "transformer", "mmdit", "dit", "denoiser"),
    *("ema", "ema_model", "model_ema", "online_model", "student", "generator", "averaged_model"),
)
# Keys of what changes a model: LoRA and its kin, as PEFT, kohya, LyCORIS and ComfyUI call them.
ADAPTERS = re.compile(
    r"(^|[._])(lora|lokr|hada|loha|oft|boft|ia3|vera|lycoris|fourierft)_|[._]lora\."
    r"|\.dora_scale$|\.diff(_b)?$"
)


class Argument(NamedTuple):
    """An argument of a model that a format stores as a tensor."""

    name: str
    read: Callable[[Tensor], Any]
    write: Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Format:
    """One model in one layout.

    Attributes:
        kind: which model: mmdit, autoencoder, clip_l, clip_g, clip_image, t5, controlnet.
        layout: 'original' or 'diffusers'.
        prefixes: under which its keys may stand in a file; the first is written.
        mark: regular expression of keys that only this format has.
        describe: description of the architecture (see `mmdit.registry`) from shapes and hints.
        rules: the table, which may depend on the architecture.
        constants: tensors of ours that the format does not store, from the description instead.
        arguments: their key -> the argument of the model that it holds; it may be missing.
        copies: their key -> their key of which it is an exact copy.
        identity: their key of a projection that they store as the identity where we have none.
        another: whether what has these keys without a prefix is another model, by its shapes.
        wide: regular expression of keys whose tensors overflow in float16; float32 instead.
        extras: keys that published files may carry and no model needs; dropped by name.
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

    def places(self, keys: Iterable[str], parts: Sequence[str] = ()) -> dict[str, str]:
        """Where this model stands among `keys`: the prefixes, and the wrapper in each.

        The published prefixes come first; before each may stand those of training wrappers, or the
        name of a part.
        """
        wrappers = "|".join(re.escape(name) for name in (*WRAPPERS, *parts))
        known = "|".join(re.escape(prefix) for prefix in self.prefixes)
        pattern = re.compile(rf"(((?:(?:{wrappers})\.){{0,4}}?)(?:{known}))(?:{self.mark})")
        found = {match[1]: match[2] for key in keys if (match := pattern.match(key))}
        published = [prefix for prefix in self.prefixes if prefix in found]
        return {**{prefix: found[prefix] for prefix in published}, **found}


# Reading sizes


def shapes(infos: Infos, pattern: str, dims: int) -> list[tuple[int, ...]]:
    """Shapes of the tensors whose whole key matches, but for empty ones and those of other dims."""
    compiled = re.compile(pattern)
    return [
        info.shape
        for key, info in infos.items()
        if len(info.shape) == dims and all(info.shape) and compiled.fullmatch(key)
    ]


def count(infos: Infos, pattern: str) -> int:
    """How many blocks there are, by the number in their keys.

    A number is believed when at least half of those up to it are there: a block that is missing
    still counts, a stray `blocks.999999` does not.
    """
    there = sorted({int(number) for number in numbers(infos, pattern) if len(number) < 8})
    found = 1 + max((n for i, n in enumerate(there, start=1) if n < 2 * i), default=0)
    if found > MOST_BLOCKS:
        raise UserError(
            f"its keys number {found:,} blocks, as in {pattern}; {MOST_BLOCKS} is several times "
            "what any model that is read here has"
        )
    return found


def numbers(infos: Infos, pattern: str) -> list[str]:
    """First group of the keys that begin with the pattern."""
    compiled = re.compile(pattern)
    return [match[1] for key in infos if (match := compiled.match(key))]


def heads(name: str, width: int, depth: int, norms: Mapping[int, int], hints: Description) -> int:
    """Number of attention heads: no shape tells it, unless the heads are normalized."""
    if norms:
        return max(1, width // max(norms, key=lambda size: norms[size]))
    if "num_heads" in hints:
        return hints["num_heads"]
    if width == 64 * depth:  # the paper's rule (Sec. 4)
        return depth
    raise UserError(
        f"{name} of width {width} and depth {depth}: the file does not tell the number of heads, "
        "and the rule of the public models (width = 64 depth) does not hold; give num_heads="
    )


# Forms that several formats share


def convolution(p: int) -> Form:
    """Our matrix over patches is their convolution with a p x p kernel."""
    return reshaped(lambda ours: (ours[0], ours[1] // p**2, p, p))


def fused(ours: str, theirs: str) -> list[Rule]:
    """Our Q, K and V are the thirds of their one matrix."""
    return [Rule(f"{ours}{part}\\.", f"{theirs}qkv.", rows(i, 3)) for i, part in enumerate("qkv")]
