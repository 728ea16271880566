"""Distances between two sets of features (Frechet and kernel distance), and the CLIP score.

The paper's FID (Sec. 5.1) is the Frechet distance of CLIP-L/14 image features, not of Inception
features, so its values are not comparable with the usual FID.
"""

import torch
from torch import Tensor

from mmdit.errors import UserError


class Moments:
    """Mean and covariance of features, accumulated batch by batch in float64.

    Batches are merged by the update of Chan et al. 1979, which avoids cancellation.

    Args:
        width: dimension of the features.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features (n, d).

        Raises:
            UserError: they are not a matrix of this width, or not finite.
        """
        part = checked(features, "features")
        if part.shape[1] != len(self.mean):
            raise UserError(f"features are {part.shape[1]} wide, and must be {len(self.mean)}")
        if not len(part):
            return
        mean = part.mean(0)
        apart, total = mean - self.mean, self.count + len(part)
        self._scatter += (part - mean).T @ (part - mean)
        self._scatter += torch.outer(apart, apart) * (self.count * len(part) / total)
        self.mean = self.mean + apart * (len(part) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, (d, d) float64.

        Raises:
            UserError: there are fewer than two samples.
        """
        if self.count < 2:
            raise UserError(f"{self.count} samples have no covariance: at least 2 are needed")
        return self._scatter / (self.count - 1)

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """The moments of features (n, d)."""
        moments = cls(checked(features, "features").shape[1])
        moments.add(features)
        return moments


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)   (Dowson and Landau 1982)

    With n <= d samples a covariance is singular. The distance is still defined but has a large
    bias, which decreases with n: compare only sets of equal size (the paper's have tens of
    thousands of samples).

    Args:
        a, b: features (n, d), or their moments.

    Raises:
        UserError: fewer than two samples, widths that differ, or values that are not finite.
    """
    first, second = (x if isinstance(x, Moments) else Moments.of(x) for x in (a, b))
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"features are {len(first.mean)} and {len(second.mean)} wide: they must be equally wide"
        )
    shift = (first.mean - second.mean).square().sum()
    covariances = first.covariance, second.covariance
    root = matrix_root(covariances[0])
    # tr (AB)^1/2 as a symmetric problem, whose computed eigenvalues are real, unlike those of AB.
    product = root @ covariances[1] @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * shared
    return (shift + spread).item()


def matrix_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix (d, d).

    Eigenvalues that are negative by rounding are set to zero.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy, the unbiased estimate: KID (Binkowski et al. 2018, Eq. 4).

    Unlike that of the Frechet distance, its expectation does not depend on the number of samples.
    It is zero for two sets from one distribution, so estimates can be negative. The kernel is
    cubic, (x . y / d + 1)^3. Binkowski et al. average over random subsets of 1000; here all pairs
    are used.

    Args:
        a, b: features (n, d) and (m, d).

    Raises:
        UserError: fewer than two samples, widths that differ, or values that are not finite.
    """
    first, second = checked(a, "a"), checked(b, "b")
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"features are {first.shape[1]} and {second.shape[1]} wide: they must be equally wide"
        )
    for features in (first, second):
        if len(features) < 2:
            raise UserError(f"{len(features)} samples are too few: at least 2 are needed")
    between = _total(first, second) / (len(first) * len(second))
    return _mean_of_others(first) + _mean_of_others(second) - 2 * between


def _mean_of_others(features: Tensor) -> float:
    """The mean kernel over pairs of different samples of one set."""
    n, width = features.shape
    themselves = _cubic(features.square().sum(1), width).sum().item()
    return (_total(features, features) - themselves) / (n * (n - 1))


def _total(a: Tensor, b: Tensor) -> float:
    """The sum of the kernel over all pairs, a thousand rows at a time to save memory."""
    return sum(_cubic(part @ b.T, a.shape[1]).sum().item() for part in a.split(1000))


def _cubic(products: Tensor, width: int) -> Tensor:
    """The kernel (x . y / d + 1)^3, given the products x . y."""
    return (products / width + 1) ** 3


def clip_score(image: Tensor, text: Tensor) -> float:
    """Mean cosine similarity of images with their prompts, in [-1, 1], as in the paper's tables.

    The paper's values are about 0.25. Others multiply by 100, or by 2.5 and clamp at zero.

    Args:
        image, text: features (n, d), of any norm.

    Raises:
        UserError: shapes that differ, no samples, or values that are not finite.
    """
    first, second = checked(image, "image"), checked(text, "text")
    if first.shape != second.shape or not len(first):
        raise UserError(
            f"features of images {tuple(first.shape)} and of texts {tuple(second.shape)} must have "
            "the same shape and at least one row: each image is compared with its own prompt"
        )
    return torch.cosine_similarity(first, second, dim=1).mean().item()


def checked(features: Tensor, name: str) -> Tensor:
    """A set of features in float64 on the CPU.

    Raises:
        UserError: it is not a matrix (n, d), or not finite.
    """
    if features.ndim != 2:
        raise UserError(f"{name} {tuple(features.shape)} must be features (n, d)")
    plain = features.detach().to("cpu", torch.float64)
    if not torch.isfinite(plain).all():
        row = int((~torch.isfinite(plain)).any(1).nonzero()[0])
        raise UserError(f"{name}: row {row} is not finite")
    return plain
