"""The loop of fine-tuning: Hugging Face's Trainer with this package's batches, step, validation and best state."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from qwen_vl_classifier.backbone.devices import memory_advice, release_memory
from qwen_vl_classifier.backbone.packing import pack_together
from qwen_vl_classifier.backbone.windows import prepare, read_ahead
from qwen_vl_classifier.config.finetune import FinetuneConfig
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import (
    OutOfMemoryError,
    StoppedError,
    TrainingError,
)
from qwen_vl_classifier.files.whole import new_file
from qwen_vl_classifier.training.finetuning.callbacks import LoopCallback, watch_for_sigterm
from qwen_vl_classifier.training.finetuning.kept_tokens import KeptTokens
from qwen_vl_classifier.training.finetuning.optimizers import make_optimizer
from qwen_vl_classifier.training.finetuning.resuming import BEST, WEIGHTS, disk_advice, load_trained_weights
from qwen_vl_classifier.training.finetuning.step import (
    MOST_GRADIENT_NORM,
    PackedClassifier,
    add_gradients,
    check_gradient_norm,
)
from qwen_vl_classifier.training.finetuning.throughput import StepClock, Throughput, peak_memory, reset_peak_memory
from qwen_vl_classifier.training.finetuning.training_batches import (
    Collator,
    EpochBatches,
    LabelledRows,
    Slot,
    TrainingBatch,
    rough_lengths,
)
from qwen_vl_classifier.training.finetuning.validation import (
    TRAINING_LOSS,
    VALIDATION_ACCURACY,
    VALIDATION_LOSS,
    best_of,
    evaluations,
    features_of,
    is_exhausted,
)

_SCHEDULERS = {"constant": "constant_with_warmup"}  # transformers' "constant" passes over the warm-up
_LOGGED = 200  # losses in the log of a run, about
_HEAD = "classifier."  # what names of the head's parameters begin with


class FinetuneTrainer(Trainer):  # type: ignore[misc]  # transformers carries no types
    """Train a classifier, whole or in part.

    One call of `training_step` is one step of the optimiser: it splits its batch into as many micro-batches as memory
    requires, so that running out of memory changes how long a step takes and not what it does.

    Args:
        model: What to train; parameters that require no gradient stay.
        rows: What to learn from.
        validation: Labelled examples that choose the best state.
        collator: Makes batches of rows.
        config: Options.
        folder: Of the run: checkpoints, logs, the best state.
        report_to: Names of what transformers reports to.
        kept: Keeps what a frozen vision tower makes of pictures; `None` has the tower run in each pass.
    """

    def __init__(
        self,
        model: PackedClassifier,
        rows: LabelledRows,
        validation: LabelledRows,
        collator: Collator,
        config: FinetuneConfig,
        folder: Path,
        report_to: Sequence[str],
        kept: KeptTokens | None = None,
    ) -> None:
        steps = math.ceil(len(rows) / config.batch_size)
        on_cpu = model.backbone.device.type == "cpu"
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=config.batch_size,
            num_train_epochs=config.epochs,
            learning_rate=config.rate,
            lr_scheduler_type=_SCHEDULERS.get(config.schedule, config.schedule),
            warmup_steps=int(config.warmup * steps * config.epochs),
            weight_decay=config.weight_decay,
            max_grad_norm=MOST_GRADIENT_NORM,
            eval_strategy="steps",
            eval_steps=math.ceil(steps / config.evaluations_per_epoch),
            save_strategy="steps",
            save_steps=config.save_steps,
            logging_steps=max(1, steps * config.epochs // _LOGGED),
            logging_nan_inf_filter=False,
            report_to=list(report_to),
            disable_tqdm=True,
            use_cpu=on_cpu,
            ddp_find_unused_parameters=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            seed=config.seed,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs take several processes, never DataParallel
        self.rows = rows
        self.validation = validation
        self.collator = collator
        self.config = config
        self.hidden_size = model.backbone.hidden_size
        self.dtype = model.backbone.dtype
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self.optimizer: torch.optim.Optimizer | None
        self.control: TrainerControl
        self.names: list[str] = []  # of the rows of the step
        self._tokens = 0  # in the step
        self.loss = math.nan  # of the last step
        self.losses: list[float] = []  # of the steps since the last evaluation
        self._epoch: Iterator[TrainingBatch] | None = None  # transformers' own, of the epoch that runs
        self._ahead: Iterator[TrainingBatch] = iter(())  # the same batches, one ahead
        self.clock = StepClock()
        super().__init__(model=model, args=arguments, train_dataset=rows, eval_dataset=validation)
        # A tower whose weights are shared out runs in step with those of other processes, or not at all.
        self.kept = None if self.is_fsdp_enabled or self.is_deepspeed_enabled else kept
        if self.kept is not None:
            collator.read = partial(self.kept.read, autocast=config.bf16)
        self.remove_callback(PrinterCallback)

    def run(self, checkpoint: Path | None, *, progress: bool) -> list[dict[str, Any]]:
        """Train to the end, from the beginning or from a checkpoint.

        Args:
            checkpoint: Of a run of the same options and rows.
            progress: Show a progress line.

        Returns:
            Each look at the validation rows: see `FinetuneResult.history`.

        Raises:
            StoppedError: SIGTERM came, and the run saved its state.
            TrainingError: The run's folder cannot be written any more.
        """
        with watch_for_sigterm() as came, contextlib.ExitStack() as stack:
            stack.callback(self._read_ahead, None)
            loop = LoopCallback(
                self._begin_epoch,
                self._end_step,
                lambda: self._over_processes(came()) > 0,
                self._progress if progress else None,
            )
            reset_peak_memory(self.args.device)
            self.add_callback(loop)
            with disk_advice(self.args.output_dir):
                if checkpoint is None:
                    self.args.eval_on_start = True
                    self.train()
                else:
                    self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
                    if not self.has_ended:  # else it was interrupted after its last step
                        self.train(resume_from_checkpoint=str(checkpoint))
            if loop.stopped and not self.has_ended:
                raise StoppedError(
                    f"stopped by SIGTERM after step {self.state.global_step} of {self.state.max_steps}, "
                    f"saved in {self.args.output_dir}; continue with {spelled('resume', True)}"
                )
        return [
            {
                "step": entry["step"],
                "epoch": entry["step"] / self.steps_per_epoch,
                "training_loss": entry.get(TRAINING_LOSS),
                "validation_log_loss": entry[VALIDATION_LOSS],
                "validation_accuracy": entry[VALIDATION_ACCURACY],
            }
            for entry in evaluations(self.state)
        ]

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to do: all steps are done, or validation does not get better."""
        return self.state.global_step >= self.state.max_steps or is_exhausted(self.state, self.config.patience)

    def _begin_epoch(self, steps: int) -> None:
        self.sampler.epoch = self.collator.epoch = steps // self.steps_per_epoch

    def _end_step(self) -> None:
        self.clock.end(self._tokens)

    def _progress(self) -> dict[str, str]:
        return {
            "loss": f"{self.loss:.4f}",
            "validation": f"{best_of(self.state)[VALIDATION_LOSS]:.4f}",
            "tokens/s": f"{self.clock.rate:,.0f}",
            "GB": f"{peak_memory(self.args.device)[0] / 1e9:.1f}",
        }

    def throughput(self) -> Throughput | None:
        """Return how fast the steps of this process and of those beside it were; `None` if there were none.

        All processes call this together.
        """
        if not self.clock.seconds:
            return None
        peak, device = peak_memory(self.args.device)
        return Throughput(
            tokens_per_second=self._over_processes(self.clock.rate),
            peak_memory=int(max(gather_object([peak]))) if self.args.world_size > 1 else peak,
            device=device,
            vision_tokens="" if self.kept is None else self.kept.describe(),
        )

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log, with a loss of steps also their speed and the memory that was needed so far."""
        if "loss" in logs:
            peak, _ = peak_memory(self.args.device)
            logs = {**logs, "tokens_per_second": self.clock.lap(), "peak_memory_gb": peak / 1e9}
        super().log(logs, *arguments, **options)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimiser in one pass over the rows."""
        return math.ceil(len(self.rows) / self.config.batch_size)

    def get_train_dataloader(self) -> DataLoader[Slot]:
        """Return batches of this process; collator and sampler get the epoch when it begins."""
        sampler = EpochBatches(
            self.rows.pictures,
            rough_lengths(self.rows.examples, self.collator.processor),
            self.config.batch_size,
            self.config.seed,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        self.sampler = sampler
        return DataLoader(self.rows, batch_sampler=sampler, collate_fn=self.collator)

    def get_batch_samples(self, epoch_iterator: Iterator[TrainingBatch], *arguments: Any, **options: Any) -> Any:
        """Return the next batch, which a thread prepared during the step before; it prepares the one after it now."""
        self.clock.begin()
        if epoch_iterator is not self._epoch:
            self._read_ahead(epoch_iterator)
        return super().get_batch_samples(self._ahead, *arguments, **options)

    def _read_ahead(self, epoch: Iterator[TrainingBatch] | None) -> None:
        """Begin to prepare the batches of an epoch, and end the thread of the one before."""
        if isinstance(self._ahead, Generator):
            self._ahead.close()
        self._epoch = epoch
        self._ahead = iter(()) if epoch is None else read_ahead(epoch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser, with a learning rate for the head and one for the rest."""
        if self.optimizer is None:
            trained = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for name, p in trained if (_HEAD in name) == head], "lr": rate}
                for head, rate in ((False, self.config.rate), (True, self.config.head_learning_rate))
            ]
            self.optimizer = make_optimizer(
                self.config.optimizer, groups, self.config.weight_decay, self.model.backbone.device
            )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: TrainingBatch, num_items_in_batch: Any = None) -> Tensor:
        """Add the gradient of one step's batch to the parameters and return its loss.

        Raises:
            TrainingError: The loss is not finite; the message names the rows.
            OutOfMemoryError: A single example does not fit; or, with several processes, a micro-batch.
        """
        self.names = inputs["names"]
        self._tokens = sum(len(encoded.ids) for encoded in inputs["encoded"])
        total = self._over_processes(float(inputs["weights"].sum()))
        while True:
            model.train()
            size = min(self.micro_batch_size, len(self.names))
            try:
                loss = self._accumulate(model, inputs, total or 1.0, size)
            except OutOfMemoryError:
                # Processes have to take their passes in step, so that one cannot take more of them on its own.
                if size == 1 or self.args.world_size > 1:
                    raise
            else:
                self.loss = self._over_processes(loss) / self.args.world_size
                self.losses.append(self.loss)
                return torch.tensor(loss, device=self.args.device)
            # Outside of the handler: the error keeps what was computed so far alive.
            model.zero_grad(set_to_none=True)
            release_memory(self.args.device)
            self.micro_batch_size = size // 2

    def _accumulate(self, model: nn.Module, batch: TrainingBatch, total: float, size: int) -> float:
        processor, device, world = self.collator.processor, self.args.device, self.args.world_size
        order = sorted(range(len(self.names)), key=lambda row: len(batch["encoded"][row].ids))
        order.sort(key=lambda row: batch["encoded"][row].pictures.key)
        micro_batches = [order[start : start + size] for start in range(0, len(order), size)]
        loss = 0.0
        for number, rows in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with (
                contextlib.nullcontext() if last else self.accelerator.no_sync(model),
                memory_advice(f"training on {len(rows)} examples"),
            ):
                encoded = [batch["encoded"][row] for row in rows]
                packed, order_of_logits = pack_together(
                    processor, encoded, device, self.hidden_size, self.dtype, with_pixels=self.kept is None
                )
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.bf16):
                    # Of one epoch alone, nothing is needed again.
                    keep = self.config.epochs > 1
                    pictures = None if self.kept is None else self.kept.tokens_of(packed, encoded, keep=keep)
                    logits = model(packed, pictures)
                rows = [rows[number] for number in order_of_logits]
                loss += add_gradients(
                    logits,
                    batch["targets"][rows].to(device),
                    weights=batch["weights"][rows].to(device),
                    # Gradients are averaged over processes; with this the sum over all rows comes out.
                    total=total / world,
                    focal_gamma=self.config.focal_gamma,
                    backward=self.accelerator.backward,
                    rows=self.names,
                )
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        check_gradient_norm(model, float(norm), rows=self.names)
        return norm

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the validation rows; keep the weights where they are the best so far, and stop where none get better.

        Raises:
            TrainingError: The model gives NaN or infinity.
        """
        logits = self.validation_logits()
        if not np.isfinite(logits).all():
            raise TrainingError("the model gives NaN or infinity on the validation rows; lower the learning rate")
        metrics = {
            VALIDATION_LOSS: self.validation.mean_loss(logits),
            VALIDATION_ACCURACY: self.validation.accuracy(logits),
        }
        if self.losses:
            metrics[TRAINING_LOSS] = float(np.mean(self.losses))
            self.losses.clear()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if best_of(self.state)["step"] == self.state.global_step > 0:
            self.save_model(str(Path(self.args.output_dir) / BEST), _internal_call=True)
        if is_exhausted(self.state, self.config.patience):
            # With a checkpoint, so that a run whose result could not be saved does not train again.
            self.control.should_training_stop = self.control.should_save = True
        return metrics

    def validation_logits(self) -> npt.NDArray[np.float32]:
        """Return logits of the validation rows, shape (n, 2), the rows divided among processes."""
        self.model.eval()
        if self.args.world_size > 1:
            return self._validation_logits_together()
        features = features_of(self.validation.examples, self.model, self.kept)
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = (
                self.model.classify(torch.tensor(features).to(self.args.device)).cpu().numpy()
            )
        return logits

    @torch.no_grad()
    def _validation_logits_together(self) -> npt.NDArray[np.float32]:
        """Pass the rows through the model as it is wrapped, all processes in step.

        Where weights are sharded over processes, none of them can pass rows alone.
        """
        world, rank = self.args.world_size, self.args.process_index
        each = math.ceil(len(self.validation) / world)
        numbers = [row % len(self.validation) for row in range(rank * each, (rank + 1) * each)]
        read = None if self.kept is None else self.kept.read
        chunks = (
            prepare(self.collator.processor, [self.validation.examples[row] for row in numbers[start:end]], read=read)
            for start, end in pairwise([*range(0, each, self.micro_batch_size), each])
        )
        parts = []
        for encoded in read_ahead(chunks):
            packed, order = pack_together(
                self.collator.processor,
                encoded,
                self.args.device,
                self.hidden_size,
                self.dtype,
                with_pixels=self.kept is None,
            )
            pictures = None if self.kept is None else self.kept.tokens_of(packed, encoded)
            logits = self.model_wrapped(packed, pictures).float().cpu().numpy()
            parts.append(logits[np.argsort(order)])
        together: npt.NDArray[np.float32] = np.concatenate(gather_object([np.concatenate(parts)]))
        return together[: len(self.validation)]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the weights that train, and nothing else: no pickles, and no copy of what is frozen."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.model.state_dict() if state_dict is None else state_dict
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        with new_file(folder / WEIGHTS) as file:
            save_file({name: weights[name].detach().cpu().contiguous() for name in trained}, file.name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained_weights(model or self.model, Path(resume_from_checkpoint))

    def _over_processes(self, value: float) -> float:
        return float(sum(gather_object([value]))) if self.args.world_size > 1 else value
