"""What a command line asks training to do, checked before anything is built."""

import logging
import sys
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mmdit.checks import MOST_STEPS, expect, flag, number, seed_number, whole_number
from mmdit.cli.formulations import check_variant
from mmdit.cli.initial import Initial, given_keys, open_initial
from mmdit.cli.launch import Verbatim
from mmdit.cli.stages import check_recipe
from mmdit.data.dataset import Data
from mmdit.devices import available
from mmdit.engine.loader import share
from mmdit.engine.loggers import Logger, NoLogger
from mmdit.engine.settings import Settings
from mmdit.errors import UserError
from mmdit.precision import Autocast, autocast, chosen_dtype
from mmdit.printable import logger
from mmdit.processes import Processes, join, own_device, restart_remarks
from mmdit.programs import command
from mmdit.runs.folder import check_name

log = logger("mmdit.train")
VERBATIM = ("instance_prompt", "class_prompt")  # free text, which Hydra does not parse


class TrainingRequest(NamedTuple):
    """What a command line asks for, checked, with the processes and the data that are there."""

    config: DictConfig
    plain: dict[str, Any]  # the config as the run keeps it, with what was found
    settings: Settings
    device: torch.device
    text_device: torch.device | None  # of frozen text encoders, where it is another
    dtype: torch.dtype  # of the forward pass
    precision: Autocast
    processes: Processes
    initial: Initial | None  # weights to start from
    data: Data
    validation: Data  # the images of `data` that are held back
    logger: Logger
    words: list[str]  # of the command line

    @property
    def scored(self) -> bool:
        """Whether the trained model is scored; a group that is left out has no key."""
        return self.config.get("metrics") is not None


def read(config: DictConfig, text: Verbatim) -> TrainingRequest:
    """Check a config, join the processes that train together, and open the data.

    Args:
        text: values of `VERBATIM`, which go into the config.

    Raises:
        UserError: a value makes no sense, or does not fit another.
    """
    for key in ("name", "runs", "run", "resume", "initial"):  # name=2024 is a name all the same
        config[key] = config[key] if config[key] is None else str(config[key])
    check_name(config.name)
    take_in(config, text)
    check_post_training(config)
    initial = open_initial(config, given_keys())
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    if initial is not None:
        plain["initial_sha256"] = initial.sha256
    check_variant(config.variant, plain["objective"])
    device = own_device(available(config.device))
    precision = autocast(device, config.precision)
    dtype = chosen_dtype(device, config.precision)
    plain["computed"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    settings = Settings.of(config.training, "training")
    check_values(config)
    processes = join(device, settings.timeout)
    share(settings.batch_size, processes, settings.accumulation)
    if config.get("metrics") is not None and processes.world_size > 1:
        raise UserError(
            f"metrics: one process measures the scores; start {command('train')} without torchrun"
        )
    if not processes.main:
        logging.getLogger("mmdit").setLevel(logging.WARNING)
    for remark in restart_remarks(sys.argv[1:]) if processes.main else ():
        log.warning("note: %s", remark)
    data: Data = processes.once(lambda: instantiate(config.data))
    if config.get("metrics") is not None and data.name != "shapes":
        raise UserError("metrics: its CLIP and its prompts are those of data=shapes; leave it out")
    validation = data.view("validation")
    if found := data.fingerprint():  # a run and its stages belong to these images
        plain["data"]["found"] = found
    return TrainingRequest(
        config=config,
        plain=plain,
        settings=settings,
        device=device,
        text_device=None if config.text_device is None else available(config.text_device),
        dtype=dtype,
        precision=precision,
        processes=processes,
        initial=initial,
        data=data,
        validation=validation,
        logger=instantiate(config.logger) if processes.main else NoLogger(),
        words=[*sys.argv[1:], *(f"{key}={value}" for key, value in text.items())],
    )


def take_in(config: DictConfig, text: Verbatim) -> None:
    """Put free text into a config; `null` is none, as elsewhere on the command line.

    Raises:
        UserError: the config has no such key, or a text is empty or refers to another key.
    """
    for key, value in text.items():
        if key not in list(config.keys()):  # `in config` leaves out keys without a value
            raise UserError(f"{key} is a key of experiment=dreambooth: give that, too")
        expect(bool(value.strip()), key, value, "must not be empty: a photo of sks dog")
        expect("${" not in value, key, value, "must not have ${, a reference in a config")
        config[key] = None if value == "null" else value


def check_values(config: DictConfig) -> None:
    """Look at what no constructor looks at before training begins.

    Raises:
        UserError: a value makes no sense; its key is named.
    """
    seed_number("seed", config.seed)
    whole_number("image_size", config.image_size)
    whole_number("sampling.steps", config.sampling.steps, most=MOST_STEPS)
    number("sampling.guidance", config.sampling.guidance)
    flag("compile", config.compile)
    flag("autoencoder.trained", config.autoencoder.trained)
    whole_number("training.validation_size", config.training.validation_size)
    if config.autoencoder.trained:
        check_recipe(config, "autoencoder")
    if config.get("probe") is not None:
        instantiate(config.probe)()  # long before it is used
    if config.get("metrics") is not None:
        check_recipe(config, "clip")
        instantiate(config.metrics)  # long before it is used
        with torch.device("meta"):
            instantiate(config.clip.model)


def check_post_training(config: DictConfig) -> None:
    """Check that what post-training needs is there together.

    Raises:
        UserError: a section is missing, or one is there that nothing reads.
    """
    needed = ["algorithm", "collector"]
    if config.get("collector") is not None:
        raw = OmegaConf.to_yaml(config.collector, resolve=False)
        parts = ("sampler", "reward", "prompt_source")
        needed += [name for name in parts if f"${{{name}}}" in raw]
    present = {name: config.get(name) is not None for name in needed}
    if (
        present["algorithm"]
        and "transition" in config.algorithm
        and "transition" not in (config.get("sampler") or {})
    ):
        raise UserError(
            "algorithm: this one trains the steps of stochastic sampling: choose sampler=sde"
        )
    if present["algorithm"] and config.get("prior") is not None:
        raise UserError("prior and algorithm exclude each other: the reference is kept by the loss")
    if all(present.values()) or not any(present.values()):
        return
    there, missing = (
        ", ".join(name for name, is_there in present.items() if is_there == kind)
        for kind in (True, False)
    )
    raise UserError(
        f"{there} needs {missing}, too: experiment=alignment has all of them, and algorithm=, "
        "sampler=, reward= and prompt_source= choose others"
    )
