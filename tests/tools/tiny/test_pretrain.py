"""Pre-training in miniature: that it learns, that it goes on where it stopped, what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.errors import ConfigError
from tools.tiny import pretrain as module
from tools.tiny.lesson_batches import LessonBatches, Recipe
from tools.tiny.pretrain import (
    answer,
    copy_checkpoint,
    initialise,
    look,
    pretrain,
)
from tools.tiny.reading_heads import PatchReader

RECIPE = Recipe(batch_size=3, questions=3, warmup_steps=2, looking=0.4)


@pytest.fixture
def fresh(tmp_path):
    initialise(tmp_path, seed=0)
    return Backbone.load(tmp_path, device="cpu", dtype="float32")


@pytest.mark.soak
def test_loss_falls(fresh):
    model = fresh.model.requires_grad_(True)
    batch = LessonBatches(fresh.processor, RECIPE, 0).make(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(8):
        loss = answer(model, batch).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.8 * seen[0]


@pytest.mark.soak
def test_reading_patches_is_learned_by_the_vision_tower(fresh):
    model = fresh.model.requires_grad_(True)
    reader = PatchReader(fresh.hidden_size, fresh.processor.merge_size)
    batch = LessonBatches(fresh.processor, replace(RECIPE, questions=0), 0).make(0)
    optimizer = torch.optim.AdamW(nn.ModuleList([model.visual, reader]).parameters(), lr=2e-3)
    seen = []
    for _ in range(15):
        loss, right = reader(look(model, batch), batch.labels, batch.places)
        assert 0 <= right <= 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.7 * seen[0]
    assert all(parameter.grad is None for parameter in model.language_model.parameters())


def test_image_tokens_are_the_same_alone_and_in_the_whole_model(fresh):
    batch = LessonBatches(fresh.processor, RECIPE, 0).make(6)
    with torch.no_grad():
        torch.testing.assert_close(answer(fresh.model, batch).image_tokens, look(fresh.model, batch))


@pytest.fixture
def ticking(monkeypatch):
    """Let a second pass between any two looks at the clock."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(module, "_LOG_EVERY", 2)


@pytest.mark.soak
def test_a_run_begins_from_weights_that_are_given(tmp_path, ticking):
    given, out = tmp_path / "given", tmp_path / "out"
    initialise(given, seed=7)
    # The rate is so low that what is written is still what was given.
    recipe = replace(RECIPE, learning_rate=1e-12)
    pretrain(out, minutes=5 / 60, recipe=recipe, weights=given, device="cpu")
    before = Backbone.load(given, device="cpu").model.state_dict()
    after = Backbone.load(out, device="cpu").model.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    # Nothing of the start of a run from random weights: no looking alone, no easy relations.
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert "caption" in log[0]
    card = (out / "README.md").read_text()
    assert "trained from weights that were given" in card
    assert "looking 0.0, easy_steps 0" in card
    pretrain(out, minutes=9 / 60, recipe=recipe, device="cpu", resume=True)
    assert "trained from weights that were given" in (out / "README.md").read_text()


def test_weights_have_to_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json; give the folder"):
        copy_checkpoint(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ConfigError, match="both weights and resume"):
        pretrain(tmp_path, minutes=1, recipe=RECIPE, weights=tmp_path, resume=True)


def test_new_heads_do_not_disturb_given_weights(tmp_path):
    initialise(tmp_path, seed=0)
    backbone = Backbone.load(tmp_path, device="cpu", dtype="float32")
    # Only what the heads say counts, so that without them nothing reaches the network.
    recipe = replace(RECIPE, question_weight=0.0, caption_weight=0.0)
    run = module._Run(tmp_path, backbone, recipe, seconds=60, given=True)
    batch = LessonBatches(backbone.processor, recipe, 0).make(0)

    def reached() -> float:
        run.model.zero_grad()
        run._loss(batch, module._Meters(), looking=False).backward()
        return max(float(parameter.grad.abs().max()) for parameter in run.model.parameters())

    assert reached() == 0
    run.step = recipe.warmup_steps
    assert reached() > 0


@pytest.mark.soak
def test_a_run_writes_a_checkpoint_and_can_be_resumed(tmp_path, ticking):
    pretrain(tmp_path, minutes=5 / 60, recipe=RECIPE, device="cpu")
    state = torch.load(tmp_path / "training_state.pth", weights_only=True)
    first = state["step"]
    assert first > 0
    assert Backbone.load(tmp_path, device="cpu").hidden_size == 128
    card = (tmp_path / "README.md").read_text()
    assert "synthetic scenes" in card
    assert f"{state['lessons']:,} examples" in card
    pretrain(tmp_path, minutes=9 / 60, recipe=RECIPE, device="cpu", resume=True)
    assert torch.load(tmp_path / "training_state.pth", weights_only=True)["step"] > first
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == sorted(entry["step"] for entry in log)
    assert all("patches" in entry for entry in log)
    assert {"caption", "phrases"} <= set(log[-1])
