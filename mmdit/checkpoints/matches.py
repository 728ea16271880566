"""Where in a file a model stands: under a published prefix, or one that a training wrapper left."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmdit.bounds import parse_json
from mmdit.checkpoints.archive import Archive
from mmdit.checkpoints.diagnosis import NAMES, PUBLISHED
from mmdit.checkpoints.formats import ADAPTERS, FORMATS, Description, Format
from mmdit.checkpoints.headers import Info
from mmdit.errors import UserError

ENTRY = "mmdit.descriptions"  # of the header's metadata, in the files we write
# Scalars that trainers leave beside the text encoders, and nothing reads.
STRAY = re.compile(r"(.*\.)?text_encoders\.\w+\.logit_scale")


@dataclass(frozen=True, eq=False)
class Match:
    """A model found in an archive.

    Attributes:
        prefix: before its keys; all of it, where a wrapper's prefix stands before the format's.
        wrapper: that part of the prefix that no format has.
        others: prefixes of the other models in the archive.
    """

    archive: Archive
    format: Format
    prefix: str
    wrapper: str = ""
    others: frozenset[str] = frozenset()

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        """What stands under the prefix, the prefix stripped.

        Keys under no known prefix belong to no model; they are in here too, to be reported, under
        names that stand for none of its tensors.
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
        """`infos` without a projection that is the identity, which means that there is none."""
        infos, key = dict(self.infos), self.format.identity
        square = key in infos and len(shape := infos[key].shape) == 2 and shape[0] == shape[1]
        if square and torch.equal(self.tensor(key).float(), torch.eye(shape[0])):
            del infos[key]
        return infos

    def tensor(self, key: str) -> Tensor:
        return self.archive[self.prefix + key]


def find(archive: Archive, kind: str, *, layout: str | None = None) -> Match | None:
    """Where a model of this kind stands in the archive, if it does.

    Args:
        layout: which to prefer where the keys of both are the same; None is 'original', but for a
            whole CLIP, which has but one.

    Raises:
        UserError: it stands in several places.
    """
    if layout is None and any(key.startswith("vision_model.") for key in archive.infos):
        layout = "diffusers"
    formats = [format for format in FORMATS if format.kind == kind]
    if not any(format.places(archive.infos, archive.parts) for format in formats):
        return None
    keys = [key for key in archive.infos if not ADAPTERS.search(key)]
    places = {format: format.places(keys, archive.parts) for format in FORMATS}
    everywhere = {place for found in places.values() for place in found}
    matches: dict[str, Match] = {}
    for format in sorted(formats, key=lambda format: format.layout != (layout or "original")):
        bare_other = not layout and format.another(archive.infos)
        for prefix, wrapper in places[format].items():
            if prefix or not bare_other or own_description(archive, kind):
                others = other_prefixes(archive, prefix, wrapper) | everywhere - {prefix, ""}
                match = Match(archive, format, prefix, wrapper, frozenset(others))
                matches.setdefault(prefix, match)
    published = [match for match in matches.values() if not match.wrapper][:1]
    found = published + [match for match in matches.values() if match.wrapper]
    if len(found) > 1:
        names = [match.prefix.removesuffix(".") for match in found]
        told = ", ".join(f"{name!r}" if name else "no prefix" for name in names)
        chosen = next(name for name in names if name)
        raise UserError(
            f"{archive.name} holds {len(found)} of the kind {NAMES[kind]}, under {told}: choose "
            f"one, as {archive.name}:{chosen}"
        )
    return found[0] if found else None


def other_prefixes(archive: Archive, prefix: str, wrapper: str) -> set[str]:
    """Prefixes under which nothing belongs to the model that stands under `prefix`."""
    parts = {f"{part}." for part in archive.parts if not prefix.startswith(f"{part}.")}
    if not prefix:
        return parts
    known = {*PUBLISHED, *(wrapper + other for other in PUBLISHED)}
    return (known | parts) - {prefix}


def own_description(archive: Archive, kind: str) -> Description:
    """What a file of ours tells of a model beyond its shapes; empty for a file of others."""
    try:
        return dict(parse_json(archive.metadata.get(ENTRY, "{}").encode()).get(kind, {}))
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{archive.name}: its header's entry {ENTRY} is damaged") from None
