"""Pre-train the built-in backbone on synthetic pictures, from scratch or from weights that are there.

    python -m tools.tiny.pretrain --out DIR --minutes 90
    python -m tools.tiny.pretrain --out DIR --minutes 90 --weights FOLDER --seed 1

Each lesson is one packed row: its pictures as prefix, then one suffix for each question. The suffixes do not see each
other (see `backbone.layers.attention`), so the network is trained on exactly what it meets later, one question after
the pictures, at the price of one pass through the pictures for all of them. Yes and no alone teach slowly: captions,
open questions and small heads that read patches and words (see `reading_heads`) say more about what is where.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.checkpoint.writing import write_weights
from qwen_vl_classifier.backbone.encoder import hidden_states
from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.backbone.taps import LAST_NORM
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.whole import new_file
from tools.tiny.card import write_card
from tools.tiny.design import DESIGN_FILES, write_design
from tools.tiny.freed_memory import keep_freed_memory
from tools.tiny.lesson_batches import LessonBatches, Recipe, TrainingBatch
from tools.tiny.lessons import LESSON_KINDS
from tools.tiny.reading_heads import PatchReader, PhraseReader

_CHECKPOINT = "training_state.pth"
_FOUND, _COMPARED = (4, False), (5, False)  # where words stand for things; one layer is left to answer
_PREDICTING = (LAST_NORM, False)
_LOG_EVERY = 100  # steps
_SAVE_EVERY = 120  # seconds


def initialise(folder: Path, seed: int) -> None:
    """Write the built-in backbone's design and random weights as a checkpoint in the hub's layout."""
    write_design(folder)
    family = FAMILIES["qwen2_5_vl"]
    model_class = family.load_class()
    config = model_class.config_class.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    torch.manual_seed(seed)
    write_weights(model_class(config), family, folder, torch.bfloat16)


def copy_checkpoint(weights: Path, folder: Path) -> None:
    """Copy design and weights of a built-in backbone, and nothing else.

    Args:
        weights: A checkpoint that this module wrote.
        folder: Where to put it.

    Raises:
        ConfigError: A file is missing.
    """
    for name in (*DESIGN_FILES, "model.safetensors"):
        if not (weights / name).is_file():
            raise ConfigError(f"{weights}: no {name}; give the folder of a checkpoint of the built-in backbone")
        shutil.copyfile(weights / name, folder / name)


def look(model: nn.Module, batch: TrainingBatch) -> Tensor:
    """Return the image tokens of a batch, shape (tokens, hidden), from the vision tower alone."""
    vision: Any = model.visual
    output = vision(batch.packed.pixel_values, grid_thw=torch.tensor(batch.packed.grids), return_dict=True)
    features: Tensor = output.pooler_output
    return features


@dataclass(frozen=True, slots=True)
class Answers:
    """What one pass of the whole model gives.

    Attributes:
        loss: Cross-entropy of every predicted token, shape (predicted tokens,).
        right: Whether the best guess was right, likewise.
        image_tokens: Image tokens as the decoder received them, shape (tokens, hidden).
        found: Hidden states of the layer at which words are to stand for things, shape (rows, length, hidden).
        compared: Those of the layer at which two of them are to be compared, likewise.
    """

    loss: Tensor
    right: Tensor
    image_tokens: Tensor
    found: Tensor
    compared: Tensor


def answer(model: nn.Module, batch: TrainingBatch) -> Answers:
    """Run the whole model."""
    features: list[Tensor] = []
    vision: Any = model.visual
    with vision.register_forward_hook(lambda _module, _inputs, output: features.append(output.pooler_output)):
        states = dict(hidden_states(model, batch.packed, {_FOUND, _COMPARED, _PREDICTING}))
    predicting = states[_PREDICTING][batch.rows, batch.columns]
    head = model.language_model.embed_tokens.weight  # type: ignore[union-attr]
    logits = nn.functional.linear(predicting, head).float()  # type: ignore[arg-type]
    loss = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    right = logits.argmax(-1) == batch.targets
    return Answers(loss, right, features[0], states[_FOUND], states[_COMPARED])


def pretrain(
    folder: Path,
    *,
    minutes: float,
    recipe: Recipe,
    weights: Path | None = None,
    resume: bool = False,
    device: str = "auto",
) -> None:
    """Train and write checkpoints to a folder until the time is used up.

    Args:
        folder: Receives the checkpoint in the hub's layout, `training_log.jsonl` and the state to resume from.
        minutes: Training time in total, time before an interruption included.
        recipe: Everything else. Give it another seed than the run that made `weights`, or its first lessons come again.
        weights: Folder of a checkpoint to begin from instead of random weights. Optimisers and the heads that read
            begin anew.
        resume: Go on from the state in the folder.
        device: As in `Backbone.load`.

    Raises:
        ConfigError: Both `weights` and `resume`, or a folder without checkpoint.
    """
    if weights is not None and resume:
        raise ConfigError("both weights and resume: begin from weights, or go on from the state in the folder")
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        copy_checkpoint(weights, folder)
    elif not resume:
        initialise(folder, recipe.seed)
    backbone = Backbone.load(folder, dtype="float32", device=device)
    run = _Run(folder, backbone, recipe, seconds=minutes * 60, given=weights is not None)
    if resume:
        run.restore()
    with (
        tqdm(total=round(run.seconds), unit="s", desc="pretrain") as bar,
        (folder / "training_log.jsonl").open("a" if resume else "w", encoding="utf-8") as log,
    ):
        for stage, share in (("looking", run.recipe.looking), ("answering", 1.0)):
            run.train_until(stage, share * run.seconds, bar, log)
    run.save()
    start = "weights that were given" if run.given else "random weights"
    write_card(folder, backbone, run.recipe, start=start, steps=run.step, lessons=run.lessons, seconds=run.elapsed)


class _Run:
    """One training run: what is trained, and how far it has come."""

    def __init__(self, folder: Path, backbone: Backbone, recipe: Recipe, *, seconds: float, given: bool) -> None:
        self.folder = folder
        self.backbone = backbone
        self.seconds = seconds
        self._begin(recipe, given=given)
        self.model = backbone.model.train().requires_grad_(True)
        self.patches = PatchReader(backbone.hidden_size, backbone.processor.merge_size)
        self.phrases = PhraseReader(backbone.hidden_size)
        self.readers = nn.ModuleList([self.patches, self.phrases]).to(backbone.device)
        self.parameters = [*self.model.parameters(), *self.readers.parameters()]
        self.optimizers = _optimizers(nn.ModuleList([self.model, self.readers]), recipe)
        self.step = 0
        self.lessons = 0
        self.elapsed = 0.0

    def _begin(self, recipe: Recipe, *, given: bool) -> None:
        """Leave out what only helps random weights over their first steps where weights are given."""
        self.given = given
        self.recipe = replace(recipe, looking=0.0, easy_steps=0) if given else recipe

    def train_until(self, stage: str, end: float, bar: Any, log: TextIO) -> None:
        """Train one stage until so many seconds of the whole run are over."""
        looking = stage == "looking"
        recipe = replace(self.recipe, questions=0, batch_size=2 * self.recipe.batch_size) if looking else self.recipe
        # With two cores, a worker takes from training what it gives.
        workers = 0 if self.backbone.device.type == "cpu" else 8
        batches = iter(
            DataLoader(LessonBatches(self.backbone.processor, recipe, self.step), batch_size=None, num_workers=workers)
        )
        begun, first = self.elapsed, self.step
        started = time.monotonic() - begun
        meters = _Meters()
        while self.elapsed < end:
            batch = _to(next(batches), self.backbone.device)
            warm = min(1.0, (self.step - first + 1) / recipe.warmup_steps)
            cosine = 0.5 * (1 + math.cos(math.pi * self.elapsed / self.seconds))
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * warm * max(cosine, 0.01)
            # Matrix products in bfloat16, weights and everything else in float32.
            with torch.autocast(self.backbone.device.type, dtype=torch.bfloat16):
                total = self._loss(batch, meters, looking=looking)
            for parameter in self.parameters:
                parameter.grad = None
            total.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            self.lessons += len(batch.packed.input_ids)
            previous, self.elapsed = self.elapsed, time.monotonic() - started
            bar.update(min(round(self.elapsed), round(self.seconds)) - int(bar.n))
            if self.step % _LOG_EVERY == 0:
                record = {"step": self.step, "seconds": round(self.elapsed), **meters.take()}
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix_str(_summary(record))
            if self.elapsed // _SAVE_EVERY > previous // _SAVE_EVERY:
                self.save()

    def _loss(self, batch: TrainingBatch, meters: _Meters, *, looking: bool) -> Tensor:
        if looking:
            alone: Tensor
            alone, right = self.patches(look(self.model, batch), batch.labels, batch.places)
            meters.add("patches", alone, right)
            return alone
        answers = answer(self.model, batch)
        if self.given and self.step < self.recipe.warmup_steps:
            answers = _apart(answers)
        reading: Tensor
        reading, right = self.patches(answers.image_tokens, batch.labels, batch.places)
        meters.add("patches", reading, right)
        naming, right = self.phrases(answers.found, answers.compared, batch)
        meters.add("phrases", naming, right)
        for number, kind in enumerate(LESSON_KINDS):
            chosen = batch.kinds == number
            meters.add(kind, answers.loss[chosen], answers.right[chosen])
        captions = batch.kinds == LESSON_KINDS.index("caption")
        total: Tensor = self.recipe.patch_weight * reading + self.recipe.phrase_weight * naming
        total = total + self.recipe.question_weight * answers.loss[~captions].mean()
        return total + self.recipe.caption_weight * answers.loss[captions].mean() if captions.any() else total

    def save(self) -> None:
        """Write the weights, and the state to resume from; whole or not at all."""
        write_weights(self.model, FAMILIES["qwen2_5_vl"], self.folder, torch.bfloat16)
        state = {
            "model": self.model.state_dict(),
            "readers": self.readers.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "lessons": self.lessons,
            "elapsed": self.elapsed,
            "given": self.given,
        }
        with new_file(self.folder / _CHECKPOINT) as file:
            torch.save(state, file)

    def restore(self) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(self.folder / _CHECKPOINT, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.readers.load_state_dict(state["readers"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.lessons, self.elapsed = state["step"], state["lessons"], state["elapsed"]
        self._begin(self.recipe, given=state["given"])


def _apart(answers: Answers) -> Answers:
    """Cut off what the heads read, so that they learn from the network and not yet the network from them."""
    read = {name: getattr(answers, name).detach() for name in ("image_tokens", "found", "compared")}
    return replace(answers, **read)


class _Meters:
    """Means of loss and accuracy by kind, between two lines of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def add(self, kind: str, loss: Tensor, right: Tensor) -> None:
        """Add the values of one batch."""
        entry = self._sums[kind]
        entry[0] += float(loss.detach().sum())
        entry[1] += float(right.sum())
        entry[2] += loss.numel()

    def take(self) -> dict[str, dict[str, float]]:
        """Return the means so far and begin anew."""
        means = {
            kind: {"loss": round(loss / count, 4), "accuracy": round(right / count, 4)}
            for kind, (loss, right, count) in self._sums.items()
            if count
        }
        self._sums.clear()
        return means


def _summary(record: dict[str, Any]) -> str:
    return " ".join(f"{kind} {value['accuracy']:.2f}" for kind, value in record.items() if isinstance(value, dict))


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices inside the blocks, AdamW for everything else."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (inner if parameter.ndim == 2 and "embed" not in name else outer).append(parameter)
    return [
        torch.optim.Muon(
            inner,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(outer, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _to(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
    def move(item: Any) -> Any:
        moved = {
            name: value.to(device)
            for name in item.__dataclass_fields__
            if isinstance(value := getattr(item, name), Tensor)
        }
        return replace(item, **moved)

    moved: TrainingBatch = move(replace(batch, packed=move(batch.packed)))
    return moved


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the training log")
    parser.add_argument("--minutes", type=float, default=40.0, help="training time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and scenes (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=Recipe().learning_rate, help="the highest (default: %(default)s)"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the state in --out")
    start.add_argument("--weights", type=Path, metavar="FOLDER", help="begin from this checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args()
    keep_freed_memory()
    pretrain(
        options.out,
        minutes=options.minutes,
        recipe=Recipe(seed=options.seed, learning_rate=options.learning_rate),
        weights=options.weights,
        resume=options.resume,
        device=options.device,
    )


if __name__ == "__main__":
    main()
