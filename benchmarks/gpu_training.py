"""Fine-tuning against what most people run: transformers' Trainer over a model with PEFT's LoRA, on the same rows."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import transformers
from checkpoints import untrained
from gpu_bench import Bench
from gpu_rows import Reading
from racing import synchronise
from torch import Tensor, nn

from qwen_vl_classifier import Example, FinetuneConfig, finetune

_EPOCHS, _THEIR_EPOCHS = 3, 2
_RANK, _ALPHA, _DROPOUT, _RATE = 16, 32, 0.05, 2e-4
_LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
_ROOM = 60e9  # bytes of free memory in which a whole batch fits without gradient checkpointing
_MICRO_BATCH = 4


class EpochClock(transformers.TrainerCallback):  # type: ignore[misc]
    """Note the seconds of each epoch's steps, without the evaluation that follows them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: list[float] = []
        self._started = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Begin, before the first batch is made."""
        synchronise()
        self._started = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """End with the last step."""
        if state.global_step % self.steps == 0:
            synchronise()
            self.seconds.append(time.perf_counter() - self._started)


class PlainClassifier(nn.Module):
    """Transformers' model without language head, mean pooling and a linear layer, as a script would have it."""

    def __init__(self, model: nn.Module, hidden_size: int, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(hidden_size, 2, device=device)

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Return loss and logits of a batch."""
        hidden = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        logits = self.head(((hidden * mask).sum(1) / mask.sum(1)).float())
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def training(bench: Bench, seconds: float) -> Iterator[Reading]:
    """Train adapters of the decoder with the vision tower frozen, by this package and by transformers' Trainer.

    The two cannot take turns within a run. Of theirs, the first epoch warms up, and later ones count.

    Raises:
        ModuleNotFoundError: An extra package is missing.
    """
    for name in ("accelerate", "peft"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name, name=name)
    rows = bench.rows(bench.sizes.small, bench.sizes.training + bench.sizes.batch)
    learning, validation = rows[: bench.sizes.training], rows[bench.sizes.training :]
    tokens = sum(len(row.ids) for row in bench.backbone.prepare(learning))
    ours: list[float] = []
    theirs: list[float] = []
    our_memory = bench.peak_memory(lambda: ours.extend(_finetune(bench, learning, validation)))
    bench.free_memory()
    their_memory = bench.peak_memory(lambda: theirs.extend(_train_plainly(bench, learning)))
    bench.forget_plain()  # it has adapters now
    later, plain = statistics.median(ours[1:]), statistics.median(theirs[1:])
    notes = {"tokens/s": tokens / later, "theirs": tokens / plain, "rows": len(learning)}
    yield Reading("training-second", plain / later, notes)
    yield Reading("training-first", plain / ours[0], {"tokens/s": tokens / ours[0]})
    if their_memory:
        yield Reading("training-memory", our_memory / their_memory, {"GiB": our_memory, "theirs": their_memory})


def _steps(bench: Bench, rows: Sequence[Example]) -> int:
    return -(-len(rows) // bench.sizes.batch)


def _finetune(bench: Bench, rows: Sequence[Example], validation: Sequence[Example]) -> list[float]:
    """Return the seconds of each epoch of `finetune`."""
    clock = EpochClock(_steps(bench, rows))
    config = FinetuneConfig(
        epochs=_EPOCHS,
        batch_size=bench.sizes.batch,
        rank=_RANK,
        alpha=_ALPHA,
        adapter_dropout=_DROPOUT,
        learning_rate=_RATE,
        bf16=bench.dtype == torch.bfloat16,
        patience=0,
        save_steps=10**6,
        report_to="none",
    )
    usual = transformers.trainer.DEFAULT_CALLBACKS
    with mock.patch.object(transformers.trainer, "DEFAULT_CALLBACKS", [*usual, clock]):
        finetune(untrained(bench.backbone), rows, validation, config=config, progress=False)
    return clock.seconds


def _train_plainly(bench: Bench, rows: Sequence[Example]) -> list[float]:
    """Return the seconds of each epoch of transformers' Trainer; it leaves adapters in the plain loop's model."""
    import peft

    plain = bench.plain
    settings = peft.LoraConfig(r=_RANK, lora_alpha=_ALPHA, lora_dropout=_DROPOUT, target_modules=_LAYERS)
    hidden_size = plain.model.config.get_text_config().hidden_size
    plain.model.requires_grad_(False)
    peft.inject_adapter_in_model(settings, plain.model.model)
    for name, weight in plain.model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()  # as get_peft_model does
            weight.requires_grad_(True)
    model = PlainClassifier(plain.model.model, hidden_size, bench.device)
    fits = bench.device.type != "cuda" or torch.cuda.mem_get_info()[0] > _ROOM
    micro = bench.sizes.batch if fits else min(_MICRO_BATCH, bench.sizes.batch)
    clock = EpochClock(_steps(bench, rows))

    def collate(batch: Sequence[Example]) -> dict[str, Tensor]:
        return {**plain.inputs(batch), "labels": torch.tensor([row.label for row in batch])}

    arguments = transformers.TrainingArguments(
        output_dir=str(bench.folder / "plain-training"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=bench.sizes.batch // micro,
        num_train_epochs=_THEIR_EPOCHS,
        learning_rate=_RATE,
        bf16=bench.dtype == torch.bfloat16,
        use_cpu=bench.device.type == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_strategy="no",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else it would split batches over all GPUs
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=list(rows), data_collator=collate, callbacks=[clock]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock.seconds
