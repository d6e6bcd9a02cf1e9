"""Heads on standardised features: trained for all folds at once, and for good."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qwen_vl_classifier.classifier.head import HeadSpec, fold_standardisation, row_losses
from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.training.probe.logistic import fit_logistic
from qwen_vl_classifier.training.splitting import Folds, RowNumbers

_CLOSE_ENOUGH = 1e-7  # to the minimum, for log losses that are compared to four decimals
_ROUNDING = 1e-6  # deviations of float32 features that mean nothing, as a share of their size


@dataclass(frozen=True, slots=True)
class Standardised:
    """Features of one tap with mean 0 and deviation 1.

    Attributes:
        inputs: float32, shape (n, hidden).
        mean: Shape (hidden,).
        scale: Shape (hidden,); infinite where a feature is constant but for rounding. A constant feature carries
            nothing. Divided by infinity it stays zero, also where it varies later on; divided by its own tiny
            deviation, it would then drown all others.
    """

    inputs: Tensor
    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: npt.NDArray[np.float32]) -> Standardised:
        """Standardise features of shape (n, hidden)."""
        mean, deviation = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
        deviation[deviation <= _ROUNDING * np.maximum(np.abs(mean), 1.0)] = np.inf
        centre, scale = torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()
        return cls((torch.from_numpy(np.ascontiguousarray(features)) - centre) / scale, centre, scale)


def linear_margins(
    data: Standardised,
    targets: Float,
    weights: Float,
    parts: Folds,
    penalties: Sequence[float],
) -> Float:
    """Return the out-of-fold margins of logistic regression, shape (penalties, n).

    Args:
        data: Features.
        targets: Shape (n,), the probability of class 1.
        weights: Shape (n,).
        parts: Rows to train on and rows held out, of each fold.
        penalties: What to try.
    """
    shares = np.zeros((len(parts), len(targets)))
    for share, (rows, _) in zip(shares, parts, strict=True):
        share[rows] = weights[rows]
    problems = np.tile(shares, (len(penalties), 1)), np.repeat(penalties, len(parts))
    fit = fit_logistic(data.inputs, targets, *problems, tolerance=_CLOSE_ENOUGH)
    margins = np.empty((len(penalties), len(targets)))
    everywhere = fit.margins.reshape(len(penalties), len(parts), -1)
    for number, (_, held) in enumerate(parts):
        margins[:, held] = everywhere[:, number, held]
    return margins


def linear_head(data: Standardised, targets: Float, weights: Float, l2: float) -> tuple[nn.Module, HeadSpec]:
    """Fit logistic regression on all rows and return it as a head on features as they are, with its shape."""
    fit = fit_logistic(data.inputs.double(), targets, weights[None], np.array([l2]), tolerance=1e-12)
    weight, bias = (torch.from_numpy(values) / 2 for values in (fit.coefficients[0], fit.intercepts[:1]))
    spec = HeadSpec("linear", data.inputs.shape[1])
    return _built(spec, data, [torch.stack([-weight, weight]), torch.cat([-bias, bias])]), spec


@dataclass(frozen=True, slots=True)
class MlpValidation:
    """What cross-validation of the mlp head found.

    Attributes:
        margins: float64, shape (n,), out of fold; not finite where training went astray.
        epochs: Number of epochs that is best over all folds.
    """

    margins: Float
    epochs: int


def validate_mlp(
    data: Standardised, targets: Float, weights: Float, parts: Folds, config: TrainConfig
) -> MlpValidation:
    """Train the mlp head of all folds and stop it early.

    A fold's margins are those after the number of epochs that is best for the held-out rows of the *other* folds: so no
    row has a say in how long the head that answers it is trained, and none is lost to training.

    Args:
        data: Features.
        targets: Shape (n,), the probability of class 1.
        weights: Shape (n,).
        parts: Rows to train on and rows held out, of each fold.
        config: Options.
    """
    target, weight = torch.from_numpy(targets), torch.from_numpy(weights)
    history: list[Tensor] = []  # of each epoch: margins of all rows
    losses: list[list[float]] = []  # of each epoch: the summed loss of each fold's held-out rows
    best, best_epoch = math.inf, 0
    for epoch, heads in enumerate(_epochs(data, targets, weights, [rows for rows, _ in parts], config), start=1):
        margins = torch.empty(len(targets), dtype=torch.float64)
        for number, (_, held) in enumerate(parts):
            margins[held] = heads.margins(number, data.inputs[held]).double()
        logits = torch.stack([-margins, margins], dim=1) / 2
        each = weight * row_losses(logits, target, focal_gamma=config.focal_gamma)
        history.append(margins)
        losses.append([float(each[held].sum()) for _, held in parts])
        total = sum(losses[-1])
        if total < best:
            best, best_epoch = total, epoch
        elif not epoch - best_epoch < config.patience or not math.isfinite(total):
            break
    curves = np.nan_to_num(np.array(losses), nan=np.inf)
    chosen = np.empty(len(targets))
    for number, (_, held) in enumerate(parts):
        others = np.delete(curves, number, axis=1).sum(axis=1)
        chosen[held] = history[int(others.argmin())][held].numpy()
    return MlpValidation(chosen if best_epoch else np.full(len(targets), np.nan), best_epoch)


def mlp_head(
    data: Standardised, targets: Float, weights: Float, epochs: int, config: TrainConfig
) -> tuple[nn.Module, HeadSpec]:
    """Train the mlp head on all rows and return it as a head on features as they are, with its shape."""
    trained = next(
        itertools.islice(_epochs(data, targets, weights, [np.arange(len(targets))], config), epochs - 1, None)
    )
    spec = _mlp_spec(data, config)
    return _built(spec, data, trained.of(0)), spec


def _built(spec: HeadSpec, data: Standardised, parameters: Sequence[Tensor]) -> nn.Module:
    """Make a head on features as they are from parameters for standardised ones."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # the caller's random numbers are none of our business
        head = spec.build()
        for parameter, value in zip(head.parameters(), parameters, strict=True):
            parameter.copy_(value)
    fold_standardisation(head, data.mean, data.scale)
    return head.eval()


def _mlp_spec(data: Standardised, config: TrainConfig) -> HeadSpec:
    return HeadSpec("mlp", data.inputs.shape[1], config.units, config.dropout)


class _Heads:
    """Mlp heads of one shape, stacked: one for each fold."""

    def __init__(self, spec: HeadSpec, count: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are none of our business
            torch.manual_seed(seed)
            first = [parameter.detach() for parameter in spec.build().parameters()]
        w1, b1, w2, b2 = (torch.stack([value] * count) for value in first)
        self.parameters = [
            value.contiguous().requires_grad_()
            for value in (w1.transpose(1, 2), b1[:, None], w2.transpose(1, 2), b2[:, None])
        ]

    def logits(self, inputs: Tensor, kept: Tensor) -> Tensor:
        """Return logits, shape (folds, rows, 2), of a batch for each fold; `kept` scales the hidden units."""
        w1, b1, w2, b2 = self.parameters
        return torch.baddbmm(b2, torch.relu(torch.baddbmm(b1, inputs, w1)) * kept, w2)

    @torch.no_grad()
    def margins(self, number: int, inputs: Tensor) -> Tensor:
        """Return the margins of one fold's head, without dropout."""
        w1, b1, w2, b2 = (value[number] for value in self.parameters)
        both = torch.relu(inputs @ w1 + b1) @ w2 + b2
        return both[:, 1] - both[:, 0]

    def of(self, number: int) -> list[Tensor]:
        """Return one fold's parameters in the layout of `HeadSpec.build`."""
        w1, b1, w2, b2 = (value[number].detach() for value in self.parameters)
        return [w1.T, b1[0], w2.T, b2[0]]


def _epochs(
    data: Standardised, targets: Float, weights: Float, parts: Sequence[RowNumbers], config: TrainConfig
) -> Iterator[_Heads]:
    """Train a head on each part, all in the same steps, and yield them after each epoch.

    A part is trained as it would be alone: order and dropout come from generators of its own.
    """
    spec = _mlp_spec(data, config)
    heads = _Heads(spec, len(parts), config.seed)
    optimizer = torch.optim.AdamW(
        heads.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    target, weight = torch.from_numpy(targets).float(), torch.from_numpy(weights).float()
    generators = [torch.Generator().manual_seed(config.seed) for _ in parts]
    steps = math.ceil(len(targets) / config.batch_size)  # of all rows, so that a part's steps depend on no other part
    for _ in range(config.epochs):
        orders = [
            np.array_split(rows[torch.randperm(len(rows), generator=generator).numpy()], steps)
            for rows, generator in zip(parts, generators, strict=True)
        ]
        for batch in zip(*orders, strict=True):
            width = max(map(len, batch))
            if not width:
                continue
            # Shorter batches are filled up with rows that do not count.
            index = torch.from_numpy(np.stack([np.pad(rows, (0, width - len(rows))) for rows in batch]))
            counts = torch.tensor([[number < len(rows) for number in range(width)] for rows in batch])
            kept = _dropout([len(rows) for rows in batch], width, spec, generators)
            share = weight[index] * counts
            share = share / share.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            optimizer.zero_grad(set_to_none=True)
            logits = heads.logits(data.inputs[index], kept)
            (share * row_losses(logits, target[index], focal_gamma=config.focal_gamma)).sum().backward()
            optimizer.step()
        yield heads


def _dropout(lengths: Sequence[int], width: int, spec: HeadSpec, generators: Sequence[torch.Generator]) -> Tensor:
    """Return what each hidden unit of each row is multiplied by, shape (folds, width, units)."""
    kept = torch.zeros(len(lengths), width, spec.units)
    for number, (length, generator) in enumerate(zip(lengths, generators, strict=True)):
        drawn = torch.rand(length, spec.units, generator=generator)
        kept[number, :length] = (drawn >= spec.dropout) / (1 - spec.dropout)
    return kept
