"""Post-training from the command line: rounds that resume exactly, and mistakes."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import mmdit
from mmdit.cli import CONFIGS
from mmdit.cli.initial import open_initial
from mmdit.engine.loggers import read_metrics
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.runs.checkpoint import read_weights
from mmdit.runs.native import save_module
from mmdit.text.clip_pair import CLIPPair
from mmdit.text.conditioning import TextEncoder
from mmdit.text.tokenizers import CLIPWordTokenizer
from tests.ready_process import Ready
from tests.training_for_tests import ALONE, assert_same_run, command, losses, run, wait_for_step

MINE = "tests.rewards_for_tests"
SMALL = (
    *("experiment=alignment", "~probe", "precision=fp32", "initial=runs/base", f"imports=[{MINE}]"),
    *("reward=function", f"reward.function={MINE}:brightness", "collector.groups=2"),
    *("collector.members=4", "collector.updates=2", "training.batch_size=8", "sampler.steps=3"),
    *("training.steps=8", "training.log_every=1", "training.evaluate_every=4"),
    *("training.save_every=4", "training.validation_size=4", "schedule.warmup_steps=0"),
    *("sampling.steps=2",),
)
ALGORITHMS = ("diffusion_nft", "flow_grpo", "awm", "diffusion_dpo", "diffusion_ipo", "best_of_n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run `runs/base`."""
    folder = tmp_path_factory.mktemp("work")
    run(folder, "train.py", "experiment=smoke", "precision=fp32", "run=runs/base")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_was_killed_within_a_round_goes_on_exactly(folder: Path, algorithm: str) -> None:
    words = (*SMALL, f"algorithm={algorithm}", "optimizer.lr=1e-3")
    killed, whole = (folder / "runs" / f"{algorithm}_{name}" for name in ("killed", "whole"))
    long = ("training.steps=100000", f"run={killed}")
    process = Ready(command("train.py", *words, *long)[1:], cwd=folder, env=ALONE)
    wait_for_step(process, killed, 5)  # the first step of the third round
    process.kill()
    process.wait()
    run(folder, "train.py", *words, f"resume={killed}")
    run(folder, "train.py", *words, f"run={whole}")
    assert_same_run(killed, whole)
    rewards = {row["step"]: row["reward"] for row in metrics(whole) if "reward" in row}
    assert sorted(rewards) == [1, 3, 5, 7]
    assert rewards == {row["step"]: row["reward"] for row in metrics(killed) if "reward" in row}
    assert read_weights(whole, "raw").sha256 != read_weights(folder / "runs" / "base", "raw").sha256


def metrics(path: Path) -> list[dict[str, float]]:
    return read_metrics(path / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["diffusion_nft", "flow_grpo"])
def test_two_processes_with_a_lora_have_the_losses_of_one(folder: Path, algorithm: str) -> None:
    words = (*SMALL, f"algorithm={algorithm}", "adapter=lora", "optimizer.lr=1e-3")
    one, both = (folder / "runs" / f"{algorithm}_{name}" for name in ("one", "both"))
    run(folder, "train.py", *words, f"run={one}")
    run(folder, "train.py", *words, f"run={both}", "parallel=ddp", processes=2)
    wanted, found = losses(one), losses(both)
    assert found.keys() == wanted.keys()
    assert [found[step] for step in wanted] == pytest.approx([*wanted.values()], rel=1e-3, abs=1e-5)
    rewards = [[row["reward"] for row in metrics(path) if "reward" in row] for path in (one, both)]
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("collector.members=1",), "collector.members=1 must be a whole number of at least 2"),
        (("training.save_every=3",), "must be a multiple of collector.updates=2"),
        (("initial=null",), "algorithm= trains a model further"),
        (("algorithm.beta=0",), "algorithm.beta=0 must be"),
        (("algorithm=flow_grpo", "sampler=ode"), "choose sampler=sde"),
        (("algorithm=flow_grpo", "sampler.window=[0,9]"), "sampler.window"),
        (("~prompt_source",), "needs prompt_source, too"),
        (("algorithm=diffusion_dpo", "algorithm.beta=-1"), "algorithm.beta"),
        (("prior=class_images", "prior.prompt=a"), "prior and algorithm exclude each other"),
    ],
)
def test_a_mistake_ends_in_one_message(folder: Path, words: tuple[str, ...], message: str) -> None:
    told = run(folder, "train.py", *SMALL, *words, code=2).stderr
    assert message in told and "Traceback" not in told
    assert len(told.strip().splitlines()) == 1, told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_finite", "nan"),
        ("too_few", "1 values for 8 images"),
        ("constant", "all 8 images of the first round"),
        ("failing", "KeyError"),
    ],
)
def test_a_reward_that_fails_loses_nothing(folder: Path, name: str, message: str) -> None:
    told = run(folder, "train.py", *SMALL, f"reward.function={MINE}:{name}", code=2).stderr
    assert message in told and "Traceback" not in told


def test_a_policy_is_sampled_as_it_was_trained(tiny_published: Path) -> None:
    words = (f"initial={tiny_published}", "experiment=alignment", "sampler.steps=7")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [*words, "sampler.guidance=2"])
        asked = compose("train", [*words, "sampling.guidance=4"])
    initial = open_initial(config, {"initial", "experiment", "sampler.steps"})
    assert initial is not None
    assert (initial.pipeline.steps, initial.pipeline.guidance) == (7, 2.0)
    initial = open_initial(asked, {"sampling.guidance"})
    assert initial is not None
    assert (initial.pipeline.steps, initial.pipeline.guidance) == (7, 4.0)


@pytest.mark.slow
def test_public_weights_are_trained_by_a_clip_reward_in_two_processes(
    tiny_published: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    words = CLIPWordTokenizer(words=["a", "cat", "dog"], length=8, pad_with_end=True)
    sizes = {"width": 16, "num_heads": 2, "depth": 2, "projection_width": 8}
    text = CLIPTextModel(vocabulary_size=words.vocabulary_size, length=8, **sizes)
    image = CLIPImageModel(image_size=32, patch_size=8, **sizes)
    pair = CLIPPair(text=TextEncoder(tokenizer=words, model=text), image=image)
    save_module(tmp_path / "clip.safetensors", pair)
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\na cat\na dog\n")
    run(
        tmp_path,
        "train.py",
        *("experiment=alignment", f"initial={tiny_published}", "adapter=lora", "parallel=ddp"),
        *("reward=clip", "reward.clip=clip.safetensors", "prompt_source=file", "~probe"),
        *("prompt_source.path=prompts.txt", "collector.groups=4", "collector.members=4"),
        *("training.steps=4", "training.batch_size=8", "training.log_every=1", "run=runs/two"),
        *("training.evaluate_every=4", "training.save_every=4", "training.validation_size=2"),
        *("sampler.steps=2", "schedule.warmup_steps=0", "image_size=32"),
        processes=2,
    )
    rows = metrics(tmp_path / "runs" / "two")
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert len(rewards) == 2 and all(-1 <= reward <= 1 for reward in rewards)
    assert max(losses(tmp_path / "runs" / "two")) == 4
    assert mmdit.load_pipeline(tmp_path / "runs" / "two").guidance == 1.0
