"""Locating weights: a file, a folder, or a model on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmdit.checkpoints.archive import (
    GGUF,
    PICKLES,
    Archive,
    open_file,
    open_shards,
    split_part,
)
from mmdit.checkpoints.diagnosis import KIND_NAMES, recognize
from mmdit.checkpoints.folders import SUBFOLDERS, check_config, hints_of, read_config, read_json
from mmdit.checkpoints.presets import PRESETS
from mmdit.checkpoints.public import find, load
from mmdit.checks import expanded
from mmdit.dtypes import expect_computable
from mmdit.errors import UserError, first_line
from mmdit.nn.network import Network
from mmdit.printable import logger

log = logger("mmdit.checkpoints")

# `owner/name`, `owner/name@revision`, `owner/name/file.safetensors`, as in the hub's own tools.
HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>refs/pr/\d+|\w[\w.-]*))?"
    r"(/(?P<file>(\w[\w.-]*/)*\w[\w.-]*\.(safetensors|gguf)))?"
)
SUFFIXES = (".safetensors", GGUF)
ADAPTER_CONFIG = "adapter_config.json"
# Names of the encoders' separate files, next to the single files in repositories on the hub.
STANDALONE = {
    "clip_l": ("clip_l.safetensors",),
    "clip_g": ("clip_g.safetensors",),
    "t5": ("t5xxl_fp16.safetensors", "t5xxl_bf16.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
}
# A model with its own repository, like openai/clip-vit-large-patch14, is at the repository's root.
ALONE = ("model*.safetensors", "diffusion_pytorch_model*.safetensors", "merges.txt", "spiece.model")
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)(\.\w+)?\.safetensors(\.index(\.\w+)?\.json)?"
)
# `model.fp16.safetensors`, `model.safetensors.index.fp16.json`: next to the plain ones, or alone.
VARIANT = re.compile(r"model\.\w+\.safetensors|\.index\.\w+\.json")
SHARD = re.compile(r"(diffusion_pytorch_model|model)\S*-\d+-of-(\d+)\.safetensors")


def local(source: str | Path, folders: Sequence[str]) -> Path:
    """Resolve a source to a local file or folder, downloading it from the hub if necessary.

    Args:
        source: a path; the name of a preset; or `owner/name` on the hub, optionally followed by
            `@revision` (branch, tag or commit) and `/path/in/it.safetensors`. After a file, `:ema`
            selects the tensors with that prefix, or a pickle's nested dict of that name.
        folders: subfolders to download from a repository in diffusers' layout. Weights at the root
            of a repository with a single model are downloaded as well.

    Raises:
        UserError: the file, folder or model does not exist, or it cannot be downloaded.
    """
    path = expanded(source)
    if path.exists() or split_part(path)[1]:
        return path
    head, _, part = str(source).rpartition(":")
    if Path(head).suffix in SUFFIXES:
        return Path(f"{local(head, folders)}:{part}")
    source = PRESETS[str(source)].hub if str(source) in PRESETS else source
    on_hub = HUB_ID.fullmatch(str(source))
    names_file = on_hub is not None and on_hub["file"] is not None
    like_a_path = path.suffix in (*SUFFIXES, *PICKLES) and not names_file
    if like_a_path or on_hub is None or Path(source).parents[-2].is_dir():
        raise UserError(f"{source}: there is no such file or folder")
    return download(folders=folders, **on_hub.groupdict())


def download(
    repository: str,
    folders: Sequence[str],
    *,
    revision: str | None = None,
    file: str | None = None,
) -> Path:
    """Download a file of a repository, or a snapshot of its folders, unless they are cached.

    Raises:
        UserError: the repository, revision or file does not exist, access is restricted, or the
            hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision))
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=["*.json", *ALONE, *(f"{folder}/*" for folder in folders)],
                ignore_patterns=["*.bin", "*.msgpack", "*.onnx*", "*.h5", "*.fp16.*", "*.fp16-*"],
            )
        )
    except Exception as error:  # the library's own classes and its HTTP client's
        asked = repository + (f"@{revision}" if revision else "") + (f"/{file}" if file else "")
        raise UserError(_hub_message(repository, asked, error)) from None


def _hub_message(repository: str, asked: str, error: Exception) -> str:
    names = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in names:
        return (
            f"{asked} is gated: accept its license at https://huggingface.co/{repository}, "
            "then log in with `hf auth login` (or set HF_TOKEN)"
        )
    if "RepositoryNotFoundError" in names or "HFValidationError" in names:
        return (
            f"{asked}: there is no such file or folder here, nor such a model on the hub "
            "(a private one needs `hf auth login`)"
        )
    if "RevisionNotFoundError" in names:
        return f"{asked}: {repository} is on the hub, but has no such branch, tag or commit"
    if "RemoteEntryNotFoundError" in names:
        return (
            f"{asked}: there is no such file here, and {repository} on the hub has none either; "
            f"its files are listed at https://huggingface.co/{repository}/tree/main"
        )
    return (
        f"{asked}: there is no such file or folder here, it is not in the hub's cache, and "
        f"the hub could not be reached ({first_line(error)}). Download it where there is a "
        f"network (`hf download {repository}`), or give the path of a file or folder"
    )


class Place:
    """A location of public weights; its files are opened on demand, each of them once.

    Args:
        source: a file; a folder in diffusers' layout, or one of its subfolders; a folder with the
            encoders' separate files; or anything else that `local` resolves.
        folders: as in `local`.
        allow_pickle: read the tensors of a .ckpt or .pt file if `source` names one.
        verify: compare files with their known hashes, and check all values for NaN.
        keep_quantized: linear layers keep weights in the codes that files have.

    Raises:
        UserError: it does not exist, and cannot be downloaded.
    """

    def __init__(
        self,
        source: str | Path,
        folders: Sequence[str] = (),
        *,
        allow_pickle: bool = False,
        verify: bool = True,
        keep_quantized: bool = False,
    ) -> None:
        self.path = local(source, folders)
        self.allow_pickle, self.verify = allow_pickle, verify
        self.keep_quantized = keep_quantized
        self._archives: dict[Path, Archive] = {}
        self._verified: set[Path] = set()

    def like(self, source: str | Path, folders: Sequence[str] = ()) -> "Place":
        """Another location, with the same rules for opening files."""
        rules = {"allow_pickle": self.allow_pickle, "verify": self.verify}
        rules["keep_quantized"] = self.keep_quantized
        return Place(source, folders, **rules)

    def opened(self, path: Path) -> Archive:
        """Open a file of this location; its header is read only once."""
        if path not in self._archives:
            pickle = self.allow_pickle and path == self.path
            shards = path.suffix == ".json"
            archive = open_shards(path) if shards else open_file(path, allow_pickle=pickle)
            self._archives[path] = archive
        return self._archives[path]

    def weights_of(self, kind: str) -> tuple[Archive, Path]:
        """The archive that contains a model of this kind, and its folder.

        Raises:
            UserError: there are no weights or several candidates, or the weights are damaged.
        """
        archive, folder = self._find(kind)
        if self.verify and not self._verified.issuperset(archive.paths):
            archive.verify()
            self._verified.update(archive.paths)
        return archive, folder

    def _find(self, kind: str) -> tuple[Archive, Path]:
        path = self.path
        file = split_part(path)[0]
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"{file} is not a regular file: give a file or a folder of weights")
        if file.is_file():
            if path.name.endswith(".index.json"):
                return self.opened(path), path.parent
            if match := SHARD.fullmatch(path.name):
                raise UserError(
                    f"{path} is one of {int(match[2])} shards: give their folder, or the "
                    "*.safetensors.index.json beside it"
                )
            return self.opened(path), path.parent
        for folder in (path / SUBFOLDERS[kind] if kind in SUBFOLDERS else path, path):
            found = sorted(f.name for f in folder.glob("*") if WEIGHTS.fullmatch(f.name))
            if found:
                plain = [name for name in found if not VARIANT.search(name)] or found
                index = [name for name in plain if name.endswith(".json")]
                chosen = folder / (index or plain)[0]
                return self.opened(chosen), folder
            if shards := [f.name for f in folder.glob("*") if SHARD.fullmatch(f.name)]:
                raise UserError(
                    f"{folder} holds {len(shards)} shards, but no *.safetensors.index.json that "
                    "lists them: download it too"
                )
        for folder in (path, path / "text_encoders"):
            for name in STANDALONE.get(kind, ()):
                if (folder / name).is_file():
                    return self.opened(folder / name), folder
        archives: list[Archive] = []
        holding: list[Archive] = []
        for suffix in SUFFIXES:  # GGUF files only if no other file has the model
            if not holding:
                archives += [self.opened(file) for file in sorted(path.glob(f"*{suffix}"))]
                holding = [archive for archive in archives if find(archive, kind) is not None]
        if len(holding) == 1:
            return holding[0], path
        if len(holding) > 1:
            names = ", ".join(archive.name.name for archive in holding)
            raise UserError(
                f"{path} holds several files with a {KIND_NAMES[kind]}: name one of {names}"
            )
        if adapter := adapter_in(path):
            raise UserError(f"{path} holds no {KIND_NAMES[kind]}: {adapter}. Nothing was loaded")
        places = f"{path / SUBFOLDERS[kind]} and {path}" if kind in SUBFOLDERS else str(path)
        there = [file for pattern in ("*", "*/*") for file in path.glob(pattern)]
        pickles = [file.name for file in there if file.suffix in PICKLES]
        hint = f"; pickles like {pickles[0]} are read only if named as a file" if pickles else ""
        held = [f"{a.name.name} holds {what}" for a in archives if (what := recognize(a.infos))]
        raise UserError(
            f"{path} holds no {KIND_NAMES[kind]}: no *.safetensors or *.gguf in {places} has "
            f"one{hint}. "
            + (
                "; ".join(held[:5])
                or "Incomplete downloads end in .incomplete or .part; a single file on the hub "
                "is named like owner/name/file.safetensors"
            )
        )

    def load(self, kind: str, *, dtype: torch.dtype | None = None, **hints: Any) -> Network:
        """Load the model of this kind; see `mmdit.checkpoints.public.load`.

        A config.json next to the weights supplies what their shapes do not determine, and is
        compared with them.

        Raises:
            UserError: there is no such model, or it does not fit.
        """
        expect_computable(dtype)
        archive, folder = self.weights_of(kind)
        layout = layout_of(archive, folder)
        config = read_config(folder, kind) if layout else {}
        with torch.device("cpu"):  # even inside a block that builds networks on meta
            module = load(
                archive,
                kind,
                layout=layout,
                hints={**hints_of(kind, config), **hints},
                dtype=dtype,
                verify=self.verify,
                keep_quantized=self.keep_quantized,
            )
        check_config(kind, module, config, folder)
        return module


def adapter_in(folder: Path) -> str | None:
    """Describe the PEFT adapter in a folder, or in a subfolder of a pipeline; None without one."""
    for place in (folder, *(folder / name for name in SUBFOLDERS.values())):
        path = place / ADAPTER_CONFIG
        if path.is_file():
            base = str(read_json(path).get("base_model_name_or_path", "not named"))
            return (
                f"{path} describes a LoRA or another PEFT adapter, which modifies a model but is "
                f"not one. Only base weights can be loaded; its base model is {base[:100]!r}"
            )
    return None


def layout_of(archive: Archive, folder: Path) -> str | None:
    """'diffusers' for weights in a folder with a config.json; None for any other file."""
    named = archive.name == folder or WEIGHTS.fullmatch(archive.name.name)
    return "diffusers" if named and (folder / "config.json").is_file() else None
