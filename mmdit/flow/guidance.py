"""Guidance: wrappers that turn a conditional velocity into the one that is integrated.

They compose: `GuidanceRescale(inner=GuidanceInterval(inner=ClassifierFreeGuidance(scale=5)))`.
Nested guidances share their network evaluations.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mmdit.checks import number
from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.flow.condition import Condition, LayeredVelocity, concatenate
from mmdit.flow.solvers import VelocityFunction
from mmdit.registry import register


class GuidedPair:
    """Conditional and unconditional velocity, at least float32.

    It caches the latest conditional evaluation, so nested guidances do not compute it again.

    Args:
        velocity: the network's velocity for a condition.
        positive, negative: the condition to move towards, and the one to move away from; None if
            the guidance does not use the unconditional velocity.
    """

    def __init__(
        self, velocity: LayeredVelocity, positive: Condition, negative: Condition | None
    ) -> None:
        self.velocity, self.positive = velocity, positive
        self._both = None if negative is None else concatenate([positive, negative])
        self._newest: list[tuple[Tensor, float, Tensor]] = []  # at most one

    def conditional(self, z: Tensor, t: float) -> Tensor:
        """The conditional velocity."""
        for known_z, known_t, known in self._newest:
            if known_z is z and known_t == t:
                return known
        cond = wide(self.velocity(z, t, self.positive))
        self._newest[:] = [(z, t, cond)]
        return cond

    def both(self, z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The conditional and unconditional velocities, computed in one batch."""
        assert self._both is not None, "`reads_negative` must be true if `both` is called"
        cond, uncond = wide(self.velocity(torch.cat([z, z]), t, self._both)).chunk(2)
        self._newest[:] = [(z, t, cond)]
        return cond, uncond

    def against(self, negative: Condition) -> "GuidedPair":
        """The same pair with another negative condition and a shared cache."""
        pair = GuidedPair(self.velocity, self.positive, negative)
        pair._newest = self._newest
        return pair


class Guidance(ABC):
    """A way to strengthen the influence of the condition."""

    @property
    def reads_negative(self) -> bool:
        """Whether it uses the negative prompt; if not, that prompt is not encoded."""
        return True

    @abstractmethod
    def guided(self, pair: GuidedPair, grid: Tensor, steps: int) -> VelocityFunction:
        """The velocity to integrate, at least float32, a function of z and t alone.

        Args:
            pair: the network's conditional and unconditional velocities.
            grid: the solver's decreasing times, (n + 1,).
            steps: number of steps of a full grid; n unless sampling starts from an image.
        """

    def __call__(
        self,
        velocity: LayeredVelocity,
        positive: Condition,
        negative: Condition | None,
        grid: Tensor,
        steps: int,
    ) -> VelocityFunction:
        """`guided` for a network and the conditions to move towards and away from."""
        return self.guided(GuidedPair(velocity, positive, negative), grid, steps)


@register
class ClassifierFreeGuidance(Guidance):
    """v = v_uncond + w (v_cond - v_uncond) (Ho & Salimans 2022).

    Args:
        scale: w. 1 disables guidance, so the unconditional velocity is not computed.
    """

    def __init__(self, *, scale: float = 4.5) -> None:
        number("ClassifierFreeGuidance: scale", scale)
        self.scale = scale

    @property
    def reads_negative(self) -> bool:
        return self.scale != 1.0

    def guided(self, pair: GuidedPair, grid: Tensor, steps: int) -> VelocityFunction:
        if self.scale == 1.0:
            return pair.conditional

        def guided(z: Tensor, t: float) -> Tensor:
            cond, uncond = pair.both(z, t)
            return uncond + self.scale * (cond - uncond)

        return guided


@register
class SkipLayerGuidance(Guidance):
    """Additional guidance away from the same network without some blocks (SD3.5 Medium).

    In steps i with start * steps < i < end * steps, it adds s (v_cond - v_skipped), as in the
    reference. Steps count from 0 at the first that is taken, also when sampling starts from an
    image. A time t between two points of the grid, where some solvers evaluate, belongs to the
    step that contains it.

    Args:
        inner: the guidance that this is added to.
        skip_scale: s.
        layers: indices of the blocks that are skipped.
        start, end: the window, as fractions of the steps.

    Raises:
        UserError: no layers, a scale that is not finite, or a window outside [0, 1].
    """

    def __init__(
        self,
        *,
        inner: Guidance,
        skip_scale: float = 2.5,
        layers: Sequence[int] = (7, 8, 9),
        start: float = 0.01,
        end: float = 0.2,
    ) -> None:
        if isinstance(layers, int) or not layers:
            raise UserError(f"SkipLayerGuidance: layers {layers} must be a list like [7, 8, 9]")
        number("SkipLayerGuidance: skip_scale", skip_scale)
        if not 0.0 <= start <= end <= 1.0:
            raise UserError(
                f"SkipLayerGuidance: start {start} and end {end} must be fractions of the steps, "
                "0 <= start <= end <= 1"
            )
        self.inner, self.skip_scale, self.layers = inner, skip_scale, tuple(layers)
        self.start, self.end = start, end

    @property
    def reads_negative(self) -> bool:
        return self.inner.reads_negative

    def guided(self, pair: GuidedPair, grid: Tensor, steps: int) -> VelocityFunction:
        inner = self.inner.guided(pair, grid, steps)
        skipped = pair.velocity.skipping(self.layers)
        windows = [
            (t_next, t)
            for i, (t, t_next) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True))
            if self.start * steps < i < self.end * steps
        ]

        def guided(z: Tensor, t: float) -> Tensor:
            v = inner(z, t)
            if any(low < t <= high for low, high in windows):
                weaker = wide(skipped(z, t, pair.positive))
                v = v + self.skip_scale * (pair.conditional(z, t) - weaker)
            return v

        return guided


@register
class GuidanceInterval(Guidance):
    """Guidance limited to an interval of noise levels (Kynkaanniemi et al. 2024).

    Outside of it the velocity is the conditional one.

    Args:
        inner: the guidance that is limited.
        low, high: limits of the interval low < sigma <= high; noise levels of the straight path.

    Raises:
        UserError: not 0 <= low < high <= 1.
    """

    def __init__(self, *, inner: Guidance, low: float = 0.2, high: float = 0.9) -> None:
        if not 0.0 <= low < high <= 1.0:
            raise UserError(
                f"GuidanceInterval: low {low} and high {high} must be noise levels, "
                "0 <= low < high <= 1"
            )
        self.inner, self.low, self.high = inner, low, high

    @property
    def reads_negative(self) -> bool:
        return self.inner.reads_negative

    def guided(self, pair: GuidedPair, grid: Tensor, steps: int) -> VelocityFunction:
        inner = self.inner.guided(pair, grid, steps)

        def guided(z: Tensor, t: float) -> Tensor:
            return inner(z, t) if self.low < t <= self.high else pair.conditional(z, t)

        return guided


@register
class GuidanceRescale(Guidance):
    """Gives the guided x_0 the contrast of the unguided one (Lin et al. 2023, Sec. 3.4).

    Strong guidance increases the spread of the predicted data, which looks overexposed. The guided
    x_0 of each image is rescaled towards the standard deviation of the conditional x_0.

    Args:
        inner: the guidance that is corrected.
        phi: strength of the correction, from 0 (none) to 1 (full).

    Raises:
        UserError: `phi` lies outside [0, 1].
    """

    def __init__(self, *, inner: Guidance, phi: float = 0.7) -> None:
        if not 0.0 <= phi <= 1.0:
            raise UserError(f"GuidanceRescale: phi {phi} must lie in [0, 1]")
        self.inner, self.phi = inner, phi

    @property
    def reads_negative(self) -> bool:
        return self.inner.reads_negative

    def guided(self, pair: GuidedPair, grid: Tensor, steps: int) -> VelocityFunction:
        inner = self.inner.guided(pair, grid, steps)

        def guided(z: Tensor, t: float) -> Tensor:
            x_0 = z - t * inner(z, t)
            wanted, actual = _spread(z - t * pair.conditional(z, t)), _spread(x_0)
            factor = torch.where(actual > 0, wanted / actual, torch.ones_like(actual))
            return (z - x_0 * (1 + self.phi * (factor - 1))) / t

        return guided


@register
class ZeroUnconditional(Guidance):
    """Replaces the encoding of the negative prompt by zeros, as if all encoders were dropped.

    This is the unconditional input in the paper's training (App. B.3); the published samplers
    encode the empty prompt instead. Only text is zeroed: control latents, masks and the like stay.

    Args:
        inner: the guidance that uses these zeros.
    """

    def __init__(self, *, inner: Guidance) -> None:
        self.inner = inner

    @property
    def reads_negative(self) -> bool:
        return False

    def guided(self, pair: GuidedPair, grid: Tensor, steps: int) -> VelocityFunction:
        c_vec, c_ctxt, _ = pair.positive
        zeros = pair.positive._replace(
            c_vec=torch.zeros_like(c_vec), c_ctxt=torch.zeros_like(c_ctxt)
        )
        return self.inner.guided(pair.against(zeros), grid, steps)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of each image (b, c, h, w): (b, 1, 1, 1)."""
    return x.flatten(1).std(1).reshape(-1, *[1] * (x.ndim - 1))
