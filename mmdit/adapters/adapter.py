"""Adapters as a whole: made for a model, attached to it, scaled, fused and removed."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Self, TypeAlias

from torch import Tensor, nn

from mmdit.adapters.layers import AdaptedLinear, Change, FusedLinear
from mmdit.adapters.targets import targeted
from mmdit.adapters.words import AdaptedEmbedding, NewWords, read_new_words
from mmdit.checks import did_you_mean, nearest, number
from mmdit.errors import UserError
from mmdit.models.tabulated import Tables, tabulated_adapters
from mmdit.registry import build, register

Make = Callable[..., Change]
Addition: TypeAlias = Change | NewWords
Adapted: TypeAlias = AdaptedLinear | AdaptedEmbedding


@register
class Adapter(nn.Module):
    """Changes of linear layers or new words, each under the name of its layer in a `Pipeline`.

    Its state dict has keys like `mmdit.blocks.0.image.attention_in.q.down.weight`.

    Args:
        changes: by layer, a `Change` or, of token embeddings, `NewWords`; or its description.
        base: the source and SHA-256 of the weights that it was trained on, with the image size,
            steps and guidance to sample with; empty if unknown.

    Example:
        adapter = read_adapter("style.safetensors", pipe)
        pipe.load_lora(adapter, scale=0.8)
    """

    def __init__(
        self, *, changes: Mapping[str, Any], base: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.base = dict(base or {})
        for name, change in changes.items():
            *path, last = name.split(".")
            parent: nn.Module = self
            for step in path:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = parent.get_submodule(step)
            module = build(dict(change)) if isinstance(change, Mapping) else change
            if not isinstance(module, Addition):
                raise UserError(f"adapter: {name} is a {type(module).__name__}, not a change")
            parent.add_module(last, module)

    @classmethod
    def over(
        cls,
        root: nn.Module,
        make: Make,
        *,
        targets: str = "attention",
        parts: Sequence[str] = ("mmdit",),
        blocks: Sequence[int] | str | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> Self:
        """A new adapter, which changes nothing yet.

        Args:
            root: the pipeline.
            make: the change of a layer, from its widths `inputs` and `outputs`.
            targets, parts, blocks: see `targeted`.
            base: as in the constructor.

        Example:
            adapter = Adapter.over(pipe, partial(LoRA, rank=16), targets="attention+mlp")
        """
        changes = {}
        for name, layer in targeted(root, targets=targets, parts=parts, blocks=blocks).items():
            change = make(inputs=layer.in_features, outputs=layer.out_features)
            change.reset_parameters(layer.weight)
            changes[name] = change
        return cls(changes=changes, base=base)

    @property
    def changes(self) -> dict[str, Addition]:
        """The changes by layer."""
        found = {name: part for name, part in self.named_modules() if isinstance(part, Addition)}
        return {at: change for at, change in found.items() if at.rpartition(".")[0] not in found}


def attach(root: nn.Module, adapter: Adapter, name: str, *, scale: float = 1.0) -> None:
    """Add the changes of an adapter to a model; they take effect at once.

    Each stays in its own dtype, on the device of its layer.

    Args:
        root: the pipeline.
        adapter: its changes become part of the model.
        name: under which to find it again.
        scale: factor of its changes.

    Raises:
        UserError: the adapter is for another model, or one of this name is there; the model is as
            it was.
    """
    scale = number("scale", scale)
    expect_scaled(adapter.changes, scale)
    if not name or "." in name:
        raise UserError(f"name={name!r} must be a name without dots")
    if name in attached(root):
        raise UserError(f"an adapter {name!r} is there already: choose another name, or unload it")
    if fused(root):
        raise UserError("the adapters of this model are fused: unload them before adding another")
    changes = adapter.changes
    expect_no_tables(root, changes, name)
    layers = layers_of(root)
    check_fits(changes, layers, name)
    for at, change in changes.items():
        layer = layers[at]
        if not isinstance(layer, Adapted):
            layer = adapting(layer)
            root.set_submodule(at, layer)
        layer.changes[name] = change.to(layer.weight.device).train(layer.training)
        layer.scales[name] = scale
    read_new_words(root)


def expect_no_tables(root: nn.Module, changes: Mapping[str, Addition], name: str) -> None:
    """Raise UserError if tables have replaced a layer that an adapter changes."""
    tables = {at for at, part in root.named_modules() if isinstance(part, Tables)}
    if lost := [at for at in changes if at.rpartition(".")[0] in tables]:
        raise UserError(
            f"the adapter {name!r} changes {_some(lost)}, in whose place this model has modulation "
            "tables: load the model again, and this adapter before the tables are made"
        )


def adapting(layer: nn.Module) -> Adapted:
    """What takes the place of a layer that adapters may change."""
    if isinstance(layer, nn.Linear):
        return AdaptedLinear(layer)
    assert isinstance(layer, nn.Embedding)
    return AdaptedEmbedding(layer)


def layers_of(root: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that adapters may change, by name."""
    kinds = (nn.Linear, nn.Embedding, AdaptedEmbedding)
    return {
        name: part
        for name, part in root.named_modules()
        if isinstance(part, kinds) and ".changes." not in name
    }


def expect_scaled(changes: Mapping[str, Addition], scale: float) -> None:
    """Raise UserError if a scale is asked for where there is nothing to scale."""
    if scale != 1 and changes and all(isinstance(c, NewWords) for c in changes.values()):
        raise UserError(f"scale={scale:g}: new words are there or not; they have no scale but 1")


def check_fits(changes: Mapping[str, Addition], layers: Mapping[str, nn.Module], name: str) -> None:
    """Check that a model has each changed layer, and in the same size, and no new word twice.

    Raises:
        UserError: it does not.
    """
    if not changes:
        raise UserError(f"the adapter {name!r} changes nothing: it is empty")
    fits = {
        at: isinstance(
            layers.get(at),
            nn.Linear if isinstance(change, Change) else nn.Embedding | AdaptedEmbedding,
        )
        for at, change in changes.items()
    }
    if missing := [at for at in changes if not fits[at]]:
        raise UserError(
            f"the adapter {name!r} is for another model: this one has no {_some(missing)}"
        )
    sizes = {
        at: (c.width,) if isinstance(c, NewWords) else (c.outputs, c.inputs)
        for at, c in changes.items()
    }
    here = {at: tuple(layers[at].weight.shape)[-len(size) :] for at, size in sizes.items()}  # type: ignore[arg-type]
    if wrong := [at for at, size in sizes.items() if size != here[at]]:
        at = wrong[0]
        theirs, ours = (" x ".join(map(str, size[at])) for size in (sizes, here))
        raise UserError(
            f"the adapter {name!r} is for another model: {at} is {theirs} "
            f"in it and {ours} here ({len(wrong)} of {len(changes)} layers differ)"
        )
    for at, change in changes.items():
        there = layers[at]
        known = there.words if isinstance(there, AdaptedEmbedding) else {}
        folded = {word.casefold() for word in known}
        new = change.words if isinstance(change, NewWords) else {}
        if twice := [word for word in new if word.casefold() in folded]:
            raise UserError(
                f"the adapter {name!r}: the word {twice[0]!r} is already taught by another "
                "adapter: unload that, or give one of them another word"
            )


def adapted(root: nn.Module) -> dict[str, Adapted]:
    """The layers of a model that adapters change, by name."""
    return {name: part for name, part in root.named_modules() if isinstance(part, Adapted)}


def fused(root: nn.Module) -> dict[str, FusedLinear]:
    """The layers of a model whose weights contain the changes of adapters, by name."""
    return {name: part for name, part in root.named_modules() if isinstance(part, FusedLinear)}


def attached(root: nn.Module) -> dict[str, float]:
    """The adapters of a model with their scales, in the order in which they were attached."""
    found: dict[str, float] = {}
    for live in adapted(root).values():
        found |= live.scales
    for whole in fused(root).values():
        found |= whole.scales
    return found | tabulated_adapters(root)


def weight_of(root: nn.Module, layer: str) -> Tensor:
    """The weight (out, in) of a layer of a model, without the changes of live adapters."""
    weight = root.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight


def unused_name(root: nn.Module, stem: str) -> str:
    """A name for an adapter from that of its file, without dots, which no other has."""
    name = stem.replace(".", "_") or "adapter"
    others = attached(root)
    numbered = (f"{name}_{number}" for number in count(2))
    return name if name not in others else next(n for n in numbered if n not in others)


def adapter_in(root: nn.Module, name: str, base: Mapping[str, Any] | None = None) -> Adapter:
    """An attached adapter, sharing its weights with the model."""
    _expect_live(root, name)
    found = {at: layer.changes for at, layer in adapted(root).items()}
    changes = {at: changes[name] for at, changes in found.items() if name in changes}
    return Adapter(changes=changes, base=base)


def rescale(root: nn.Module, name: str, scale: float) -> None:
    """Set the factor of an adapter's changes; 0 turns it off.

    Raises:
        UserError: no adapter has this name, or it is fused or part of modulation tables.
    """
    scale = number("scale", scale)
    _expect_live(root, name)
    expect_scaled(adapter_in(root, name).changes, scale)
    for layer in adapted(root).values():
        if name in layer.scales and isinstance(layer, AdaptedLinear):
            layer.scales[name] = scale


def fuse(root: nn.Module) -> None:
    """Add the changes of all adapters to the weights, which costs nothing from then on.

    The weights of the model itself are kept beside them, so that `detach` restores them exactly.
    New words stay beside the embeddings, where they cost nothing.
    """
    for at, layer in adapted(root).items():
        if isinstance(layer, AdaptedLinear):
            root.set_submodule(at, FusedLinear(layer))


def detach(root: nn.Module, name: str | None = None) -> None:
    """Remove an adapter, or all; what remains of the model is as if it had never been there.

    Raises:
        UserError: no adapter has this name, it is fused with others, or part of modulation tables.
    """
    if name is not None and [*attached(root)] != [name]:
        _expect_live(root, name)
    gone = list(attached(root)) if name is None else [name]
    expect_not_in_tables(root, gone)
    for at, layer in adapted(root).items():
        for each in gone:
            if each in layer.scales:
                del layer.scales[each], layer.changes[each]
        if not layer.scales:
            root.set_submodule(at, layer.without())
    read_new_words(root)
    for at, whole in fused(root).items():
        root.set_submodule(at, whole.without())


def _expect_live(root: nn.Module, name: str) -> None:
    """Raise UserError unless there is such an adapter, and its changes are not fused."""
    if name not in (known := attached(root)):
        there = f"there are {', '.join(known)}" if known else "there is none"
        raise UserError(f"no adapter {name!r}: {there}.{did_you_mean(nearest(name, known))}")
    if fused(root):
        raise UserError(f"the adapter {name!r} is fused with the weights: unload all, and load it")
    expect_not_in_tables(root, [name])


def expect_not_in_tables(root: nn.Module, names: Sequence[str]) -> None:
    """Raise UserError if the changes of one of these adapters are part of modulation tables."""
    if fixed := [name for name in names if name in tabulated_adapters(root)]:
        raise UserError(
            f"the adapter {fixed[0]!r} is part of this model's modulation tables, and can be "
            "neither scaled, saved nor removed: load the model again"
        )


def _some(found: Sequence[str]) -> str:
    more = f" ({len(found)} such layers)" if len(found) > 1 else ""
    return f"{found[0]}{more}"
