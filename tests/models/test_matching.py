from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from yaml import safe_load

from mmdit.errors import UserError
from mmdit.models.backbone import PatchBackbone
from mmdit.models.dit import DiT
from mmdit.models.matching import fitted_ratio, matched, nearest
from mmdit.registry import build, describe

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
KINDS = [file.stem for file in sorted(CONFIGS.glob("toy*.yaml"))]
AT = {"height": 8, "width": 8, "text_length": 26}


def on_meta(name: str, **changes) -> PatchBackbone:
    config = safe_load((CONFIGS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        return instantiate(config, context_width=128, pooled_width=128, **changes)


def cost(model: PatchBackbone, by: str) -> int:
    return model.flops(**AT) if by == "flops" else sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("by", ["params", "flops"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_matched_costs_the_same(kind, by):
    network, reference = on_meta(kind), on_meta("toy")
    before = describe(network)
    match = matched(network, reference, by=by, **AT)
    assert describe(network) == before

    with torch.device("meta"):
        model = build({**before, "width": match.width, "mlp_ratio": match.mlp_ratio})
    assert (match.cost, match.reference_cost) == (cost(model, by), cost(reference, by))
    assert match.cost == pytest.approx(match.reference_cost, rel=0.01)
    assert before["mlp_ratio"] / 2 <= match.mlp_ratio <= 2 * before["mlp_ratio"]


@pytest.mark.parametrize("by", ["params", "flops"])
def test_a_network_matches_itself_as_it_is(by):
    match = matched(on_meta("toy"), on_meta("toy"), by=by, **AT)
    assert (match.width, match.mlp_ratio) == (192, 2.0)


def test_the_two_measures_disagree():
    """DiT has half the weights of an MM-DiT, but uses each for text and image."""
    by_params, by_flops = (
        matched(on_meta("toy_dit"), on_meta("toy"), by=by, **AT) for by in ("params", "flops")
    )
    assert by_params.width > 192 > by_flops.width


def test_the_nearest_is_found_on_either_side():
    for target, expected in ((1, 1), (0, 1), (9, 3), (12, 3), (13, 4), (10**6, 1000)):
        assert nearest(lambda units: units**2, target) == expected


def test_the_ratio_stays_within_half_and_twice_of_the_configured():
    def price(r: float) -> int:
        return 1000 + 10 * round(100 * r)

    assert fitted_ratio(price, 100, 2.0, 1000 + 10 * 237) == 2.37
    assert fitted_ratio(price, 100, 2.0, 0) == 1.0
    assert fitted_ratio(price, 100, 2.0, 10**6) == 4.0


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(UserError, match="match='size' must be one of params, flops"):
        matched(on_meta("toy_dit"), on_meta("toy"), by="size", **AT)
    small = {"depth": 1, "width": 12, "num_heads": 3, "context_width": 8, "pooled_width": 8}
    reference = DiT(**small, position_size=4)
    with pytest.raises(UserError, match=r"MMDiT comes no nearer than [\d,]+, at width=12 and"):
        matched(on_meta("toy"), reference, by="params", **AT)
