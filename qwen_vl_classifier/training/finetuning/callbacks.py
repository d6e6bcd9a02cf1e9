"""What the loop of fine-tuning does between steps: tells the epoch, shows how far it is, stops when it is asked to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen_vl_classifier.training.finetuning.resuming import close_checkpoint


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Tell the epoch to what depends on it, also after a resumption.

    Args:
        tell: Called with the epoch, from 0, when it begins.
        steps_per_epoch: Steps of the optimiser in one.
    """

    def __init__(self, tell: Callable[[int], None], steps_per_epoch: int) -> None:
        self.tell = tell
        self.steps_per_epoch = steps_per_epoch

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell it."""
        self.tell(state.global_step // self.steps_per_epoch)


class CheckpointMark(TrainerCallback):  # type: ignore[misc]
    """Mark each checkpoint that was written to its end, and remove old ones."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark it."""
        if state.is_world_process_zero:
            close_checkpoint(Path(args.output_dir), state.global_step)


class StopOnRequest(TrainerCallback):  # type: ignore[misc]
    """Save and stop after the step during which somebody asked for it.

    Args:
        asked: Says whether; it must give the same answer in all processes.

    Attributes:
        stopped: Whether it has, which is the same in all processes: the request reaches each at a moment of its own.
    """

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop, if so."""
        if self.asked():
            self.stopped = True
            control.should_save = control.should_training_stop = True


class ProgressLine(TrainerCallback):  # type: ignore[misc]
    """Show loss, validation loss and the time that is left.

    Args:
        loss: Returns the loss of the last step.
        validation: Returns the best validation loss so far.
    """

    def __init__(self, loss: Callable[[], float], validation: Callable[[TrainerState], float]) -> None:
        self.loss = loss
        self.validation = validation
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin where the run is."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="fine-tune", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count one step."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{self.loss():.4f}", validation=f"{self.validation(state):.4f}", refresh=False)
            self.bar.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the line as it is."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def watch_for_sigterm() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM from an end into a request, and give a function that says whether it came.

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
