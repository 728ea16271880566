"""Tables in place of modulation layers: the same outputs, without a third of the weights."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

import mmdit
from mmdit.adapters.adapter import Adapter
from mmdit.adapters.layers import LoRA
from mmdit.adapters.writing import write_adapter
from mmdit.cli import CONFIGS
from mmdit.errors import NotFinite, UserError
from mmdit.flow.guidance import (
    ClassifierFreeGuidance,
    GuidanceInterval,
    SkipLayerGuidance,
    ZeroUnconditional,
)
from mmdit.flow.solvers import euler, heun, midpoint
from mmdit.models.backbone import crop_positions
from mmdit.models.controlnet import ControlledMMDiT, ControlNet, ParallelControlNet
from mmdit.models.interval import IntervalMMDiT, with_intervals
from mmdit.models.mmdit import MMDiT
from mmdit.models.tabulated import (
    Evaluations,
    TabulatedModulation,
    is_tabulated,
    modulation_layers,
    table_sizes,
    tabulate,
)
from mmdit.nn.embeddings import VectorEmbedding
from mmdit.nn.modulation import Modulation
from mmdit.nn.network import Network
from mmdit.nn.stored import compute_in_float32
from mmdit.request import Request
from tests.tiny import SIZES, Tiny, inputs

CLOSE = 5e-6  # of the largest value: a few roundings in float32
TOLERANCES = {torch.float32: CLOSE, torch.bfloat16: 3e-2, torch.float64: 1e-12}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def expect_close(actual, expected, tolerance):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"{error:.1e}"


def tabulated(network, t, c_vec, **options):
    """A copy with tables."""
    network = copy.deepcopy(network)
    tabulate(network, t, c_vec, **options)
    return network


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


# Networks


@pytest.mark.each("backbone")
@each_dtype
@torch.no_grad()
def test_a_network_computes_the_same(backbone, dtype, randomize):
    network = randomize(backbone.normed(), 0).to(dtype)
    z, t, c_vec, c_ctxt = inputs(batch=3)
    small = tabulated(network, t, c_vec)
    expect_close(small(z, t, c_vec, c_ctxt), network(z, t, c_vec, c_ctxt), TOLERANCES[dtype])
    mixed = (z[[2, 0, 0, 1]], t[[0, 1, 0, 2]], c_vec[[1, 1, 2, 0]], c_ctxt[[0, 1, 2, 0]])
    expect_close(small(*mixed), network(*mixed), TOLERANCES[dtype])


@pytest.mark.each("backbone")
@torch.no_grad()
def test_what_is_left_are_all_layers_but_modulation_and_its_embeddings(backbone):
    network = backbone().eval()
    replaced = modulation_layers(network)
    kinds = {type(part) for part in network.modules()}
    assert {type(layer) for layer in replaced.values()} == {
        kind for kind in kinds if issubclass(kind, Modulation | VectorEmbedding)
    }
    left = count(network) - sum(count(layer) for layer in replaced.values())
    names = [name for name, _ in network.named_parameters()]
    tabulate(network, [0.5, 1.0], torch.ones(1, 10))
    assert count(network) == left < 0.85 * (left + sum(count(m) for m in replaced.values()))
    assert [name for name, _ in network.named_parameters()] == [
        name for name in names if not any(name.startswith(f"{layer}.") for layer in replaced)
    ]
    tables = [part.table for part in network.modules() if isinstance(part, TabulatedModulation)]
    assert len(tables) == sum(isinstance(layer, Modulation) for layer in replaced.values())
    assert {table.shape[0] for table in tables} == {2}


@torch.no_grad()
def test_each_layer_is_freed_as_soon_as_its_table_is_there():
    network = Tiny(MMDiT)().eval()
    waiting = [weakref.ref(layer) for layer in modulation_layers(network).values()]
    most = len(waiting)
    alive = []

    class Counting(Modulation):
        def forward(self, y):
            alive.append(sum(layer() is not None for layer in waiting))
            return super().forward(y)

    gc.collect()
    network.output.modulation = Counting(32, 2).eval()  # the last of all
    del waiting[-1]
    gc.disable()  # no cycle keeps one alive
    try:
        tabulate(network, [0.5], torch.ones(1, 10))
    finally:
        gc.enable()
    assert alive == [0] and most > 5


@torch.no_grad()
def test_skipping_layers_of_a_network_with_tables(randomize):
    network = randomize(Tiny(MMDiT, {"dual_attention": [0]})(), 0)
    given = inputs()
    small = tabulated(network, *given[1:3])
    expected = network.skipping([0, 2])(*given)
    expect_close(small.skipping([0, 2])(*given), expected, CLOSE)
    assert not torch.equal(expected, network(*given))
    expect_close(small(*given), network(*given), CLOSE)


@torch.no_grad()
def test_a_network_of_intervals_has_rows_for_pairs_of_times(randomize):
    network = randomize(with_intervals(Tiny(MMDiT)()), 0)
    z, t, c_vec, c_ctxt = inputs(batch=3)
    r = torch.tensor([0.1, 0.9, 0.2])
    small = tabulated(network, t, c_vec, lengths=[0.0, *(t - r).tolist()])
    for end in (r, None):
        expect_close(small(z, t, c_vec, c_ctxt, end), network(z, t, c_vec, c_ctxt, end), CLOSE)
    assert small.output.modulation.table.shape[0] == 4 * 3 * 3
    with pytest.raises(UserError, match=r"t - r=0\.0[45]\d* is not in the modulation tables"):
        small(z, t, c_vec, c_ctxt, t - 0.05)


@pytest.mark.parametrize("cls", [ControlNet, ParallelControlNet])
@each_dtype
@torch.no_grad()
def test_a_network_that_follows_a_control_image(cls, dtype, randomize):
    pooled = {} if cls is ParallelControlNet else {"pooled_width": 10}
    sizes = {name: SIZES[name] for name in ("depth", "width", "num_heads", "latent_channels")}
    network = ControlledMMDiT(base=Tiny(MMDiT)(), control_net=cls(**sizes, **pooled))
    network = randomize(network, 0).to(dtype)
    given, control = inputs(), inputs()[0].flip(-1)
    small = tabulated(network, *given[1:3])
    expected = network(*given, control=control)
    expect_close(small(*given, control=control), expected, TOLERANCES[dtype])
    assert not torch.equal(network(*given, control=2 * control), expected)
    weaker = network.skipping([1])(*given, control=control)
    assert not torch.equal(weaker, expected)
    expect_close(small.skipping([1])(*given, control=control), weaker, TOLERANCES[dtype])
    assert not modulation_layers(small)
    z, t, c_vec, c_ctxt = given
    flipped = (z, t, c_vec.flip(0), c_ctxt)
    expected = network(*flipped, control=control)
    expect_close(small(*flipped, control=control), expected, TOLERANCES[dtype])
    with pytest.raises(UserError, match="pooled text"):
        small(z, t, c_vec + 1, c_ctxt, control=control)


@torch.no_grad()
def test_a_network_of_intervals_follows_a_control_image(randomize):
    network = randomize(with_intervals(Tiny(MMDiT)()), 0)
    given, control = inputs(), inputs()[0].flip(-1)
    sizes = {name: SIZES[name] for name in ("depth", "width", "num_heads", "latent_channels")}
    net = ControlNet(**sizes, pooled_width=10)
    untrained = ControlledMMDiT(base=network, control_net=net.eval())
    expect_close(untrained(*given, control=control), network(*given), CLOSE)
    followed = ControlledMMDiT(base=network, control_net=randomize(net, 1))
    expected = followed(*given, control=control)
    expect_close(tabulated(followed, *given[1:3])(*given, control=control), expected, CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_a_network_is_compiled_before_or_after(randomize):
    network = randomize(Tiny(MMDiT)(depth=2), 0)
    z, t, c_vec, c_ctxt = inputs()
    for compiled_first in (True, False):
        small = copy.deepcopy(network)
        steps = [
            partial(small.compile, backend="eager"),
            lambda small=small: tabulate(small, t, c_vec),
        ]
        for step in steps if compiled_first else steps[::-1]:
            step()
        expect_close(small(z, t, c_vec, c_ctxt), network(z, t, c_vec, c_ctxt), CLOSE)
    whole = torch.compile(small.last_block.text.modulation, backend="eager", fullgraph=True)
    rows = small.vector(t, c_vec)
    torch.testing.assert_close(whole(rows), small.last_block.text.modulation(rows))


@torch.no_grad()
def test_a_network_with_tables_changes_its_dtype(randomize):
    network = randomize(Tiny(MMDiT)(), 0)
    given = inputs()
    small = tabulated(network, *given[1:3]).to(torch.bfloat16)
    assert {x.dtype for x in small.state_dict().values()} == {torch.bfloat16}
    expect_close(small(*given), network.to(torch.bfloat16)(*given), 3e-2)
    # Times and pooled vectors are recognized as before.
    expect_close(small.float()(*given).bfloat16(), network(*given), 3e-2)


@torch.no_grad()
def test_tables_hold_what_the_layers_give_under_autocast(randomize):
    network = randomize(Tiny(MMDiT)(), 0)
    given = inputs()
    small = copy.deepcopy(network)
    with torch.autocast("cpu", torch.bfloat16):
        tabulate(small, *given[1:3])
        assert small.output.modulation.table.dtype == torch.bfloat16
        expect_close(small(*given), network(*given), 3e-2)


@torch.no_grad()
def test_layers_stored_in_sixteen_bits_give_tables_of_float32(randomize):
    network = randomize(Tiny(MMDiT)(), 0).bfloat16().requires_grad_(False)
    compute_in_float32(network)
    given = inputs()
    small = tabulated(network, *given[1:3])
    assert small.output.modulation.table.dtype == torch.float32
    expect_close(small(*given), network(*given), CLOSE)


@torch.no_grad()
def test_layers_that_are_kept_make_other_tables(randomize):
    network = randomize(Tiny(MMDiT)(), 0)
    z, t, c_vec, c_ctxt = inputs()
    small = copy.deepcopy(network)
    layers = modulation_layers(small)
    for shift in (0.0, 0.05):
        tabulate(small, t + shift, c_vec + shift, layers=layers)
        moved = (z, t + shift, c_vec + shift, c_ctxt)
        expect_close(small(*moved), network(*moved), CLOSE)
    with pytest.raises(UserError, match="not in the modulation tables"):
        small(z, t, c_vec, c_ctxt)
    for name, layer in layers.items():
        small.set_submodule(name, layer)
    assert torch.equal(small(z, t, c_vec, c_ctxt), network(z, t, c_vec, c_ctxt))


@torch.no_grad()
def test_layers_are_moved_to_the_tables_device_one_at_a_time():
    """The meta device stands for another one."""
    network = Tiny(MMDiT)().eval()
    tabulate(network, [0.5, 1.0], torch.ones(1, 10), device=torch.device("meta"))
    assert {x.device.type for x in network.state_dict().values()} == {"cpu"}
    assert network.output.modulation.table.device.type == "meta"


# Refusals


@pytest.fixture
def small():
    network = Tiny(MMDiT)().eval()
    tabulate(network, *inputs()[1:3])
    return network


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda z, t, c, x: (z, t + 0.1, c, x),
            r"t=0\.3\d* is not in .*2 times from 0\.[89]\d* to 0\.[12]\d*, of which 0\.[12]",
        ),
        (lambda z, t, c, x: (z, t * float("nan"), c, x), "t=nan is not in the modulation tables"),
        (lambda z, t, c, x: (z, t, c + 1e-6, x), r"c_vec\[0\], of 2, .* have 2 pooled texts"),
        (lambda z, t, c, x: (z, t, c * 0, x), r"c_vec\[0\], of 2"),
        (lambda z, t, c, x: (z, t, c[:, :9], x), r"c_vec\[0\], of 2"),
    ],
)
def test_what_has_no_row_is_refused(small, change, message):
    with pytest.raises(UserError, match=message):
        small(*change(*inputs()))


@torch.no_grad()
def test_zero_has_no_sign():
    network = Tiny(MMDiT)().eval()
    z, t, c_vec, c_ctxt = inputs()
    tabulate(network, [*t.tolist(), 0.0], torch.zeros(1, 10))
    network(z, -0.0 * t, -0.0 * c_vec.abs(), c_ctxt)


def test_training_and_gradients_are_refused(small):
    z, t, c_vec, c_ctxt = inputs()
    small(z.requires_grad_(), t, c_vec, c_ctxt).sum().backward()  # by the latent they are exact
    for name in ("t", "c_vec"):
        given = {"t": t.clone(), "c_vec": c_vec.clone()}
        given[name].requires_grad_()
        with pytest.raises(UserError, match="there is no gradient by t or c_vec"):
            small(z, **given, c_ctxt=c_ctxt)
        with torch.no_grad():
            small(z, **given, c_ctxt=c_ctxt)
    with pytest.raises(UserError, match=r"in training mode: call eval\(\)"):
        small.train()(z, t, c_vec, c_ctxt)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"times": []}, r"times=\[\] must have at least one time"),
        ({"times": 0.5}, "times=0.5 must be a list"),
        ({"times": torch.tensor(0.5)}, "times=0.5 must be a list"),
        ({"times": ["1"]}, r"times\[0\]='1' must be a finite number"),
        ({"times": [1.0, float("nan")]}, r"times\[1\]=nan must be a finite number"),
        ({"times": [[1.0]]}, r"times\[0\]=\[1\.0\] must be"),
        ({"pooled": torch.ones(2, 9)}, r"\(2, 9\) must be vectors c_vec in a tensor, \(p, 10\)"),
        ({"pooled": torch.ones(10)}, r"\(10,\) must be vectors"),
        ({"pooled": torch.ones(0, 10)}, r"\(0, 10\) must be vectors"),
        ({"pooled": ["a cat"]}, r"\['a cat'\] must be vectors"),
        ({"times": torch.linspace(0, 1, 100)}, "tables would take .* bytes, more than"),
        ({"layers": {}}, "cannot be tabulated"),
        (
            {"layers": modulation_layers(Tiny(MMDiT)(depth=4).eval())},
            r"has no blocks\.2\.",
        ),
    ],
)
def test_impossible_tables_are_refused_and_the_network_is_as_it_was(given, message):
    network = Tiny(MMDiT)().eval()
    whole = {"times": [0.5, 1.0], "pooled": torch.ones(1, 10), **given}
    with pytest.raises(UserError, match=message):
        tabulate(network, **whole)
    assert not is_tabulated(network)


def test_what_is_not_finite_is_refused():
    with pytest.raises(NotFinite, match="the source of pooled gave NaN"):
        tabulate(Tiny(MMDiT)().eval(), [0.5], torch.full((1, 10), float("nan")))


def test_networks_without_such_layers_are_refused():
    t, pooled = [0.5], torch.ones(1, 10)
    with pytest.raises(UserError, match="training mode"):
        tabulate(Tiny(MMDiT)(), t, pooled)
    network = Tiny(MMDiT)().eval()
    tabulate(network, t, pooled)
    with pytest.raises(UserError, match="MMDiT are tables already: load the model again"):
        tabulate(network, t, pooled)

    class Other(Network):
        pass

    with pytest.raises(UserError, match="Other cannot be tabulated"):
        tabulate(Other().eval(), t, pooled, device=torch.device("cpu"))
    strange = Tiny(MMDiT)().eval()
    strange.size_embedding = VectorEmbedding(4, 32).eval()
    with pytest.raises(UserError, match=r"the embeddings .*size_embedding"):
        tabulate(strange, t, pooled)
    strange = Tiny(MMDiT)().eval()
    strange.blocks[1].train()  # one part is enough
    with pytest.raises(UserError, match="training mode"):
        tabulate(strange, t, pooled)
    net = ParallelControlNet(depth=1, width=32, num_heads=2).eval()
    with pytest.raises(UserError, match="reads its base model: tabulate the ControlledMMDiT"):
        tabulate(net, t, pooled, device=torch.device("cpu"))


def test_a_network_with_tables_is_not_saved(tmp_path):
    small = Tiny(MMDiT)(mlp_ratio=4.0).eval()
    tabulate(small, *inputs()[1:3])
    for save, name in ((mmdit.save_single_file, "x.safetensors"), (mmdit.save_diffusers, "x")):
        with pytest.raises(UserError, match="tables in place of its modulation layers, and cannot"):
            save(small, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# Pipelines


@pytest.fixture(scope="module")
def whole(tiny_published):
    """Its parts are never changed."""
    return mmdit.load_pipeline(tiny_published)


@pytest.fixture
def pipe(whole):
    return copy.deepcopy(whole)


def latents(pipe, request):
    """What a request is denoised to."""
    seen = []
    pipe.decode = seen.append  # nothing is decoded
    try:
        pipe.sample(request)
    finally:
        del pipe.decode
    return seen[0]


def expect_same_samples(pipe, request, tolerance=1e-5):
    expected = latents(pipe, request)
    encoded = pipe.tabulate(request)
    assert is_tabulated(pipe.mmdit)
    expect_close(latents(pipe, encoded), expected, tolerance)


def fitted(guidance):
    """Guidances of the yamls are made for networks of at least ten blocks."""
    inner = guidance
    while inner is not None:
        if isinstance(inner, SkipLayerGuidance):
            inner.layers, inner.start, inner.end = (1,), 0.0, 1.0
        inner = getattr(inner, "inner", None)
    return guidance


@pytest.mark.each("solver")
@pytest.mark.parametrize("strength", [None, 0.5], ids=["noise", "image"])
def test_every_solver_samples_the_same(pipe, solver, strength):
    start = {} if strength is None else {"image": torch.arange(32 * 32 * 3).view(32, 32, 3).byte()}
    request = Request(["a red cat", "two dogs"], steps=4, solver=solver, strength=strength, **start)
    expect_same_samples(pipe, request)


@pytest.mark.each("guidance")
def test_every_guidance_samples_the_same(pipe, guidance):
    negatives = ["a dog", "red"]
    request = Request(
        ["a red cat", "two dogs"],
        negative_prompt=negatives,
        guidance=fitted(guidance),
        steps=3,
        solver=midpoint,
    )
    expect_same_samples(pipe, request)


@pytest.mark.each("grid")
def test_every_grid_samples_the_same(pipe, grid):
    expect_same_samples(pipe, Request("a red cat", steps=2, grid=grid, guidance=1.0))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", sorted(f.stem for f in (CONFIGS / "objective").glob("*.yaml")))
def test_every_formulation_samples_the_same(pipe, name):
    """A network receives the time of its own path, not that of the straight one."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        pipe.objective = instantiate(compose("train", [f"objective={name}"]).objective)
    expect_same_samples(pipe, Request("a red cat", steps=3, guidance=3.0))


def test_bfloat16_samples_nearly_the_same(tiny_published):
    pipe = mmdit.load_pipeline(tiny_published, dtype=torch.bfloat16)
    expect_same_samples(pipe, Request("a red cat", steps=3), 0.1)


def test_a_student_that_averages_over_steps_samples_the_same(pipe, randomize):
    pipe.mmdit = with_intervals(pipe.mmdit)
    randomize(pipe.mmdit.interval_embedding, 0)
    assert isinstance(pipe.mmdit.eval(), IntervalMMDiT)
    for solver in (euler, midpoint):
        request = Request("a red cat", steps=2, guidance=1.0, solver=solver)
        expect_same_samples(copy.deepcopy(pipe), request)


def test_a_control_image_is_followed_as_before(pipe, randomize):
    net = ControlNet(depth=3, width=64, num_heads=4, pooled_width=40)
    pipe.mmdit = ControlledMMDiT(base=pipe.mmdit, control_net=randomize(net, 0))
    control = torch.arange(32 * 32 * 3).view(32, 32, 3).byte()
    request = Request("a red cat", control=control, steps=3)
    expect_same_samples(pipe, request)
    other = Request("a red cat", control=255 - control, steps=3)
    assert latents(pipe, other).shape == (1, 16, 16, 16)


def test_prompts_may_be_in_any_batch_and_order(pipe):
    prompts = ["a red cat", "two dogs", ""]
    condition = pipe.encode(prompts)
    whole = Request(condition, negative_prompt=condition.map(lambda x: x[2:]), steps=3)
    expected = latents(pipe, whole)
    pipe.tabulate(whole)
    for i in (2, 0, 1):
        alone = condition.map(lambda x, i=i: x[[i, i]])
        negative = condition.map(lambda x: x[2:])
        twice = latents(pipe, Request(alone, negative_prompt=negative, steps=3, seeds=[5, 0]))
        expect_close(twice[1], expected[i], 1e-5)


def test_what_was_not_tabulated_is_refused_while_sampling(pipe):
    request = pipe.tabulate(Request("a red cat", steps=4, height=32, width=24))
    assert pipe.sample(request).images.shape == (1, 32, 24, 3)
    for other, message in (
        (Request("a red cat", steps=5, height=32, width=32), r"t=0\.\d+ is not in .* 4 times from"),
        (Request("two dogs", steps=4, height=32, width=32), r"c_vec\[0\].*have 2 pooled texts"),
        (Request("a red cat", steps=4, height=64, width=64), "height=64 must be a multiple"),
        (Request("a red cat", steps=4, height=32, width=32, solver=midpoint), "Other steps, anoth"),
        (
            Request(
                "a red cat",
                steps=4,
                height=32,
                width=32,
                guidance=ZeroUnconditional(inner=ClassifierFreeGuidance(scale=3.0)),
            ),
            r"c_vec\[1\], of 2",
        ),
    ):
        with pytest.raises(UserError, match=message):
            pipe.sample(other)
    with pytest.raises(UserError, match="are tables already"):
        pipe.tabulate(request)


def test_a_request_that_evaluates_nothing_has_no_tables(pipe):
    image = torch.zeros(32, 32, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"at no time \(strength=0\)"):
        pipe.tabulate(Request("a red cat", image=image, strength=0.0))
    assert not is_tabulated(pipe.mmdit)


def test_a_rehearsal_finds_the_times_and_vectors_of_every_evaluation(pipe):
    """Compared with what the network sees."""
    seen = Evaluations()

    def watch(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen(*given)

    pipe.mmdit.register_forward_pre_hook(watch)
    guidance = GuidanceInterval(inner=ClassifierFreeGuidance(scale=3.0), low=0.3, high=0.8)
    request = Request("a red cat", negative_prompt="red", steps=6, guidance=guidance, solver=heun)
    pipe.sample(request)
    positive, negative = pipe.encode(["a red cat"]), pipe.encode(["red"])
    times = pipe.objective.times(6)
    found = pipe.evaluations(times, positive, negative, guidance=guidance, solver=heun)
    assert (found.times, found.lengths) == (seen.times, [0.0])
    assert len(found.times) == 6
    assert torch.equal(found.pooled, torch.cat([positive.c_vec, negative.c_vec]))
    assert torch.equal(found.pooled, seen.pooled)
    with pytest.raises(UserError, match="moves away from a negative prompt"):
        pipe.evaluations(times, positive, guidance=guidance)


# Adapters


@pytest.fixture
def adapter(pipe):
    """Changes every linear layer of the network, modulation and embeddings among them."""
    made = Adapter.over(pipe, partial(LoRA, rank=2), targets="all")
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    assert any("modulation" in name for name in made.changes)
    assert any("timestep_embedding" in name for name in made.changes)
    return made


@pytest.mark.parametrize("fused", [False, True])
def test_adapters_of_modulation_are_part_of_the_tables(pipe, adapter, fused):
    request = Request("a red cat", steps=3)
    plain = latents(pipe, request)
    pipe.load_lora(adapter, 0.7, name="all")
    if fused:
        pipe.fuse_lora()
    assert not torch.allclose(latents(pipe, request), plain, rtol=0.1)
    expect_same_samples(pipe, request)
    assert pipe.adapters == {"all": 0.7}
    for change in (lambda: pipe.lora_scale("all", 0.5), pipe.unload_lora):
        with pytest.raises(UserError, match=r"the adapter 'all' is (part of|fused)"):
            change()


def test_adapters_of_other_layers_come_and_go(pipe):
    made = Adapter.over(pipe, partial(LoRA, rank=2), targets="attention+mlp")
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))
    request = Request("a red cat", steps=3)
    plain = latents(pipe, request)
    pipe.load_lora(copy.deepcopy(made), name="other")
    expected = latents(pipe, request)
    pipe.unload_lora()
    pipe.tabulate(request)
    pipe.load_lora(made, name="other")
    expect_close(latents(pipe, request), expected, 1e-5)
    pipe.lora_scale("other", 0.0)
    expect_close(latents(pipe, request), plain, 1e-5)
    pipe.unload_lora()
    assert pipe.adapters == {}


def test_an_adapter_of_modulation_comes_too_late(pipe, adapter, tmp_path):
    other = Adapter.over(pipe, partial(LoRA, rank=2))
    nn.init.ones_(next(other.parameters()))
    for name, made in (("all", adapter), ("other", other)):
        write_adapter(made, tmp_path / f"{name}.safetensors", dialect="comfyui", root=pipe)
    pipe.tabulate(Request("a red cat", steps=2))
    with pytest.raises(UserError, match=r"all\.safetensors: .* modulation layers are tables"):
        pipe.load_lora(tmp_path / "all.safetensors")
    pipe.load_lora(tmp_path / "other.safetensors")
    pipe.unload_lora()
    with pytest.raises(UserError, match="in whose place this model has modulation tables"):
        pipe.load_lora(adapter)
    assert pipe.adapters == {}


# Sizes


@pytest.mark.parametrize(
    ("name", "tables", "layers", "positions"),
    [
        ("d24", 49_201_152, 1_366_923_264, 12_582_912),
        ("sd35_medium", 55_910_400, 1_551_068_160, 12_582_912),
        ("d38", 123_662_336, 5_407_571_456, 19_922_944),
    ],
)
def test_sizes_of_the_published_networks(name, tables, layers, positions):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"), torch.device("meta"):
        network = instantiate(compose("train", [f"model={name}"]).model, latent_channels=16)
    sizes = table_sizes(network, times=28, pooled=2, dtype=torch.bfloat16)
    assert sizes == (tables, layers)
    crop_positions(network, 128, 128)
    assert 2 * network.positions.numel() == positions


def test_sizes_are_those_of_the_tables():
    network = with_intervals(Tiny(MMDiT)()).eval().bfloat16()
    sizes = table_sizes(network, times=2, pooled=3, lengths=2)
    before = sum(x.nbytes for x in network.parameters())
    tabulate(network, [0.5, 1.0], torch.eye(3, 10), lengths=[0.0, 0.5])
    tables = [part.table for part in network.modules() if isinstance(part, TabulatedModulation)]
    assert sizes.tables == sum(table.nbytes for table in tables)
    assert sizes.layers == before - sum(x.nbytes for x in network.parameters())
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(UserError, match=r"times=.* must be a whole number of at least 1"):
            table_sizes(network, times=wrong, pooled=1)


@pytest.mark.parametrize("size", [6, 7])
@torch.no_grad()
def test_the_middle_of_a_position_table_gives_the_same(size, randomize):
    network = randomize(Tiny(MMDiT)(position_size=size), 0)
    for rows in (1, 2, 5, 6):
        for columns in (1, 4):
            cropped = copy.deepcopy(network)
            crop_positions(cropped, 2 * rows, 2 * columns)
            assert cropped.longest_side <= 2 * (max(rows, columns) + 1)
            for height in range(2, 2 * rows + 1, 2):
                sizes = {"height": height, "width": 2 * columns}
                assert torch.equal(cropped(*inputs(**sizes)), network(*inputs(**sizes)))
    assert network.longest_side == 2 * size
    with pytest.raises(UserError, match="latent height 16 must be a multiple"):
        crop_positions(network, 16, 2)


def test_a_network_with_fewer_positions_is_described_as_one(randomize):
    network = Tiny(MMDiT)()
    crop_positions(network, 4, 2)
    assert network.positions.untyped_storage().nbytes() == 2 * 2 * 32 * 4
    twin = mmdit.registry.build(mmdit.registry.describe(network))
    assert torch.equal(twin.positions, network.positions)
