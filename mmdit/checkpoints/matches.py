"""Find a model in a file: under a published prefix, or one that a training wrapper left."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from mmdit.bounds import parse_json
from mmdit.checkpoints.archive import Archive
from mmdit.checkpoints.diagnosis import KIND_NAMES, PUBLISHED
from mmdit.checkpoints.formats import ADAPTERS, FORMATS, Description, Format
from mmdit.checkpoints.headers import Info
from mmdit.errors import UserError
from mmdit.nn.block_codes import Codes

ENTRY = "mmdit.descriptions"  # metadata key with the description of each model, in our own files
# Scalars that training programs save beside the text encoders and nothing reads.
STRAY = re.compile(r"(.*\.)?text_encoders\.\w+\.logit_scale")


@dataclass(frozen=True, eq=False)
class Match:
    """A model found in an archive.

    Attributes:
        archive: the file or files.
        format: the model and its layout.
        prefix: what its keys begin with, including the prefix of a wrapper.
        wrapper: the part of the prefix that a training wrapper added; '' without one.
        others: prefixes of the other models in the archive.
    """

    archive: Archive
    format: Format
    prefix: str
    wrapper: str = ""
    others: frozenset[str] = frozenset()

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        """The tensors under the prefix, by key without the prefix.

        Keys under no known prefix belong to no model. They are included so that they are reported,
        under names that cannot be those of the model's tensors.
        """
        longest_first = sorted({self.prefix, *self.others}, key=len, reverse=True)
        mine: dict[str, Info] = {}
        for key, info in self.archive.infos.items():
            home = next((prefix for prefix in longest_first if key.startswith(prefix)), None)
            if home == self.prefix:
                mine[key.removeprefix(self.prefix)] = info
            elif home is None and not STRAY.fullmatch(key):
                mine[f"{key} (not under {self.prefix})"] = info
        return mine

    @cached_property
    def needed(self) -> Mapping[str, Info]:
        """`infos` without a projection that is the identity, which stands for none at all."""
        infos, key = dict(self.infos), self.format.identity
        square = key in infos and len(shape := infos[key].shape) == 2 and shape[0] == shape[1]
        if square and torch.equal(self.tensor(key).float(), torch.eye(shape[0])):
            del infos[key]
        return infos

    def tensor(self, key: str) -> Tensor:
        """The tensor of a key without the prefix."""
        return self.archive[self.prefix + key]

    def codes(self, key: str) -> Codes | None:
        """The codes of a matrix; see `Archive.codes`."""
        return self.archive.codes(self.prefix + key)

    def decodes(self, key: str) -> bool:
        """Whether a tensor is decoded when it is read; see `Archive.decodes`."""
        return self.archive.decodes(self.prefix + key)

    def reopened(self) -> Self:
        """The same model in a mapping of its own; see `Archive.reopened`."""
        return replace(self, archive=self.archive.reopened())


def find(archive: Archive, kind: str, *, layout: str | None = None) -> Match | None:
    """Find the model of this kind in an archive; None if there is none.

    Args:
        archive: where to look.
        kind: see `Format.kind`.
        layout: the layout to prefer where both have the same keys; None prefers 'original', except
            for a whole CLIP (both towers), which only has 'diffusers'.

    Raises:
        UserError: the archive holds several.
    """
    if layout is None and any(key.startswith("vision_model.") for key in archive.infos):
        layout = "diffusers"
    formats = [format for format in FORMATS if format.kind == kind]
    if not any(format.prefixes_in(archive.infos, archive.parts) for format in formats):
        return None
    keys = [key for key in archive.infos if not ADAPTERS.search(key)]
    prefixes = {format: format.prefixes_in(keys, archive.parts) for format in FORMATS}
    used = {prefix for found in prefixes.values() for prefix in found}
    matches: dict[str, Match] = {}
    for format in sorted(formats, key=lambda format: format.layout != (layout or "original")):
        bare_other = not layout and format.another(archive.infos)
        for prefix, wrapper in prefixes[format].items():
            if prefix or not bare_other or own_description(archive, kind):
                others = other_prefixes(archive, prefix, wrapper) | used - {prefix, ""}
                match = Match(archive, format, prefix, wrapper, frozenset(others))
                matches.setdefault(prefix, match)
    published = [match for match in matches.values() if not match.wrapper][:1]
    found = published + [match for match in matches.values() if match.wrapper]
    if len(found) > 1:
        names = [match.prefix.removesuffix(".") for match in found]
        listed = ", ".join(f"{name!r}" if name else "no prefix" for name in names)
        chosen = next(name for name in names if name)
        raise UserError(
            f"{archive.name} holds {len(found)} models of the kind {KIND_NAMES[kind]}, under "
            f"{listed}: choose one, e.g. {archive.name}:{chosen}"
        )
    return found[0] if found else None


def other_prefixes(archive: Archive, prefix: str, wrapper: str) -> set[str]:
    """Prefixes of keys that do not belong to the model under `prefix`."""
    parts = {f"{part}." for part in archive.parts if not prefix.startswith(f"{part}.")}
    if not prefix:
        return parts
    known = {*PUBLISHED, *(wrapper + other for other in PUBLISHED)}
    return (known | parts) - {prefix}


def own_description(archive: Archive, kind: str) -> Description:
    """The description of a model in a file of ours; empty in files of other programs.

    Raises:
        UserError: the entry of the header is damaged.
    """
    try:
        return dict(parse_json(archive.metadata.get(ENTRY, "{}").encode()).get(kind, {}))
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{archive.name}: its header's entry {ENTRY} is damaged") from None
