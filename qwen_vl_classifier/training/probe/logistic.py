"""L2 logistic regression: many problems on one matrix of features, solved at once.

The folds and penalties of a search differ in the weights of the rows and in the penalty; the matrix of features is one.
So all of them take their Newton steps together and share its products. Steps are truncated Newton steps: conjugate
gradients, stopped early (Lin, Weng and Keerthi, 2008, "Trust region Newton method for large-scale logistic
regression"). Hidden states vary along few axes far more than along all others, which makes plain conjugate gradients
slow; they are preconditioned by those axes, found once for all problems from a random start (Frangella, Tropp and
Udell, 2021, "Randomized Nyström preconditioning", arXiv:2110.02820).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MOST_STEPS = 50  # Newton steps
_MOST_PRODUCTS = 100  # conjugate gradient steps in one Newton step
_SLACKEST = 0.3  # of the gradient, what may be left when a Newton step is first taken
_ARMIJO = 1e-4
_HALVINGS = 30
_AXES = 256  # that the preconditioner knows
_FEW = 512  # features of which all axes are found at once
_POWERS = 2  # products that turn random directions to the axes of most variance
_TINY = 1e-300  # keeps 0 / 0 of a problem that is solved already from becoming NaN


@dataclass(frozen=True, slots=True)
class LogisticFit:
    """Solutions, one for each problem.

    Attributes:
        coefficients: float64, shape (problems, features).
        intercepts: float64, shape (problems,).
        margins: float64, shape (problems, rows): the log odds of class 1 of every row, also of those of weight 0.
    """

    coefficients: npt.NDArray[np.float64]
    intercepts: npt.NDArray[np.float64]
    margins: npt.NDArray[np.float64]


def fit_logistic(
    features: Tensor,
    targets: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    penalties: npt.NDArray[np.float64],
    *,
    tolerance: float = 1e-9,
) -> LogisticFit:
    """Minimise the weighted mean of the rows' cross-entropy plus penalty / 2 * |coefficients|^2, of each problem.

    The intercept is not penalised. scikit-learn's `C` is 1 / (penalty * sum of weights).

    Args:
        features: Shape (rows, features), standardised; their type, float32 or float64, is that of the products.
        targets: Shape (rows,), labels or probabilities of class 1.
        weights: Shape (problems, rows), 0 or more; both classes must have some weight.
        penalties: Shape (problems,), above 0.
        tolerance: How far, at most, the objective is from its minimum, roughly.
    """
    width = features.shape[1]
    basis = None
    if width > 2 * len(features):  # coefficients lie in the space of the rows: the same problem, with fewer of them
        basis, triangle = torch.linalg.qr(features.T)
        features = triangle.T.contiguous()
    axes = _Axes.of(features)
    # Columns are problems from here on; sums over rows and line searches are float64 whatever the products are.
    wide, narrow = torch.float64, features.dtype
    target = torch.from_numpy(np.asarray(targets, dtype=np.float64))[:, None]
    share = torch.from_numpy(np.ascontiguousarray(weights.T / weights.sum(axis=1)))
    ridge = torch.from_numpy(np.asarray(penalties, dtype=np.float64))
    design = torch.cat([features, torch.ones(len(features), 1, dtype=narrow)], dim=1)
    solution = torch.zeros(design.shape[1], len(penalties), dtype=wide)
    margins = torch.zeros(len(design), len(penalties), dtype=wide)
    active = torch.arange(len(penalties))
    first: Tensor | None = None
    for _ in range(_MOST_STEPS):
        a, r, s, m = share[:, active], ridge[active], solution[:, active], margins[:, active]
        p = torch.sigmoid(m)
        gradient = (design.T @ (a * (p - target)).to(narrow)).to(wide)
        gradient[:-1] += r * s[:-1]
        curvature = (a * p * (1 - p)).to(narrow)
        problem = _Quadratic(design, axes, curvature, r)
        size = (gradient * problem.precondition(gradient)).sum(dim=0)
        first = size if first is None else first
        # A Newton step far from the end need not be exact; close to it, exactness brings quadratic convergence.
        slack = (size / first[active].clamp_min(_TINY)).sqrt().clamp_max(_SLACKEST)
        step = problem.solve(-gradient, slack)
        move = (design @ step.to(narrow)).to(wide)
        slope = (gradient * step).sum(dim=0)
        length = _line_search(m, move, s, step, target, a, r, slope)
        solution[:, active] = s + length * step
        margins[:, active] = m + length * move
        active = active[(-slope / 2 > tolerance) & (length > 0)]
        if not len(active):
            break
    coefficients = solution[:-1] if basis is None else basis.to(wide) @ solution[:-1]
    return LogisticFit(coefficients.T.numpy(), solution[-1].numpy(), margins.T.numpy())


@dataclass(frozen=True, slots=True)
class _Axes:
    """The axes along which features vary most.

    Attributes:
        directions: Orthonormal columns.
        variances: float64, the variance along each.
        rest: The mean variance along all others.
    """

    directions: Tensor
    variances: Tensor
    rest: float

    @classmethod
    def of(cls, features: Tensor) -> _Axes:
        """Find them, exactly where there are few features."""
        rows, width = features.shape
        gram = features.T @ features / rows
        total = float(gram.diagonal().double().sum())
        if width <= _FEW:
            variances, directions = torch.linalg.eigh(gram)
        else:
            start = torch.randn(width, _AXES, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
            for _ in range(_POWERS):
                start, _ = torch.linalg.qr(gram @ start)
            variances, turn = torch.linalg.eigh(start.T @ (gram @ start))
            directions = start @ turn
        variances = variances.double().clamp_min(0.0)
        left = width - len(variances)
        return cls(directions, variances, max(0.0, total - float(variances.sum())) / left if left else 0.0)


class _Quadratic:
    """The second-order part of problems at a point: Hessians, of which only products are ever made.

    Args:
        design: Features with a column of ones.
        axes: Of the features.
        curvature: Shape (rows, problems).
        ridge: float64, shape (problems,).
    """

    def __init__(self, design: Tensor, axes: _Axes, curvature: Tensor, ridge: Tensor) -> None:
        self._design = design
        self._axes = axes
        self._curvature = curvature
        self._ridge = ridge
        # Rows of like curvature would have the Hessian: mean curvature * variance + ridge along each axis.
        self._mean = curvature.double().sum(dim=0).clamp_min(_TINY)
        self._rest = 1 / (self._mean * axes.rest + ridge)
        self._excess = 1 / (self._mean * axes.variances[:, None] + ridge) - self._rest

    def precondition(self, residual: Tensor) -> Tensor:
        """Multiply by a rough inverse of the Hessian."""
        directions = self._axes.directions
        along = self._excess * (directions.T @ residual[:-1].to(directions.dtype)).double()
        scaled = torch.cat([residual[:-1] * self._rest, residual[-1:] / self._mean])
        scaled[:-1] += (directions @ along.to(directions.dtype)).double()
        return scaled

    def solve(self, right: Tensor, slack: Tensor) -> Tensor:
        """Solve Hessian @ step = right by conjugate gradients, until a share `slack` of the right side is left."""
        step, residual = torch.zeros_like(right), right.clone()
        direction = self.precondition(residual)
        power = (residual * direction).sum(dim=0)
        enough = power * slack**2
        for _ in range(_MOST_PRODUCTS):
            going = power > enough
            if not going.any():
                break
            product = self._product(direction)
            bend = (direction * product).sum(dim=0)
            going &= bend > 0
            length = torch.where(going, power / bend.clamp_min(_TINY), 0.0)
            step += length * direction
            residual -= length * product
            scaled = self.precondition(residual)
            new = torch.where(going, (residual * scaled).sum(dim=0), 0.0)
            # What is solved rests: without a direction it cannot overflow.
            direction = torch.where(going, scaled + new / power.clamp_min(_TINY) * direction, 0.0)
            power = new
        return step

    def _product(self, vectors: Tensor) -> Tensor:
        narrow = self._design.dtype
        product = (self._design.T @ (self._curvature * (self._design @ vectors.to(narrow)))).double()
        product[:-1] += self._ridge * vectors[:-1]
        return product


def _line_search(
    margins: Tensor,
    move: Tensor,
    solution: Tensor,
    step: Tensor,
    target: Tensor,
    share: Tensor,
    ridge: Tensor,
    slope: Tensor,
) -> Tensor:
    """Halve the step of each problem until its objective falls enough; 0 where it does not, to the last digit."""
    w, d = solution[:-1], step[:-1]  # without the intercept
    flat, half, full = (ridge * pair.sum(dim=0) for pair in (w**2, w * d, d**2))

    def objective(length: Tensor) -> Tensor:
        z = margins + length * move
        loss = (share * (torch.nn.functional.softplus(z) - target * z)).sum(dim=0)
        return loss + (flat + 2 * length * half + length**2 * full) / 2

    start = objective(torch.zeros_like(slope))
    length = torch.ones_like(slope)
    for _ in range(_HALVINGS):
        enough = objective(length) <= start + _ARMIJO * length * slope
        if enough.all():
            return length
        length = torch.where(enough, length, length / 2)
    return torch.where(objective(length) <= start + _ARMIJO * length * slope, length, 0.0)
