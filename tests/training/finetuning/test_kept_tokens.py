"""What a frozen vision tower makes of a picture is made once, and training is the same to the last bit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Example, Tap, finetune
from qwen_vl_classifier.backbone.encoder import pooled_states
from qwen_vl_classifier.backbone.packing import pack_together
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.backbone.windows import prepare
from qwen_vl_classifier.images.identity import stamp_of
from qwen_vl_classifier.training.finetuning import kept_tokens
from qwen_vl_classifier.training.finetuning.kept_tokens import KeptTokens
from qwen_vl_classifier.training.finetuning.step import PackedClassifier
from qwen_vl_classifier.training.finetuning.trainer import FinetuneTrainer
from tests import nano
from tests.tuning import LORA, ROWS, VALIDATION, assert_same, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = replace(LORA, towers="llm", adapter_dropout=0.1, epochs=2, patience=0, save_steps=1)


def files(rows: list[Example], folder: Path) -> list[Example]:
    """Return the rows with their pictures as files, of several sizes; rows 0 and 1 are about the same one."""
    folder.mkdir()
    for number, row in enumerate(rows):
        row.image.resize((56, 56 + 28 * (number % 3))).save(folder / f"{number}.png")
    return [
        replace(row, image=str(folder / f"{number if number > 1 else 0}.png"), text=row.text * (1 + number % 2))
        for number, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[list[Example], list[Example]]:
    folder = tmp_path_factory.mktemp("rows")
    return files(ROWS, folder / "training"), files(VALIDATION, folder / "validation")


@pytest.fixture(scope="module")
def whole(start, rows):
    """A run that keeps all of them in memory."""
    return finetune(start, *rows, config=CONFIG, progress=False)


class Counts:
    """How many pictures the vision tower read, and how many examples were opened, while the loop ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.towers, self.opened, self.running = 0, 0, False
        run, make, read = FinetuneTrainer.run, kept_tokens.picture_tokens, Processor.read_pictures

        def counted_run(trainer, *arguments, **options):
            self.running = True
            try:
                return run(trainer, *arguments, **options)
            finally:
                self.running = False

        def counted_make(model, patches, grids):
            self.towers += len(grids) * self.running
            return make(model, patches, grids)

        def counted_read(processor, example, **options):
            self.opened += self.running
            return read(processor, example, **options)

        monkeypatch.setattr(FinetuneTrainer, "run", counted_run)
        monkeypatch.setattr(kept_tokens, "picture_tokens", counted_make)
        monkeypatch.setattr(Processor, "read_pictures", counted_read)


def in_memory(patch: pytest.MonkeyPatch, share: float) -> None:
    patch.setattr(kept_tokens, "free_memory", lambda _: share)


def test_each_picture_is_opened_and_read_once(start, rows, whole, monkeypatch):
    counts = Counts(monkeypatch)
    result = finetune(start, *rows, config=CONFIG, progress=False)
    assert counts.towers == 15 + 11  # the first two rows of each are about one picture
    assert counts.opened <= counts.towers + len(rows[0])  # what was opened ahead of the pass that kept it
    assert result.history == whole.history
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))
    assert result.throughput is not None
    assert result.throughput.vision_tokens.startswith("vision tokens of 26 pictures kept: 0.00 GB in memory")


@pytest.mark.parametrize("most", [0.0, 50.0], ids=["nothing", "on disk"])
def test_what_is_kept_where_changes_nothing(start, rows, whole, monkeypatch, tmp_path, most):
    """On CPUs to the last bit; where memory has no room, some lie in the run's folder, which is empty in the end."""
    in_memory(monkeypatch, 4 * 4000)
    counts = Counts(monkeypatch)
    config = replace(CONFIG, keep_vision_tokens=most)
    result = finetune(start, *rows, config=config, run=tmp_path / "run", progress=False)
    # Rows about one picture come in different batches now and then.
    assert counts.towers >= 15 * 2 + 11 * 3 if most == 0 else counts.towers == 26
    assert result.history == whole.history
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))
    assert not (tmp_path / "run" / "vision-tokens").exists()


def test_the_tower_in_each_pass_gives_the_same_to_rounding(start, rows, whole, monkeypatch):
    monkeypatch.setattr(KeptTokens, "of_run", lambda *_, **__: None)
    result = finetune(start, *rows, config=CONFIG, progress=False)
    for one, other in zip(result.history[1:], whole.history[1:], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_resumed_run_reads_them_from_disk(start, rows, whole, monkeypatch, tmp_path):
    in_memory(monkeypatch, 0)
    inner = FinetuneTrainer.training_step

    def failing(trainer, *arguments):
        if trainer.state.global_step == 2:
            raise RuntimeError("the dog")
        return inner(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", failing)
        with pytest.raises(RuntimeError, match="the dog"):
            finetune(start, *rows, config=CONFIG, run=tmp_path / "run", progress=False)
    kept = [*(tmp_path / "run" / "vision-tokens").glob("*.safetensors")]
    assert len(kept) == 26
    content = kept[0].read_bytes()
    kept[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    counts = Counts(monkeypatch)
    result = finetune(start, *rows, config=CONFIG, run=tmp_path / "run", resume=True, progress=False)
    assert counts.towers == 1  # the damaged one
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))


def test_a_file_that_changes_during_the_run_is_read_again(start, rows, monkeypatch, tmp_path):
    changing = files(ROWS, tmp_path / "rows")
    inner = FinetuneTrainer.training_step

    def replacing(trainer, *arguments):
        if trainer.state.global_step == 1:  # pictures of the second epoch are not read ahead yet
            before = stamp_of(changing[5].image)
            Image.new("RGB", (84, 56), "red").save(changing[5].image)
            assert stamp_of(changing[5].image) != before
        return inner(trainer, *arguments)

    monkeypatch.setattr(FinetuneTrainer, "training_step", replacing)
    counts = Counts(monkeypatch)
    finetune(start, changing, rows[1], config=CONFIG, progress=False)
    assert counts.towers == 15 + 11 + 1


def test_lack_of_memory_takes_smaller_pieces_of_what_is_kept(start, rows, monkeypatch):
    forward, tried = PackedClassifier.forward, []

    def limited(self, batch, pictures=None):
        logits = forward(self, batch, pictures)
        if self.training:
            assert pictures is not None
            tried.append(len(logits))
            if len(logits) > 4:
                logits.register_hook(lambda _: torch.empty(2**60))
        return logits

    monkeypatch.setattr(PackedClassifier, "forward", limited)
    counts = Counts(monkeypatch)
    finetune(start, *rows, config=CONFIG, progress=False)
    assert tried == [8] + [4] * 8
    assert counts.towers == 26


@pytest.mark.parametrize("change", [{"towers": "llm+vision"}, {"augment": "light"}], ids=["tower", "augment"])
def test_nothing_is_kept_where_tokens_change(start, rows, monkeypatch, change):
    counts = Counts(monkeypatch)
    config = replace(CONFIG, epochs=1, keep_vision_tokens=7.0, **change)
    result = finetune(start, *rows, config=config, progress=False)
    assert result.throughput is not None
    assert any(note.startswith("keep_vision_tokens=7.0 has no effect with ") for note in result.notes)
    assert result.throughput.vision_tokens == ""
    assert counts.towers == 0


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_kept_tokens_give_the_same_features(rows, family, tmp_path):
    """Several pictures in one example, a picture twice, and levels of the tower that the decoder adds later."""
    backbone = Backbone.load(nano.make_checkpoint(family, tmp_path / "nano"), device="cpu", dtype="float32")
    images = [row.image for row in rows[0]]
    examples = [Example([images[2], images[3]], "both"), Example(images[3], "one"), Example((), "none")]
    examples.append(replace(examples[1], text="another text"))
    taps = [Tap(1, "mean"), Tap(-1, "image")]

    def features(kept: KeptTokens | None) -> torch.Tensor:
        encoded = prepare(backbone.processor, examples, read=kept and kept.read)
        packed, _ = pack_together(
            backbone.processor, encoded, backbone.device, backbone.hidden_size, with_pixels=kept is None
        )
        pictures = kept.tokens_of(packed, encoded) if kept else None
        return pooled_states(backbone.model, packed, taps, pictures)

    def keeper(fingerprint: str, **room: int) -> KeptTokens:
        return KeptTokens(backbone, fingerprint, tmp_path / "kept", **{"memory": 0, "disk": 0, **room})

    wanted = features(None)
    memory, disk = keeper("one", memory=1 << 20), keeper("one", disk=1 << 20)
    first = features(memory)
    torch.testing.assert_close(first, wanted, rtol=1e-5, atol=1e-6)
    for kept in (memory, disk, disk, keeper("one")):  # the last one finds what the others wrote
        assert torch.equal(features(kept), first)
    assert (memory.made, disk.made, disk.pictures) == (2, 2, 2)
    levels = 0 if family == "qwen2_5_vl" else len(backbone.model.visual.deepstack_visual_indexes)
    tokens = sum(math.prod(grid) // 4 for grid in prepare(backbone.processor, examples)[0].pictures.grids)
    assert disk.on_disk == memory.in_memory == tokens * (1 + levels) * backbone.hidden_size * 4
    with torch.no_grad():
        next(backbone.model.visual.parameters()).mul_(1.5)
    other = keeper("two")
    assert not torch.equal(features(other), first)
    assert other.made == 2
