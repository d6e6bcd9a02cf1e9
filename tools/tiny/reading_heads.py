"""Small heads that teach by being read from: what patches hold, and what words stand for. Thrown away afterwards."""

from __future__ import annotations

from torch import Tensor, nn

from tools.tiny.lesson_batches import TrainingBatch
from tools.tiny.lessons import MOST_COUNTED, MOST_PARTS, PATCH_CLASSES


class PatchReader(nn.Module):
    """Reads off each image token what is in its patches and where it lies; used in pre-training only."""

    def __init__(self, hidden_size: int, merge_size: int) -> None:
        super().__init__()
        self.content = nn.Linear(hidden_size, merge_size**2 * sum(PATCH_CLASSES))
        self.place = nn.Linear(hidden_size, 2)

    def forward(self, features: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, and the share of patches that hold something of which everything is read right.

        Args:
            features: Image tokens as the decoder receives them, shape (tokens, hidden).
            labels: As `patch_labels` says, shape (patches, 4).
            places: As `patch_places` says, shape (tokens, 2).
        """
        features = features.float()
        logits = self.content(features).view(len(labels), -1).split(PATCH_CLASSES, dim=1)
        loss = nn.functional.mse_loss(self.place(features).float(), places)
        right = labels[:, 0] > 0
        for column, part in enumerate(logits):
            loss = loss + nn.functional.cross_entropy(part.float(), labels[:, column])
            right = right & (part.argmax(-1) == labels[:, column])
        return loss, right.sum() / (labels[:, 0] > 0).sum()


class PhraseReader(nn.Module):
    """Reads off the last word that names something how many of these there are, and where the only one is.

    A layer later, it reads off the same word how far that is from what was named before: without it, relations between
    two things stayed at chance long after each of them was found.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.count = nn.Linear(hidden_size, MOST_PARTS * (MOST_COUNTED + 1))
        self.place = nn.Linear(hidden_size, 2)
        self.offset = nn.Linear(hidden_size, 2)

    def forward(self, hidden: Tensor, later: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Return the loss, and the share of counts that are read right.

        Args:
            hidden: Hidden states of one layer, shape (rows, length, hidden).
            later: Those of a later one.
            batch: Whose `phrase_*` tensors say what is to be read where.
        """
        words = hidden[batch.phrase_rows, batch.phrase_columns].float()
        logits = self.count(words).float().view(-1, MOST_COUNTED + 1)
        counts = batch.phrase_counts.flatten()
        loss = nn.functional.cross_entropy(logits, counts, ignore_index=-1)
        loss = loss + _distance(self.place(words), batch.phrase_places)
        loss = loss + _distance(
            self.offset(later[batch.phrase_rows, batch.phrase_columns].float()), batch.phrase_offsets
        )
        counted = counts >= 0
        right = (logits.argmax(-1) == counts) & counted
        return loss, right.sum() / counted.sum().clamp(min=1)


def _distance(read: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error over what is not NaN; 0 if nothing is."""
    known = ~wanted.isnan()
    if not known.any():
        return read.sum() * 0
    return nn.functional.mse_loss(read[known].float(), wanted[known])
