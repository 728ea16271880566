"""One step: what is accumulated, what is refused, and what is said when memory runs out."""

import pytest
import torch
from torch import Tensor, nn

from mmdit.engine.loader import Part
from mmdit.engine.parallel import Single
from mmdit.engine.step import Stepper
from mmdit.errors import UserError
from mmdit.processes import Processes


def parts(count: int, size: int = 8) -> list[Part]:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
    share = size // count
    return [
        Part(7, list(range(i * share, (i + 1) * share)), x[i * share : (i + 1) * share])
        for i in range(count)
    ]


def stepper(module: nn.Module, loss, *, skips: bool = False, section: str = "training") -> Stepper:
    return Stepper(
        loss,
        parallel=Single(),
        processes=Processes(),
        trained=[(module, torch.optim.SGD(module.parameters(), lr=0.1))],
        clip=100.0,
        skips=skips,
        section=section,
    )


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def squares(module: nn.Module):
    return lambda x: module(x)[:, 0].square()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_accumulation_leaves_gradient_loss_and_update_equal(count):
    whole, cut = line(), line()
    first = stepper(whole, squares(whole))(parts(1))
    second = stepper(cut, squares(cut))(parts(count))
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    assert second.norm == pytest.approx(first.norm, rel=1e-6)
    torch.testing.assert_close(cut.weight.grad, whole.weight.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(cut.weight, whole.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_is_updated_where_something_is_not_finite(bad, where):
    module = line()
    before = module.weight.clone()

    def loss(x: Tensor) -> Tensor:
        losses = squares(module)(x)
        wrong = torch.full_like(losses, bad)
        here = torch.arange(len(losses)) == 5
        if where == "loss":
            return torch.where(here, wrong, losses)  # whose gradient is zero
        losses.register_hook(lambda gradient: gradient * torch.where(here, wrong, 1.0))
        return losses

    with pytest.raises(UserError, match=r"step 7: .*training.nonfinite=skip"):
        stepper(module, loss)(parts(1))
    assert torch.equal(module.weight, before)
    left_out = stepper(module, loss, skips=True)(parts(1))
    assert not left_out.updated and torch.equal(module.weight, before)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
def test_what_to_do_when_memory_runs_out_is_said(error):
    def loss(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(UserError, match=r"out of memory with 4 .*training.accumulation=4"):
        stepper(line(), loss)(parts(2))


def test_a_stage_is_told_its_own_keys():
    def memory_runs_out(x: Tensor) -> Tensor:
        raise MemoryError

    module = line()
    with pytest.raises(UserError) as told:
        stepper(module, lambda x: module(x)[:, 0] / 0, section="clip.training")(parts(1))
    assert "Lower clip.lr: the clip is then trained anew" in str(told.value)
    assert str(told.value).endswith("with ++clip.training.nonfinite=skip")
    with pytest.raises(UserError) as told:
        stepper(module, memory_runs_out, section="clip.training")(parts(2))
    assert str(told.value).endswith(
        "Try ++clip.training.accumulation=4 (the same losses), precision=bf16"
    )


def test_another_error_is_raised_as_it_is():
    def loss(x: Tensor) -> Tensor:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        stepper(line(), loss)(parts(1))
