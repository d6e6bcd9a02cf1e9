"""What happens between the steps of fine-tuning: epochs, progress, checkpoints, and stopping on SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen_vl_classifier.progress_bars import tqdm
from qwen_vl_classifier.training.finetuning.resuming import close_checkpoint


class LoopCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Do between steps what transformers does not: set the epoch, mark checkpoints, stop on request, show progress.

    Args:
        begin_epoch: Called with the number of steps done when an epoch begins, also after a resumption.
        end_step: Called after each step.
        stop_requested: Tells whether to save and stop; it must give the same answer in all processes.
        progress: Returns what the progress line shows, by name; `None` shows no line.

    Attributes:
        stopped: Whether the run was stopped, which is the same in all processes: a request reaches each at a moment
            of its own.
    """

    def __init__(
        self,
        begin_epoch: Callable[[int], None],
        end_step: Callable[[], None],
        stop_requested: Callable[[], bool],
        progress: Callable[[], dict[str, str]] | None,
    ) -> None:
        self.begin_epoch = begin_epoch
        self.end_step = end_step
        self.stop_requested = stop_requested
        self.progress = progress
        self.bar: Any = None
        self.stopped = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show a line that begins where the run is."""
        if self.progress and state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="fine-tune", unit="step")

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the epoch."""
        self.begin_epoch(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the step, and save and stop if that was requested."""
        self.end_step()
        if self.progress and self.bar is not None:
            self.bar.set_postfix(self.progress(), refresh=False)
            self.bar.update()
        if self.stop_requested():
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark a checkpoint that was written to its end, and remove old ones."""
        if state.is_world_process_zero:
            close_checkpoint(Path(args.output_dir), state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the line as it is."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def watch_for_sigterm() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM into a request to stop, and yield a function that tells whether it came.

    Signals reach a program's main thread only; in any other, SIGTERM keeps what it does.
    """
    came = threading.Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        came.set()

    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
