"""Pre-training in miniature: what is predicted, that it learns, that it goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone.tiny import pretrain as module
from qwen_vl_classifier.backbone.tiny.pretrain import Recipe, SceneBatches, initialise, losses, pretrain
from qwen_vl_classifier.data.scenes import UNSEEN_PAIRS

RECIPE = Recipe(batch_size=3, questions=3, warmup_steps=2)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    initialise(folder, seed=0)
    return Backbone.load(folder, device="cpu", dtype="float32")


def test_targets_follow_the_prompts(fresh):
    tokenizer = fresh.processor.tokenizer
    batch = SceneBatches(fresh.processor, RECIPE, 0).make(0)
    before = batch.packed.input_ids[batch.rows, batch.columns].tolist()
    answers = [token for token, kind in zip(batch.targets.tolist(), batch.kinds.tolist(), strict=True) if kind >= 0]
    assert set(tokenizer.convert_ids_to_tokens(answers)) <= {"Yes", "No"}
    assert len(answers) == RECIPE.batch_size * RECIPE.questions
    end_of_prompt = tokenizer("assistant\n")["input_ids"][-1]
    asked = [token for token, kind in zip(before, batch.kinds.tolist(), strict=True) if kind >= 0]
    assert set(asked) == {end_of_prompt}
    caption = [token for token, kind in zip(batch.targets.tolist(), batch.kinds.tolist(), strict=True) if kind < 0]
    assert caption.count(tokenizer.eos_token_id) == RECIPE.batch_size
    assert not any(f"{colour} {shape}" in tokenizer.decode(caption) for colour, shape in UNSEEN_PAIRS)


def test_batches_are_the_same_every_time_and_differ_from_each_other(fresh):
    batches = SceneBatches(fresh.processor, RECIPE, 0)
    first, again, second = batches.make(5), batches.make(5), batches.make(6)
    assert torch.equal(first.packed.input_ids, again.packed.input_ids)
    assert torch.equal(first.packed.pixel_values, again.packed.pixel_values)
    assert first.packed.pixel_values.shape != second.packed.pixel_values.shape or not torch.equal(
        first.packed.pixel_values, second.packed.pixel_values
    )


def test_loss_falls(fresh):
    model = fresh.model.requires_grad_(True)
    batch = SceneBatches(fresh.processor, RECIPE, 0).make(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(8):
        loss = losses(model, batch)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.8 * seen[0]


def test_a_run_writes_a_checkpoint_and_can_be_resumed(tmp_path, monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(module, "_LOG_EVERY", 2)
    pretrain(tmp_path, minutes=3 / 60, recipe=RECIPE, device="cpu")
    state = torch.load(tmp_path / "training_state.pth", weights_only=True)
    first = state["step"]
    assert first > 0
    assert Backbone.load(tmp_path, device="cpu").hidden_size == 128
    assert "synthetic scenes" in (tmp_path / "README.md").read_text()
    pretrain(tmp_path, minutes=6 / 60, recipe=RECIPE, device="cpu", resume=True)
    assert torch.load(tmp_path / "training_state.pth", weights_only=True)["step"] > first
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == sorted(entry["step"] for entry in log)
    assert "existence" in log[-1] or "caption" in log[-1]
