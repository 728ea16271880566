"""The 61 formulations of the paper's study: each composes, trains and samples by its name."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mmdit.cli import CONFIGS
from mmdit.cli.formulations import check_variant, store_formulations
from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.objective import Objective
from mmdit.flow.solvers import euler
from mmdit.keys import generator_for
from mmdit.registry import build, describe
from mmdit.study.formulations import study

STUDY = study()
# Tables 1 and 2 of the paper.
PRINTED = [
    *("rf/lognorm(0.00,1.00)", "rf/lognorm(1.00,0.60)", "rf/lognorm(0.50,0.60)"),
    *("rf/lognorm(0.50,1.00)", "rf/lognorm(-0.50,1.00)", "rf/mode(1.29)", "rf/mode(1.75)"),
    *("rf/cosmap", "rf", "eps/linear", "v/linear", "v/cos", "edm/cos", "edm/rf"),
    *("edm(0.00,0.60)", "edm(0.60,1.20)", "edm(-1.20,1.20)"),
]


def test_the_study_has_61_formulations_by_distinct_names_and_options():
    assert (
        len(STUDY) == len({row.name for row in STUDY}) == len({row.option for row in STUDY}) == 61
    )


def test_the_families_have_as_many_members_as_the_paper_says():
    members = [row.name.split("(")[0] for row in STUDY]
    counts = {name: members.count(name) for name in members}
    assert counts == {
        **dict.fromkeys(("eps/linear", "v/linear", "eps/cos", "v/cos", "rf", "rf/cosmap"), 1),
        **dict.fromkeys(("edm/rf", "edm/cos"), 1),
        "rf/mode": 8,
        "rf/lognorm": 30,
        "edm": 15,
    }


@pytest.mark.parametrize("name", PRINTED)
def test_every_name_of_the_tables_is_one_of_them(name):
    assert name in {row.name for row in STUDY}


def test_names_say_the_parameters_to_two_digits():
    for row in STUDY:
        values = [value for part in row.settings.values() for value in part.values()]
        assert row.name.endswith(f"({','.join(f'{v:.2f}' for v in values)})" if values else "")


class Composed(dict[str, DictConfig]):
    """The config of a row by its name, composed when it is asked for."""

    def __missing__(self, name: str) -> DictConfig:
        option = next(row.option for row in STUDY if row.name == name)
        with initialize_config_dir(str(CONFIGS), version_base=None):
            self[name] = compose("formulations_alone", overrides=[f"formulation={option}"])
        return self[name]


@pytest.fixture(scope="module")
def composed():
    """Every row's config: of train.yaml the two groups that matter, for speed."""
    store_formulations()
    defaults = [{"objective": "rf_lognorm"}, "_self_", {"formulation": None}]
    node = {"defaults": defaults, "variant": None}
    ConfigStore.instance().store(name="formulations_alone", node=node)
    return Composed()


EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.few(3)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("option", ["eps_linear", "rf_lognorm_0.50_0.60", "edm_0.60_1.20"])
def test_a_formulation_is_the_papers_whatever_the_experiment(option, experiment, composed):
    row = next(row for row in STUDY if row.option == option)
    config = composed_train(f"formulation={option}", f"experiment={experiment}")
    assert config.objective == composed[row.name].objective
    assert config.objective.shift.alpha == 1.0
    assert config.variant == row.name
    check_variant(config.variant, OmegaConf.to_container(config.objective))


@pytest.mark.few(3)
@pytest.mark.parametrize("family", sorted({row.family for row in STUDY}))
def test_train_py_knows_the_formulations_by_their_name_alone(family, composed):
    row = next(row for row in STUDY if row.family == family)
    config = composed_train(f"formulation={row.option}")
    assert config.objective == composed[row.name].objective
    assert config.variant == row.name


def test_the_recipe_has_a_shift_that_formulations_take_back_and_users_may_ask_for(composed):
    assert composed_train().objective.shift.alpha == 3.0
    assert composed_train("objective=eps_linear").objective.shift.alpha == 3.0
    words = ("formulation=eps_linear", "objective.shift.alpha=2", "variant=mine")
    config = composed_train(*words)
    assert config.objective.shift.alpha == 2
    check_variant(config.variant, OmegaConf.to_container(config.objective))


def test_an_experiment_may_choose_a_formulation(tmp_path, composed):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /formulation: rf_mode_1.75\n"
    (tmp_path / "experiment/mine.yaml").write_text(text)
    config = composed_train("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")
    assert config.objective == composed["rf/mode(1.75)"].objective


def test_table1_compares_other_objectives_without_shift_too(composed):
    config = composed_train("experiment=table1", "objective=rf_cosmap")
    assert config.objective == composed["rf/cosmap"].objective


def test_table1_sweeps_over_all_of_them():
    table1 = OmegaConf.load(CONFIGS / "experiment/table1.yaml")
    swept = table1.hydra.sweeper.params.formulation
    assert sorted(option.strip() for option in swept.split(",")) == sorted(
        row.option for row in STUDY
    )


@pytest.mark.parametrize("row", STUDY, ids=lambda row: row.option)
def test_a_formulation_sets_its_name_and_its_parameters_and_nothing_else(row, composed):
    config = composed[row.name]
    assert config.variant == row.name
    family = OmegaConf.load(CONFIGS / "objective" / f"{row.family}.yaml")
    choices = {
        key.rpartition("@")[2]: choice
        for entry in family.defaults
        if not isinstance(entry, str)
        for key, choice in entry.items()
    }
    for part, choice in choices.items():
        folder = CONFIGS / ("grid" if part == "grid" else f"objective/{part}")
        plain = OmegaConf.to_container(OmegaConf.load(folder / f"{choice}.yaml"))
        expected = {**plain, **row.settings.get(part, {})}
        assert OmegaConf.to_container(config.objective[part]) == expected
    assert config.objective.keys() == {"_target_", *choices}


@pytest.mark.parametrize("row", STUDY, ids=lambda row: row.option)
def test_a_formulation_has_a_finite_loss_and_samples_in_five_steps(row, composed):
    objective: Objective = instantiate(composed[row.name].objective)
    network = tiny()
    n = 16
    x_0 = torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    draw = objective.draw(x_0.shape[1:], [generator_for(0, "flow", i) for i in range(n)])
    assert (draw.t >= 0).all() and (draw.t <= 1).all()
    text = Condition(torch.zeros(n, 1), torch.zeros(n, 1, 1))
    loss = objective(network, x_0, text, draw)
    assert loss.shape == (n,) and loss.isfinite().all()
    loss.mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())

    times = objective.times(5)
    z = times[0].item() * draw.epsilon
    with torch.no_grad():
        z = euler(lambda z, sigma: objective.velocity(network, z, sigma, text), z, times)
    assert z.shape == x_0.shape and z.isfinite().all()


@pytest.mark.parametrize("row", STUDY, ids=lambda row: row.option)
def test_a_checkpoint_remembers_the_formulation(row, composed):
    objective: Objective = instantiate(composed[row.name].objective)
    again = build(describe(objective))
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    assert torch.equal(again.weight(t), objective.weight(t))
    assert torch.equal(again.times(5), objective.times(5))


def test_all_but_the_two_matches_of_edm_weigh_noise_levels_differently(composed):
    """edm/rf and edm/cos are matched to rf and v/cos, whose weights are the same function."""
    sigma = torch.linspace(0.05, 0.9, 30, dtype=torch.float64)

    def shape(name):
        objective = instantiate(composed[name].objective)
        t = objective.path.time_at(sigma)
        weight = objective.weight(t)
        return (weight / weight[15]).log()

    shapes = {row.name: shape(row.name) for row in STUDY}
    torch.testing.assert_close(shapes["edm/rf"], shapes["edm/cos"])
    torch.testing.assert_close(shapes["edm/rf"], shapes["rf"])
    torch.testing.assert_close(shapes["v/cos"], shapes["rf"])
    same = {"rf", "v/cos", "edm/rf", "edm/cos"}
    others = [values for name, values in shapes.items() if name not in same]
    for i, one in enumerate(others):
        for other in (*others[:i], shapes["rf"]):
            assert (one - other).abs().max() > 1e-3


def composed_train(*words: str) -> DictConfig:
    """What `python train.py <words>` would run; the fixture `composed` has stored the options."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("train", overrides=list(words))


def tiny() -> torch.nn.Module:
    """A network with the boundary of every backbone: a convolution, moved by the time."""
    torch.manual_seed(0)

    class Tiny(torch.nn.Conv2d):
        def forward(self, z_t, t, c_vec, c_ctxt):
            return super().forward(z_t) * torch.cos(t)[:, None, None, None]

    return Tiny(4, 4, 3, padding=1)


@pytest.mark.parametrize("row", STUDY, ids=lambda row: row.option)
def test_every_formulation_may_bear_its_name(row, composed):
    check_variant(row.name, OmegaConf.to_container(composed[row.name].objective))


@pytest.mark.parametrize(
    ("variant", "override", "part"),
    [
        ("edm_0.00_0.60", "objective.path.P_s=3", "path"),
        ("rf", "objective=edm", "path"),
        ("eps_cos", "objective/prediction=v", "prediction"),
        ("rf_mode_1.29", "objective.timesteps.s=1.0", "timesteps"),
        ("eps_linear", "objective.shift.alpha=3", "shift"),
        ("rf", "objective/shift=published_shift", "shift"),
    ],
)
def test_another_objective_may_not_bear_the_name_of_one_of_them(variant, override, part, composed):
    """A ranking would print the paper's rank of `variant` beside it."""
    config = composed_train(f"formulation={variant}", override)
    objective = OmegaConf.to_container(config.objective)
    message = rf"objective\.{part} is .* give another name with variant="
    with pytest.raises(UserError, match=message):
        check_variant(config.variant, objective)
    check_variant("mine", objective)
    check_variant(None, objective)
