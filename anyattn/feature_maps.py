"""Feature maps of `linear_attention`: functions of an array (..., D) of queries or keys that give (..., F).

Every one of them works on arrays of any library, gives features that are not negative (`identity` aside), and
is differentiable where the library is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.numbers import integer, real

if TYPE_CHECKING:
    import numpy

__all__ = ["NAMED", "PositiveRandomFeatures", "elu_plus_one", "identity", "performer", "relu", "softmax"]


def identity(x: Array) -> Array:
    """x itself."""
    return x


def elu_plus_one(x: Array) -> Array:
    """x + 1 where x > 0, else exp(x) (Katharopoulos et al., "Transformers are RNNs", 2020, eq. 7)."""
    xp = arrays.namespace(x)
    # exp of what is positive may overflow, and would make the derivative of `where` NaN.
    return xp.where(x > 0, x + 1, xp.exp(xp.where(x > 0, 0.0, x)))


def relu(x: Array) -> Array:
    """The larger of x and 0."""
    return arrays.namespace(x).where(x < 0, 0.0, x)


def softmax(x: Array) -> Array:
    """exp(x) / sum over the features of exp(x): each token's features are positive and add up to 1."""
    if 0 in x.shape:
        # Dask has no maximum of an array of nothing along an axis that is not empty.
        return x
    xp = arrays.namespace(x)
    e = xp.exp(x - arrays.stop_gradient(xp.max(x, axis=-1, keepdims=True)))
    return e / xp.sum(e, axis=-1, keepdims=True)


NAMED: dict[str, Callable[[Array], Array]] = {
    "identity": identity,
    "elu+1": elu_plus_one,
    "relu": relu,
    "softmax": softmax,
}
"""The feature maps that `linear_attention` takes by name."""


def performer(
    dim: int, features: int, *, seed: int = 0, scale: float | None = None
) -> PositiveRandomFeatures:
    """Positive orthogonal random features (Choromanski et al., "Rethinking attention with Performers", 2021).

    With m random directions w and y = sqrt(scale) x, phi(x) = exp(w . y - y . y / 2) / sqrt(m). Over random w
    the mean of phi(q) . phi(k) is exp(scale q . k), so that normalised linear attention estimates softmax
    attention; docs/linear-attention.md says how well. The directions have the lengths of Gaussian vectors and
    are orthogonal in blocks of `dim`, which lowers the variance.

    Parameters
    ----------
    dim : int
        D, the features of queries and keys.
    features : int
        m, the random features; the error falls as 1 / sqrt(m).
    seed : int, default 0
        The same seed gives the same directions on every machine: Philox4x32-10 and Box-Muller.
    scale : float, optional
        Of the softmax attention that is estimated, at least 0; default 1 / sqrt(dim).

    Returns
    -------
    PositiveRandomFeatures
        To be given as `feature_map`. For the estimate of softmax attention call ``linear_attention(q, k, v,
        feature_map=performer(D, m), normalize=True, scale=1.0)``.

    Notes
    -----
    Features are at most exp(w . w / 2), with w . w near D: float32 holds them for D up to 128. They underflow
    where scale x . x / 2 exceeds some 87; a query whose features all vanish gives 0.
    """
    dim, features = integer(dim, "dim", least=1), integer(features, "features", least=1)
    seed = integer(seed, "seed", least=0)
    scale = 1 / math.sqrt(dim) if scale is None else real(scale, "scale")
    if scale < 0:
        raise ValueError(f"scale: wanted 0 or more, got {scale}")
    return PositiveRandomFeatures(_directions(dim, features, seed), scale)


@dataclass(frozen=True, eq=False)
class PositiveRandomFeatures:
    """What `performer` makes: called with (..., D) it gives (..., m).

    Attributes
    ----------
    directions : numpy.ndarray, shape (m, D)
    scale : float
    """

    directions: numpy.ndarray[Any, Any]
    scale: float

    def __call__(self, x: Array) -> Array:
        xp = arrays.namespace(x)
        features, dim = self.directions.shape
        if x.shape[-1] != dim:
            raise ValueError(f"feature_map: performer was made for {dim} features, got {x.shape[-1]}")
        columns = xp.asarray(self.directions.T.copy(), dtype=x.dtype, device=arrays.device(x))
        y = x * math.sqrt(self.scale)
        exponent = xp.matmul(y, columns) - xp.sum(y * y, axis=-1, keepdims=True) / 2
        return xp.exp(exponent) / math.sqrt(features)

    def __repr__(self) -> str:
        features, dim = self.directions.shape
        return f"<performer of {features} random features of {dim}, scale {self.scale:g}>"


def _directions(dim: int, features: int, seed: int) -> numpy.ndarray[Any, Any]:
    """Gaussian lengths on directions that are orthogonal in blocks of `dim`, (features, dim)."""
    import numpy as np

    blocks = -(-features // dim)
    normal = _normal(seed, 2 * blocks * dim * dim).reshape(2, blocks, dim, dim)
    # Householder's signs are LAPACK's choice: the diagonal of R is made positive, as Gram-Schmidt has it.
    orthogonal, upper = np.linalg.qr(np.swapaxes(normal[0], 1, 2))
    signs = np.where(np.diagonal(upper, axis1=1, axis2=2) < 0, -1.0, 1.0)
    rows = np.swapaxes(orthogonal * signs[:, None, :], 1, 2)
    lengths = np.sqrt((normal[1] ** 2).sum(axis=-1, keepdims=True))
    directions: numpy.ndarray[Any, Any] = (rows * lengths).reshape(-1, dim)[:features]
    return directions


def _normal(seed: int, count: int) -> numpy.ndarray[Any, Any]:
    """`count` standard normal numbers, two from each pair of Philox words (Box & Muller, 1958)."""
    import numpy as np

    from anyattn.philox import philox4x32

    words = philox4x32(seed, (np.arange(-(-count // 4)), 0, 0, 0))
    # In (0, 1): the logarithm of 0 is never taken.
    uniform = [(word.astype(np.float64) + 0.5) / 2.0**32 for word in words]
    found = []
    for radius, angle in (uniform[:2], uniform[2:]):
        length = np.sqrt(-2 * np.log(radius))
        found += [length * np.cos(2 * np.pi * angle), length * np.sin(2 * np.pi * angle)]
    normal: numpy.ndarray[Any, Any] = np.stack(found, axis=-1).reshape(-1)[:count]
    return normal
