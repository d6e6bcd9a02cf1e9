"""Pre-train the built-in backbone from scratch on synthetic scenes.

    python -m qwen_vl_classifier.backbone.tiny.pretrain --out DIR --minutes 40

Each scene is one packed row: its picture as prefix, then one suffix that asks for a dense caption and several that
ask for yes or no. The suffixes do not see each other (see `backbone.attention`), so the network is trained on exactly
what it meets later, one question after one picture, at the price of one picture for all of them. The caption teaches
what is where; yes and no alone learn several times slower.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from qwen_vl_classifier.backbone.checkpoint import write_weights
from qwen_vl_classifier.backbone.encoder import PackedBatch, hidden_states, pack
from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.backbone.loading import Backbone
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.taps import LAST_NORM
from qwen_vl_classifier.backbone.tiny.design import write_design
from qwen_vl_classifier.data.drawing import SIZES, draw, sample_scene
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.scenes import KINDS, UNSEEN_PAIRS, Kind, caption, scene_rng, statements

CAPTION_PROMPT = "List the shapes."
_KIND_MIX: tuple[Kind, ...] = (
    *KINDS,
    "relation",
    "relation",
)  # the kind that learns slowest, asked more often
_CHECKPOINT = "training_state.pth"
_LOG_EVERY = 100  # steps


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the built-in backbone is trained."""

    seed: int = 0
    batch_size: int = 16
    questions: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 150
    caption_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Packed rows with the places where a token is to be predicted.

    Attributes:
        packed: The rows.
        rows: Row of each predicted token.
        columns: Column of the token before it.
        targets: The token.
        kinds: What it answers: an index into `KINDS`, or -1 for a caption.
    """

    packed: PackedBatch
    rows: Tensor
    columns: Tensor
    targets: Tensor
    kinds: Tensor


class SceneBatches(IterableDataset[TrainingBatch]):
    """Endless batches of scenes, always the same for the same recipe."""

    def __init__(self, processor: Processor, recipe: Recipe, first: int) -> None:
        self.processor = processor
        self.recipe = recipe
        self.first = first

    def __iter__(self) -> Iterator[TrainingBatch]:
        number = self.first
        while True:
            yield self.make(number)
            number += 1

    def make(self, number: int) -> TrainingBatch:
        """Build one batch."""
        size = SIZES[number % len(SIZES)]
        encoded: list[EncodedExample] = []
        batch = []
        answers: list[tuple[int, int, int, list[int], int]] = []
        for position in range(self.recipe.batch_size):
            rng = scene_rng("pretraining", self.recipe.seed, number * self.recipe.batch_size + position)
            scene = sample_scene(rng, size=size, exclude=UNSEEN_PAIRS)
            asked = [(CAPTION_PROMPT, caption(scene), -1)]
            for line in statements(scene, rng, self.recipe.questions, kinds=_KIND_MIX, exclude=UNSEEN_PAIRS):
                asked.append((line.text, "Yes" if line.label else "No", KINDS.index(line.kind)))
            pictures = self.processor.read_pictures(Example(draw(scene, rng=rng), ""))
            row = []
            column = 0
            for text, answer, kind in asked:
                example = self.processor.encode(Example(None, text), pictures)
                answer_ids = self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
                if kind < 0:
                    answer_ids = [*answer_ids, self.processor.tokenizer.eos_token_id]
                column = column or example.prefix_length
                column += len(example.ids) - example.prefix_length
                answers.append((position, column - 1, len(answer_ids), answer_ids, kind))
                # The last answer token is only predicted, never read.
                column += len(answer_ids) - 1
                row.append(len(encoded))
                encoded.append(replace(example, ids=[*example.ids, *answer_ids[:-1]]))
            batch.append(tuple(row))
        packed = pack(
            encoded,
            tuple(batch),
            image_token_id=self.processor.image_token_id,
            pad_token_id=self.processor.pad_token_id,
            merge_size=self.processor.merge_size,
            device=torch.device("cpu"),
        )
        rows = [row for row, _, count, _, _ in answers for _ in range(count)]
        columns = [column + k for _, column, count, _, _ in answers for k in range(count)]
        targets = [token for *_, ids, _ in answers for token in ids]
        kinds = [kind for _, _, count, _, kind in answers for _ in range(count)]
        return TrainingBatch(packed, *(torch.tensor(values) for values in (rows, columns, targets, kinds)))


def initialise(folder: Path, seed: int) -> None:
    """Write the built-in backbone's design and random weights as a checkpoint in the hub's layout."""
    import importlib

    write_design(folder)
    family = FAMILIES["qwen2_5_vl"]
    model_class = getattr(importlib.import_module(family.module), family.model_class)
    config = model_class.config_class.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    torch.manual_seed(seed)
    write_weights(model_class(config), family, folder, torch.bfloat16)


def losses(model: nn.Module, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of every predicted token, and whether the best guess was right.

    Returns:
        Two tensors of shape (predicted tokens,).
    """
    ((_, hidden),) = hidden_states(model, batch.packed, {LAST_NORM})
    head = model.language_model.embed_tokens.weight  # type: ignore[union-attr]
    logits = nn.functional.linear(hidden[batch.rows, batch.columns], head).float()  # type: ignore[arg-type]
    loss = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    return loss, logits.argmax(-1) == batch.targets


def pretrain(folder: Path, *, minutes: float, recipe: Recipe, resume: bool = False, device: str = "auto") -> None:
    """Train and write checkpoints to a folder until the time is used up.

    Args:
        folder: Receives the checkpoint in the hub's layout, `training_log.jsonl` and the state to resume from.
        minutes: Training time in total, time before an interruption included.
        recipe: Everything else.
        resume: Go on from the state in the folder.
        device: As in `Backbone.load`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        initialise(folder, recipe.seed)
    backbone = Backbone.load(folder, dtype="float32", device=device)
    model = backbone.model.train().requires_grad_(True)
    optimizers = _optimizers(model, recipe)
    step, elapsed = 0, 0.0
    if resume:
        state = torch.load(folder / _CHECKPOINT, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, elapsed = int(state["step"]), float(state["elapsed"])
    loader = iter(
        DataLoader(SceneBatches(backbone.processor, recipe, step), batch_size=None, num_workers=1, prefetch_factor=4)
    )
    started = time.monotonic() - elapsed
    total_seconds = round(minutes * 60)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    with (
        tqdm(total=total_seconds, unit="s", desc="pretrain") as bar,
        (folder / "training_log.jsonl").open("a" if resume else "w", encoding="utf-8") as log,
    ):
        while elapsed < minutes * 60:
            batch = _to(next(loader), backbone.device)
            progress = min(1.0, elapsed / (minutes * 60))
            rate = min(1.0, (step + 1) / recipe.warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * max(rate, 0.01)
            # Matrix products in bfloat16, weights and everything else in float32.
            with torch.autocast(backbone.device.type, dtype=torch.bfloat16):
                loss, right = losses(model, batch)
            is_caption = batch.kinds < 0
            total = loss[~is_caption].mean() + recipe.caption_weight * loss[is_caption].mean()
            model.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            for kind in range(-1, len(KINDS)):
                chosen = batch.kinds == kind
                entry = sums["caption" if kind < 0 else KINDS[kind]]
                entry[0] += float(loss.detach()[chosen].sum())
                entry[1] += float(right[chosen].sum())
                entry[2] += float(chosen.sum())
            previous, elapsed = elapsed, time.monotonic() - started
            bar.update(min(round(elapsed), total_seconds) - int(bar.n))
            if step % _LOG_EVERY == 0:
                record: dict[str, Any] = {"step": step, "seconds": round(elapsed)}
                for name, (loss_sum, right_sum, count) in sums.items():
                    if count:
                        record[name] = {
                            "loss": round(loss_sum / count, 4),
                            "accuracy": round(right_sum / count, 4),
                        }
                sums.clear()
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix_str(
                    " ".join(f"{name} {record[name]['accuracy']:.2f}" for name in KINDS if name in record)
                )
            if elapsed // 120 > previous // 120:
                _checkpoint(folder, model, optimizers, step, elapsed)
    _checkpoint(folder, model, optimizers, step, elapsed)
    _write_card(folder, model, recipe, step, elapsed)


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


def _checkpoint(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, elapsed: float
) -> None:
    write_weights(model, FAMILIES["qwen2_5_vl"], folder, torch.bfloat16)
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "elapsed": elapsed,
    }
    partial = folder / f"{_CHECKPOINT}.partial"
    torch.save(state, partial)
    partial.replace(folder / _CHECKPOINT)


def _write_card(folder: Path, model: nn.Module, recipe: Recipe, step: int, elapsed: float) -> None:
    """Say what the checkpoint is and how it was made."""
    scenes = step * recipe.batch_size
    weights = sum(parameter.numel() for parameter in model.parameters())
    lines = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [
        f"| {name} | {value['loss']:.3f} | {value['accuracy']:.3f} |"
        for name, value in (json.loads(lines[-1]) if lines else {}).items()
        if isinstance(value, dict)
    ]
    settings = ", ".join(f"{name} {value}" for name, value in asdict(recipe).items())
    (folder / "README.md").write_text(
        f"""# The built-in backbone of qwen-vl-classifier

A Qwen2.5-VL architecture in miniature ({weights / 1e6:.1f} million weights, bfloat16), trained from random weights on
synthetic scenes of coloured shapes and on nothing else. It is for trying things out, for tests and for benchmarks.

- Data: {scenes:,} scenes of the split "pretraining", each with a caption and {recipe.questions} questions; colour-shape
  pairs in `UNSEEN_PAIRS` are neither drawn nor named.
- Compute: {step:,} steps in {elapsed / 60:.0f} minutes on {os.cpu_count()} CPU cores.
- Recipe: {settings}.
- Made by: `python -m qwen_vl_classifier.backbone.tiny.pretrain`.

Over the last steps of training, on scenes seen for the first time:

| kind | loss | accuracy |
|---|---|---|
{chr(10).join(scores)}
""",
        encoding="utf-8",
    )


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
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args()
    pretrain(
        options.out,
        minutes=options.minutes,
        recipe=Recipe(seed=options.seed),
        resume=options.resume,
        device=options.device,
    )


if __name__ == "__main__":
    main()
