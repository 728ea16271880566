"""What the network's output means, and how to read x_0, epsilon and velocity from it (Sec. 2)."""

from abc import ABC, abstractmethod

from torch import Tensor

from mmdit.flow.paths import Path
from mmdit.registry import register


class Prediction(ABC):
    """Meaning of a network's output on a path."""

    @abstractmethod
    def target(self, path: Path, x_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """What a perfect network outputs for this pair; same shape as x_0."""

    @abstractmethod
    def velocity(self, path: Path, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """dz/dt, which the solvers integrate; same shape as z_t."""


@register
class Velocity(Prediction):
    """The output is the velocity of the path: epsilon - x_0 on the straight one (Eq. 14)."""

    def target(self, path: Path, x_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        return path.velocity(x_0, epsilon, t)

    def velocity(self, path: Path, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        return output
