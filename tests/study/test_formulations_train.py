"""All 61 formulations train and paint under all six settings; and one that is not of the study."""

import copy
import functools
import json
from collections.abc import Sequence

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from mmdit.cli import CONFIGS
from mmdit.cli.build import build_pipeline, describe
from mmdit.cli.formulations import parts_of, store_formulations
from mmdit.cli.train import validation_of
from mmdit.engine.loader import Part
from mmdit.engine.parallel import Single
from mmdit.engine.step import Stepper
from mmdit.engine.tasks import FlowTask
from mmdit.latents.sources import FromMemory
from mmdit.precision import autocast
from mmdit.processes import Processes
from mmdit.request import Request
from mmdit.study.emphasis import report_formulation
from mmdit.study.formulations import Formulation, study
from mmdit.study.protocol import SETTINGS, Setting

TINY = (
    *("model.depth=1", "model.width=24", "model.num_heads=2"),
    "autoencoder.model.latent_channels=4",
)
STUDY = study()
FAMILIES = {row.family: row for row in reversed(STUDY)}  # the first of each


def composed(*overrides: str) -> DictConfig:
    store_formulations()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


@functools.cache
def of_family(name: str) -> DictConfig:
    return composed(f"formulation={FAMILIES[name].option}", "experiment=table1", *TINY)


def formulated(row: Formulation) -> DictConfig:
    """The config of `formulation=<option>`; `test_formulations.py` composes all of them."""
    config = copy.deepcopy(of_family(row.family))
    for part, node in parts_of(row).items():
        config.objective[part] = node
    return config


@pytest.fixture
def one_thread():
    """Tiny products, for which a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "row",
    [pytest.param(r, marks=() if r in FAMILIES.values() else pytest.mark.slow) for r in STUDY],
    ids=lambda row: row.name,
)
def test_each_trains_and_paints(row, one_thread):
    # Gates that start closed let the last weights move in the fourth step.
    trains_and_paints(row, steps=4, settings=[Setting(5, 5.0)])


@pytest.mark.slow
@pytest.mark.parametrize("row", FAMILIES.values(), ids=FAMILIES)
def test_one_of_each_family_trains_twenty_steps_and_paints_under_all_six_settings(row, one_thread):
    trains_and_paints(row, steps=20, settings=SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("row", STUDY, ids=lambda row: row.name)
def test_each_trains_twenty_steps_and_paints_under_all_six_settings(row, one_thread):
    trains_and_paints(row, steps=20, settings=SETTINGS)


def trains_and_paints(row: Formulation, *, steps: int, settings: Sequence[Setting]) -> None:
    config = formulated(row)
    pipe = build_pipeline(config)
    precision = autocast(torch.device("cpu"), "fp32")
    source = FromMemory(
        data=instantiate(config.data, split="train", samples=8),
        autoencoder=pipe.autoencoder,
        text=pipe.text,
        autocast=precision,
    )
    source.prepare(Processes())
    task = FlowTask(
        module=pipe,
        source=source,
        validation=validation_of(instantiate(config.data, split="validation"), 2),
        seed=0,
        autocast=precision,
    )
    make_step = Stepper(
        task.loss,
        parallel=Single(),
        processes=Processes(),
        trained=[(pipe, instantiate(config.optimizer)(pipe))],
        clip=1.0,
        skips=False,
    )
    before = [weight.clone() for weight in pipe.mmdit.parameters()]
    for step in range(steps):  # raises where a loss or a gradient is not finite
        make_step([Part(step, [0, 1, 2, 3], task.example(step, [0, 1, 2, 3]))])
    after = list(pipe.mmdit.parameters())
    assert not any(torch.equal(w, b) for w, b in zip(after, before, strict=True) if w.ndim > 1)
    losses = task.evaluate(pipe)
    assert all(torch.tensor(value).isfinite() for value in losses.values())
    pipe.eval()
    finite: list[bool] = []

    def decode(z: torch.Tensor) -> torch.Tensor:
        finite.append(bool(z.isfinite().all()))
        return z[:, :3]

    pipe.autoencoder.decode = decode
    for evaluations, guidance in settings:
        samples = pipe.sample(Request("a red circle", steps=evaluations, guidance=guidance))
        assert samples.function_evaluations == evaluations * (1 if guidance == 1.0 else 2)
    assert finite == [True] * len(settings)


@pytest.mark.few(3)
@pytest.mark.parametrize("row", FAMILIES.values(), ids=FAMILIES)
def test_its_size_is_told_without_building_it(row):
    told = list(describe(composed(f"formulation={row.option}", *TINY)))
    assert "parameters in the MMDiT" in told[0]


def test_what_a_formulation_emphasizes_is_written_down(tmp_path):
    pipe = build_pipeline(composed("formulation=rf", "objective.shift.alpha=1", *TINY))
    report_formulation(pipe.objective, tmp_path)
    written = json.loads((tmp_path / "objective.json").read_text())
    told = {name: torch.tensor(values, dtype=torch.float64) for name, values in written.items()}
    odds = told["sigma"] / (1 - told["sigma"])  # t / (1 - t)
    torch.testing.assert_close(told["weight"], odds)
    torch.testing.assert_close(told["density_t"], torch.ones_like(told["t"]))
    assert (tmp_path / "objective.png").is_file()


def test_a_new_density_is_one_class_and_one_yaml_elsewhere(tmp_path, monkeypatch):
    """Without touching the package; `--config-dir` is this search path."""
    (tmp_path / "made_up.py").write_text(
        "from mmdit.flow.timesteps import TimestepDensity\n"
        "from mmdit.registry import register\n\n"
        "@register\n"
        "class Triangle(TimestepDensity):\n"
        "    def from_uniform(self, u):\n"
        "        return u.sqrt()\n\n"
        "    def pdf(self, t):\n"
        "        return 2 * t\n"
    )
    folder = tmp_path / "configs" / "objective" / "timesteps"
    folder.mkdir(parents=True)
    (folder / "triangle.yaml").write_text("_target_: made_up.Triangle\n")
    monkeypatch.syspath_prepend(tmp_path)
    elsewhere = f"hydra.searchpath=[file://{tmp_path / 'configs'}]"
    config = composed(elsewhere, "objective/timesteps=triangle", "objective.shift.alpha=1", *TINY)
    objective = build_pipeline(config).objective
    draw = objective.draw((1,), [torch.Generator().manual_seed(i) for i in range(2000)])
    (told, *_) = list(describe(composed(elsewhere, "objective/timesteps=triangle", *TINY)))
    assert "parameters" in told
    # E t = 2/3, with a standard error of 0.236 / sqrt(2000).
    assert draw.t.mean().item() == pytest.approx(2 / 3, abs=4 * 0.0053)
