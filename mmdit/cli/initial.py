"""Start from weights: `initial=<source>` in place of the networks that a config describes.

What a run starts from is decided in this order: a checkpoint of the run itself (`resume=`), then
`initial=`, then random weights of a fresh seed.
"""

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mmdit.adapters.targets import PARTS
from mmdit.checks import did_you_mean, expanded, listed, nearest, number, one_of
from mmdit.cli.students import student_of, take_over
from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.flow.objective import Objective
from mmdit.latents.sources import FromCache
from mmdit.loading import Public, Run, Source, open_source
from mmdit.models.backbone import Backbone, PatchBackbone, changed
from mmdit.models.clip import CLIPTextModel
from mmdit.models.concat import with_extra_channels
from mmdit.models.t5 import T5Encoder
from mmdit.pipeline import Pipeline
from mmdit.printable import logger
from mmdit.registry import describe
from mmdit.runs.checkpoint import config_beside
from mmdit.text.conditioning import ENCODERS, TextConditioner, TextEncoder
from mmdit.text.waiting import WaitingEncoder

log = logger("mmdit.train")

# Sections of a config that come with the weights, which the command line may not name beside them.
COMES_WITH = (
    "model",
    "model@reference",
    "reference",
    "match",
    "autoencoder",
    "text",
    "formulation",
)
# Changes of the network that may be asked for by name, by their keys.
CHANGES = tuple(
    f"model.{n}" for n in ("qk_norm", "position_size", "position_grid", "position_base")
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Initial(NamedTuple):
    """Weights that a run starts from."""

    pipeline: Pipeline
    source: str  # where they are: a path from the root of the file system, or a hub id
    sha256: str

    @property
    def base(self) -> dict[str, Any]:
        """What an adapter states about the model that it was trained on, and how to sample it."""
        pipe = self.pipeline
        defaults = {name: getattr(pipe, name) for name in ("image_size", "steps", "guidance")}
        return {"source": self.source, "sha256": self.sha256, **defaults}


def given_keys() -> set[str]:
    """The keys that the command line names: `model`, `training.steps`, `objective/timesteps`."""
    words: Sequence[str] = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    return {word.lstrip("+~").partition("=")[0] for word in words}


def open_initial(config: DictConfig, given: Collection[str]) -> Initial | None:
    """Open the weights of `initial=`, and take over into the config what comes with them.

    That is the architecture, image size, steps and guidance, and the objective, unless the command
    line names it.

    Args:
        config: changed.
        given: see `given_keys`.

    Raises:
        UserError: there are no such weights, or the command line describes other networks.
    """
    if config.initial is None:
        expect_fresh(config)
        return None
    sections = {key: key.partition(".")[0].partition("/")[0] for key in given}
    named = sorted(key for key, section in sections.items() if section in COMES_WITH)
    if refused := [key for key in named if key not in ("text.dropout", *CHANGES)]:
        raise UserError(
            f"{refused[0]}: the {sections[refused[0]]} comes with initial={config.initial}; "
            f"leave one of them out. Of its network, {', '.join(CHANGES)} may be changed"
        )
    path = expanded(config.initial)
    source = open_source(path if path.exists() else config.initial)
    pipeline = whole_model(source, config.initial)
    network = changed_as_asked(pipeline.mmdit, config, given)
    objective = pipeline.objective
    if any(section == "objective" for section in sections.values()):
        objective = instantiate(config.objective)
        assert isinstance(objective, Objective)
        log.info("note: objective is that of the config, not that of %s", config.initial)
    else:
        config.objective = OmegaConf.create(describe(objective))
    defaults = {name: getattr(pipeline, name) for name in ("image_size", "steps", "guidance")}
    if (student := take_over(config, pipeline, given)) is not None:
        torch.manual_seed(config.seed)
        network = student.network(network)
        defaults |= {"steps": student.steps, "guidance": 1.0}
    if config.get("sampler") is not None:  # a policy is sampled from as its images were judged
        defaults |= {name: config.sampler[name] for name in ("steps", "guidance")}
    for name, value in defaults.items():
        key = name if name == "image_size" else f"sampling.{name}"
        if key not in given:
            OmegaConf.update(config, key, value)
        defaults[name] = OmegaConf.select(config, key)
    # Built again, so that checkpoints describe what is trained.
    rebuilt = Pipeline(
        mmdit=network,
        text=text_as_asked(pipeline.text, source, config, given),
        autoencoder=pipeline.autoencoder,
        objective=objective,
        **defaults,
    )
    # An impossible size shows now; the message names the size that the weights were trained at.
    sized = pipeline if network is pipeline.mmdit else rebuilt
    sized.latent_size(config.image_size, config.image_size)
    pipeline = rebuilt
    if student is not None:
        student.check(pipeline)
    keep_world(config, source, given)
    config.model = OmegaConf.create(describe(pipeline.mmdit))
    config.autoencoder.trained = False
    found = str(path.resolve()) if path.exists() else str(config.initial)
    return Initial(pipeline, found, source.sha256)


def expect_fresh(config: DictConfig) -> None:
    """Raise UserError if a config without `initial=` asks for what needs weights to start from."""
    for key in ("base_dtype", "train", "start_words", "extra_channels"):
        if config[key] is not None:
            raise UserError(f"{key}={config[key]} needs weights to start from: initial=<source>")
    if config.get("adapter") is not None:
        raise UserError("adapter= needs weights to adapt: initial=<run, file, folder or hub id>")
    if student_of(config) is not None:
        raise UserError("student= needs a teacher: initial=<run, file, folder or hub id>")


def keep_world(config: DictConfig, source: Source, given: Collection[str]) -> None:
    """Draw shapes from the world that the weights know, so that what it holds out stays unseen.

    That is its `data.seed`, unless the command line names it. Another `seed` then repeats training
    in the same world.
    """
    if not isinstance(source, Run) or "data.seed" in given:
        return
    known = config_beside(source.path).get("data") or {}
    both = (config.data.get("_target_"), known.get("_target_"))
    if both == ("mmdit.data.Shapes",) * 2 and known["seed"] != config.data.seed:
        config.data.seed = known["seed"]
        log.info(
            "note: data.seed=%d is that of %s: what it holds out stays unseen",
            known["seed"],
            config.initial,
        )


def text_as_asked(
    text: TextConditioner, source: Source, config: DictConfig, given: Collection[str]
) -> TextConditioner:
    """The text encoders with the dropout that the command line asks for; they wait if they can."""
    rate = text.dropout
    if "text.dropout" in given:
        rate = number("text.dropout", config.text.dropout, 0, 1)
    encoders: dict[str, Any] = dict(zip(ENCODERS, text.encoders, strict=True))
    if isinstance(source, Public) and waits(config):
        for kind, encoder in encoders.items():
            if isinstance(encoder, TextEncoder):
                again = partial(reopened, source.path, kind, source.sha256)
                encoders[kind] = WaitingEncoder(encoder, again)
    return TextConditioner(**encoders, dropout=rate, empty_prompt=text.empty_prompt)


def waits(config: DictConfig) -> bool:
    """Whether training needs the text encoders before its first step alone.

    Embeddings are then cached, and an adapter is trained that leaves the encoders as they are.
    """
    adapter = config.get("adapter")
    cached = issubclass(get_class(config.latents._target_), FromCache)
    alone = adapter is not None and adapter.get("parts") == ["mmdit"]
    return cached and alone and config.get("student") is None  # a student's captions come later


def reopened(path: Path, kind: str, sha256: str) -> CLIPTextModel | T5Encoder:
    """The network of a text encoder, from weights that have been verified before.

    Raises:
        UserError: they are no longer there, or others are.
    """
    source = Public(path, [kind], allow_pickle=False, verify=False)
    if source.sha256 != sha256:  # files that have not changed are not read again
        raise UserError(f"{path}: its weights were changed while they were in use; start again")
    model = source.place.load(kind)
    assert isinstance(model, CLIPTextModel | T5Encoder)
    return model


def whole_model(source: Source, name: str) -> Pipeline:
    """The model of a source, with all its parts and without an adapter.

    Raises:
        UserError: a part is missing or damaged, or the source is an adapter.
    """
    try:
        pipeline = source.pipeline()
    except UserError as error:
        what = str(error).partition(". (Elsewhere")[0]  # keys that sampling has
        raise UserError(
            f"initial={name}: {what}. Training starts from a whole model: network, text encoders "
            "with their tokenizers, and autoencoder"
        ) from None
    if pipeline.adapters:
        raise UserError(
            f"initial={name} is an adapter: start from the model that it was trained on"
        )
    return pipeline


def changed_as_asked(network: Backbone, config: DictConfig, given: Collection[str]) -> Backbone:
    """The network with the changes that the command line asks for by name, which are logged.

    Raises:
        UserError: the network has no such property, or it cannot be changed.
    """
    asked = {key: OmegaConf.select(config, key) for key in CHANGES if key in given}
    if config.extra_channels is not None:
        asked["extra_channels"] = config.extra_channels
    if not asked:
        return network
    if config.get("adapter") is not None:
        raise UserError(
            f"{min(asked)}: an adapter leaves the network that it is for as it is; finetune the "
            "network itself, without adapter="
        )
    if not isinstance(network, PatchBackbone):
        raise UserError(f"{min(asked)}: {type(network).__name__} has no such property")
    own = describe(network)
    different = {
        name: value
        for key, value in asked.items()
        if own.get(name := key.removeprefix("model.")) != value
    }
    if different.get("qk_norm") is False:
        raise UserError("model.qk_norm=false: QK-norm can be added to weights, not taken away")
    for name, value in different.items():
        log.info("note: model.%s=%s is not that of the weights, as asked", name, value)
    extra = different.pop("extra_channels", None)
    network = changed(network, **different) if different else network
    return network if extra is None else with_extra_channels(network, extra)


def select(pipeline: Pipeline, trained: Sequence[str] | None) -> None:
    """Make the named parts of a model trainable, in float32, and freeze all else.

    Args:
        pipeline: starts from weights.
        trained: 'mmdit', 'clip_l', 'clip_g', 't5', 'text' for all three, or a module of one, as
            'mmdit.blocks.3'; None is the network.

    Raises:
        UserError: there is no such part.
    """
    pipeline.requires_grad_(False)
    names = ["mmdit"] if trained is None else trained
    listed("train", names)
    for name in names:
        part, _, rest = str(name).partition(".")
        if part not in {*PARTS, "text"}:
            one_of("train", part, (*PARTS, "text"))
        path = ".".join(filter(None, (PARTS.get(part, part), rest)))
        try:
            module = pipeline.get_submodule(path)
        except AttributeError:
            known = [key for key, _ in pipeline.mmdit.named_modules(prefix="mmdit") if key]
            hint = did_you_mean(nearest(name, known))
            raise UserError(f"train={name}: the model has no such part.{hint}") from None
        widened(module).requires_grad_(True)
    if not any(weight.requires_grad for weight in pipeline.parameters()):
        raise UserError(f"train={list(names)} names nothing that has weights")


def widened(module: nn.Module) -> nn.Module:
    """A module whose weights are float32, as trained ones must be."""
    for weight in module.parameters():
        weight.data = wide(weight.data)
    return module
