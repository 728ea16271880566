"""Which linear layers of a pipeline an adapter changes, by what they do and where they are."""

import re
from collections.abc import Iterator, Mapping, Sequence, Set

from torch import nn

from mmdit.checks import listed, one_of, whole_number
from mmdit.errors import UserError

# By the names of layers inside a block; all networks of this project share them.
ATTENTION = r"\.(attention2?|cross)_(in\.[qkv]|out)$"
MLP = r"\.(mlp\.fc[12]|gate|up|down)$"
TARGETS = {"attention": ATTENTION, "attention+mlp": f"{ATTENTION}|{MLP}", "all": r"$"}
PARTS = {
    "mmdit": "mmdit",
    "clip_l": "text.clip_l.model",
    "clip_g": "text.clip_g.model",
    "t5": "text.t5.model",
}


def linear_layers(root: nn.Module, part: str) -> dict[str, nn.Linear]:
    """The linear layers of a part of a pipeline, by their names in the pipeline.

    Args:
        root: a `Pipeline`.
        part: 'mmdit', 'clip_l', 'clip_g' or 't5'.

    Raises:
        UserError: the pipeline lacks this part.
    """
    one_of("parts", part, PARTS)
    try:
        module = root.get_submodule(PARTS[part])
    except AttributeError:
        raise UserError(f"parts: the model has no {part}") from None
    return {
        f"{PARTS[part]}.{name}": layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and ".changes." not in name
    }


def targeted(
    root: nn.Module, *, targets: str, parts: Sequence[str], blocks: Sequence[int] | str | None
) -> dict[str, nn.Linear]:
    """The linear layers of a pipeline that an adapter changes, by name.

    Args:
        root: a `Pipeline`.
        targets: 'attention' (queries, keys, values, outputs), 'attention+mlp' or 'all', modulation
            and embeddings included.
        parts: of the pipeline: 'mmdit', 'clip_l', 'clip_g', 't5'.
        blocks: indices of the network's blocks, as [0, 1, 2] or '12-23,37'; None is all, and what
            is outside of blocks.

    Raises:
        UserError: nothing is left, or an argument names nothing that is there.
    """
    one_of("targets", targets, TARGETS)
    listed("parts", parts)
    pattern = re.compile(TARGETS[targets])
    found: dict[str, nn.Linear] = {}
    for part in parts:
        layers = linear_layers(root, part)
        if part == "mmdit" and blocks is not None:
            layers = in_blocks(layers, set(numbers(blocks)))
        found |= {name: layer for name, layer in layers.items() if pattern.search(name)}
    if not found:
        raise UserError(f"targets={targets} names no layer of parts={list(parts)}")
    return found


def in_blocks(layers: Mapping[str, nn.Linear], chosen: Set[int]) -> dict[str, nn.Linear]:
    """Those of the network's layers that are in the chosen blocks.

    Raises:
        UserError: there is no such block.
    """
    block = r"^mmdit\.(?:blocks\.(\d+)|last_block)\."
    homes = {name: match for name in layers if (match := re.match(block, name))}
    depth = len({match[0] for match in homes.values()})
    indices = {name: int(match[1] or depth - 1) for name, match in homes.items()}
    if missing := sorted(chosen - {*indices.values()}):
        raise UserError(
            f"blocks: the network has blocks 0 to {depth - 1}, not {', '.join(map(str, missing))}"
        )
    return {name: layers[name] for name, index in indices.items() if index in chosen}


def numbers(blocks: Sequence[int] | str) -> Iterator[int]:
    """Indices from a list, or from a text like '0,12-23'.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(blocks, str):
        yield from (whole_number("blocks", block, 0) for block in blocks)
        return
    for part in blocks.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"blocks={blocks!r} must be indices like '0,12-23'")
        yield from range(int(match[1]), int(match[2] or match[1]) + 1)
