import json
from collections.abc import Sequence

import pytest
from omegaconf import OmegaConf
from torch import nn

from mmdit import registry
from mmdit.errors import UserError
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import CosMap, LogitNormal, Mode, Uniform
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.registry import build, describe, register
from mmdit.text.conditioning import TextEncoder
from mmdit.text.tokenizers import T5WordTokenizer


def instances() -> list[object]:
    return [
        *(Uniform(), LogitNormal(m=0.5, s=0.6), Mode(s=1.75), CosMap()),
        *(RectifiedFlow(), Velocity(), Shift(alpha=3.0)),
        Objective(
            path=RectifiedFlow(),
            timesteps=LogitNormal(m=1.0, s=0.6),
            prediction=Velocity(),
            shift=Shift(alpha=3.0),
        ),
        MMDiT(depth=1, width=8, num_heads=2, context_width=6, pooled_width=5, position_size=4),
        Autoencoder(latent_channels=4, width=32, multipliers=(1, 1), blocks=0),
        CLIPTextModel(vocabulary_size=5, width=8, depth=2, num_heads=2, length=4),
        TextEncoder(
            tokenizer=T5WordTokenizer(words=["red", "circle"], length=5),
            model=T5Encoder(vocabulary_size=9, width=8, depth=1, num_heads=2, hidden=6),
        ),
    ]


@pytest.mark.parametrize("instance", instances(), ids=lambda i: type(i).__name__)
def test_a_description_survives_json_and_builds_an_equal_instance(instance):
    description = describe(instance)
    rebuilt = build(json.loads(json.dumps(description)))
    assert type(rebuilt) is type(instance)
    assert describe(rebuilt) == description
    if hasattr(instance, "state_dict"):
        shapes, others = (
            {key: value.shape for key, value in module.state_dict().items()}
            for module in (instance, rebuilt)
        )
        assert shapes == others


def test_a_description_holds_the_defaults_and_the_parts():
    assert describe(Mode()) == {"class": "Mode", "s": 1.29}
    objective = describe(instances()[7])
    assert objective["timesteps"] == {"class": "LogitNormal", "m": 1.0, "s": 0.6}
    assert objective["path"] == {"class": "RectifiedFlow"}


def test_a_subclass_describes_itself_not_its_parent(monkeypatch):
    monkeypatch.setattr(registry, "_classes", {})

    @register
    class Wider(Shift):
        def __init__(self, *, factor: float) -> None:
            super().__init__(alpha=2 * factor)

    assert describe(Wider(factor=1.5)) == {"class": "Wider", "factor": 1.5}


def test_a_subclass_takes_the_arguments_of_the_class_above_as_its_own(monkeypatch):
    monkeypatch.setattr(registry, "_classes", {})

    @register
    class Wider(Shift):
        def __init__(self, *, factor: float = 2.0, **shared: float) -> None:
            super().__init__(**shared)

    assert describe(Wider(alpha=3.0)) == {"class": "Wider", "alpha": 3.0, "factor": 2.0}
    with pytest.raises(UserError, match=r"Wider has no argument 'alhpa'\. Did you mean alpha"):
        Wider(alhpa=3.0)


def test_a_module_without_a_constructor_can_be_registered(monkeypatch):
    monkeypatch.setattr(registry, "_classes", {})

    @register
    class Silent(nn.Module):
        """It has the constructor of `nn.Module`, which takes anything."""

    assert describe(Silent()) == {"class": "Silent"}
    assert type(build(describe(Silent()))) is Silent


def test_an_unknown_class_is_named_with_its_nearest_neighbour():
    with pytest.raises(UserError, match=r"'LogitNormall'.*Did you mean LogitNormal"):
        build({"class": "LogitNormall"})


@pytest.mark.parametrize(
    "name", ["os.system", "torch.nn.Linear", "mmdit.flow.paths.Path", None, ["MMDiT"], {"a": 1}]
)
def test_nothing_is_built_by_import_path(name):
    with pytest.raises(UserError, match="not known here"):
        build({"class": name, "in_features": 1, "out_features": 1})


def test_an_argument_that_does_not_fit_is_a_users_mistake():
    with pytest.raises(UserError, match=r"Mode has no argument 'strength'"):
        build({"class": "Mode", "strength": 1.0})
    with pytest.raises(UserError, match=r"Uniform takes no arguments, but is given s"):
        build({"class": "Uniform", "s": 1.0})
    with pytest.raises(UserError, match=r"MMDiT: missing a required .*argument: 'depth'"):
        build({"class": "MMDiT", "width": 8})
    with pytest.raises(
        UserError, match=r"a description of a class must be a table of arguments, not \['class'\]"
    ):
        build(["class"])


def test_a_mistake_within_a_constructor_is_no_users_mistake():
    with pytest.raises(TypeError, match="unsupported operand"):
        build({"class": "Plain", "anything": "a bug"})


def test_a_name_is_taken_once():
    class Uniform:
        pass

    with pytest.raises(
        UserError, match=r"a class Uniform, a name that mmdit\.flow\.timesteps uses"
    ):
        register(Uniform)
    assert type(build({"class": "Uniform"})).__module__ == "mmdit.flow.timesteps"


def test_constructors_take_keywords_only_and_refuse_misspelt_ones():
    with pytest.raises(TypeError):
        Shift(3.0)
    with pytest.raises(UserError, match="Did you mean alpha"):
        Shift(alhpa=3.0)
    with pytest.raises(TypeError, match="s"):
        Uniform(s=0.0)


@register
class Plain:
    def __init__(
        self,
        *,
        switch: bool = False,
        whole: int = 1,
        number: float = 1.0,
        word: str = "",
        maybe: int | None = None,
        numbers: Sequence[int] = (),
        words: Sequence[str] = (),
        anything: object = None,
    ) -> None:
        if anything is not None:
            anything - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"switch": "maybe"}, "switch='maybe' must be true or false"),
        ({"switch": 1}, "switch=1 must be true or false"),
        ({"whole": 2.5}, "whole=2.5 must be a whole number"),
        ({"whole": True}, "whole=True must be a whole number"),
        ({"whole": None}, "whole=None must be a whole number"),
        ({"number": "1.5"}, "number='1.5' must be a number"),
        ({"number": False}, "number=False must be a number"),
        ({"word": 3}, "word=3 must be a text"),
        ({"maybe": "3"}, "maybe='3' must be a whole number or null"),
        ({"maybe": True}, "maybe=True must be a whole number or null"),
        ({"numbers": 3}, "numbers=3 must be a list"),
        ({"numbers": [1, 2.5]}, "numbers[1]=2.5 must be a whole number"),
        ({"words": "red"}, "words='red' must be a list"),
        ({"words": ["red", None]}, "words[1]=None must be a text"),
    ],
)
def test_arguments_are_of_the_plain_types_that_they_are_declared_as(arguments, message):
    for make in (lambda: Plain(**arguments), lambda: build({"class": "Plain", **arguments})):
        with pytest.raises(UserError) as refusal:
            make()
        assert str(refusal.value) == f"Plain: {message}"


@pytest.mark.parametrize(
    "arguments",
    [
        {"switch": True, "whole": 3, "number": 3, "word": "a", "maybe": None, "numbers": (1, 2)},
        {"number": 0.5, "maybe": 2, "numbers": [], "words": ["a", "b"], "anything": 2},
        {"numbers": OmegaConf.create([1, 2]), "words": OmegaConf.create(["a"])},
    ],
)
def test_what_is_of_its_type_is_taken(arguments):
    kept = describe(Plain(**arguments))
    assert all(
        kept[name] == (list(v) if name in ("numbers", "words") else v)
        for name, v in arguments.items()
    )
