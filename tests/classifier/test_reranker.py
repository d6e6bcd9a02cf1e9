"""Qwen3-VL-Reranker and Qwen3-VL-Embedding give what their published code computes, written again here step by step."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen_vl_classifier import Backbone, Classifier, Example, Tap, load_examples
from qwen_vl_classifier.backbone.prompts.thinking import DEFAULT_CHAT_TEMPLATE
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.scenes.statements import write_dataset
from tests import nano

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "reranker.md").read_text(encoding="utf-8")
RERANKER, EMBEDDING = re.findall(r'(?:write_text\(|chat_template=)r"""(.*?)"""', PAGE, re.DOTALL)
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
PIXELS = {"min_pixels": 4096, "max_pixels": 1843200}
FACTOR = 32  # pixels along the side of a token
RED, WIDE, SMALL = (
    Image.new("RGB", (100, 70), "red"),
    Image.linear_gradient("L").resize((230, 60)).convert("RGB"),
    Image.radial_gradient("L").resize((40, 30)).convert("RGB"),
)
ROWS = [
    Example(RED, "a red square"),
    Example(RED, 'a "blue" circle.'),
    Example(WIDE, "from black to white."),
    Example(SMALL, "(tiny)\n"),
    Example((RED, WIDE), "two pictures, in order"),
    Example((WIDE, RED), "two pictures, in order"),
    Example(None, "no document!"),
    Example(RED, "<|image_pad|> is text"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen3_vl", tmp_path_factory.mktemp("reranker") / "nano", tied=True)


@pytest.fixture(scope="module")
def backbone(folder) -> Backbone:
    return load(folder, RERANKER)


def load(folder: Path, template: str) -> Backbone:
    return Backbone.load(folder, device="cpu", dtype="float32", chat_template=template, **PIXELS)


class Published:
    """What the published code does: messages, resizing, one forward pass, two rows of the head."""

    def __init__(self, folder: Path) -> None:
        self.model = nano.reference_class("qwen3_vl").from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pictures = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def score(self, query: list, document: list, *, system: str = SYSTEM, end: str = "") -> float:
        """Score a query and a document, each a list of texts and pictures."""
        content = [f"<Instruct>: {INSTRUCTION}", "<Query>:", *query, "\n<Document>:", *(document or ["NULL"])]
        hidden = self.last_state(system, content, end)
        vocabulary = self.tokenizer.get_vocab()
        yes, no = (self.model.lm_head.weight[vocabulary[word]].detach() for word in ("yes", "no"))
        return float(torch.sigmoid(hidden @ (yes - no)))

    def embedding(self, picture: Image.Image | None, text: str, instruction: str) -> np.ndarray:
        hidden = self.last_state(instruction, [*([] if picture is None else [picture]), text])
        return torch.nn.functional.normalize(hidden, dim=-1).numpy()

    def last_state(self, system: str, content: list, end: str = "") -> torch.Tensor:
        pictures = [resized(part) for part in content if not isinstance(part, str)]
        parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content]
        text = self.tokenizer.apply_chat_template(
            [{"role": "system", "content": [{"type": "text", "text": system}]}, {"role": "user", "content": parts}],
            chat_template=DEFAULT_CHAT_TEMPLATE,  # what Qwen3-VL's own renders of such messages
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = {}
        if pictures:
            inputs = dict(self.pictures(images=pictures, do_resize=False, return_tensors="pt"))
            for grid in inputs["image_grid_thw"].tolist():
                text = text.replace("<|image_pad|>", "<|placeholder|>" * (math.prod(grid) // 4), 1)
        ids = torch.tensor([self.tokenizer(text.replace("<|placeholder|>", "<|image_pad|>") + end)["input_ids"]])
        kinds = (ids == self.model.config.image_token_id).long()
        with torch.inference_mode():
            result = self.model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **inputs
            )
        return result.last_hidden_state[0, -1].clone()


def resized(picture: Image.Image) -> Image.Image:
    """Resize to sides of whole tokens, within the limits."""
    sides = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in picture.size]
    if math.prod(sides) > PIXELS["max_pixels"]:
        by = math.sqrt(math.prod(picture.size) / PIXELS["max_pixels"])
        sides = [max(FACTOR, math.floor(side / by / FACTOR) * FACTOR) for side in picture.size]
    elif math.prod(sides) < PIXELS["min_pixels"]:
        by = math.sqrt(PIXELS["min_pixels"] / math.prod(picture.size))
        sides = [math.ceil(side * by / FACTOR) * FACTOR for side in picture.size]
    return picture.resize((sides[0], sides[1]))


@pytest.fixture(scope="module")
def published(folder) -> Published:
    return Published(folder)


def scores(backbone: Backbone, rows: list[Example]) -> np.ndarray:
    return Classifier.zero_shot(backbone, yes="yes", no="no").predict_proba(rows)[:, 1]


def test_a_text_as_the_query_and_pictures_as_the_document(backbone, published):
    expected = [
        published.score([row.text.replace("<|", "<\u2063|")], list(row.images))
        for row in ROWS[:-1]  # the published code would take the last one for a picture
    ]
    seen = scores(backbone, ROWS)
    np.testing.assert_allclose(seen[:-1], expected, atol=1e-6)
    assert np.ptp(seen) > 0.01
    assert len({round(score, 5) for score in seen}) == len(ROWS)


def test_pictures_as_the_query_and_a_text_as_the_document(folder, published):
    (exchanged,) = re.findall(r"^\.\.\.(<Query>:.*?<\|im_end\|>\n)", PAGE, re.DOTALL | re.MULTILINE)
    start, end = RERANKER[: RERANKER.index("<Query>:")], RERANKER[RERANKER.index("<|im_start|>assistant") :]
    other = load(folder, start + exchanged + end)
    rows = [row for row in ROWS[:-1] if row.images and row.text[0].isalnum()]
    expected = [published.score(list(row.images), [row.text]) for row in rows]
    np.testing.assert_allclose(scores(other, rows), expected, atol=1e-6)
    assert np.abs(scores(load(folder, RERANKER), rows) - expected).max() > 1e-3  # the order counts


def test_two_texts(folder, published):
    start, end = RERANKER[: RERANKER.index("<Query>:")], RERANKER[RERANKER.index("<|im_end|>\n<|im_start|>assistant") :]
    other = load(folder, start + "<Query>:{{ content[-1].text }}" + end)
    expected = published.score(["what is red?"], ["blood is."])
    assert scores(other, [Example(None, "what is red?\n<Document>:blood is.")]) == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize(
    ("was", "instead"),
    [
        ('assistant{{ "\\n" }}', "assistant"),
        ("<Query>:", "<Query>: "),
        (".<Query>:", ".\n<Query>:"),
        ("Judge whether the Document", "Say whether the Document"),
        ("<Document>:", "<Documents>:"),
    ],
    ids=["no last newline", "a blank", "a newline", "another system message", "another word"],
)
def test_almost_the_same_prompt_has_another_score(folder, published, was, instead):
    assert was in RERANKER
    template = RERANKER.replace(was, instead)
    expected = published.score([ROWS[0].text], list(ROWS[0].images))
    assert abs(scores(load(folder, template), ROWS[:1])[0] - expected) > 1e-5


def test_yes_and_no_are_words_in_small_letters(backbone, published):
    expected = published.score([ROWS[0].text], list(ROWS[0].images))
    swapped = Classifier.zero_shot(backbone, yes="no", no="yes").predict_proba(ROWS[:1])[0, 1]
    capital = Classifier.zero_shot(backbone).predict_proba(ROWS[:1])[0, 1]
    assert swapped == pytest.approx(1 - expected, abs=1e-6)
    assert abs(capital - expected) > 1e-4


def test_the_files_beside_a_published_reranker_change_nothing(folder, backbone, tmp_path):
    published = shutil.copytree(folder, tmp_path / "published")
    settings = json.loads((published / "chat_template.json").read_text())
    (published / "chat_template.json").unlink()
    (published / "chat_template.jinja").write_text(settings["chat_template"])
    (published / "additional_chat_templates").mkdir()
    (published / "additional_chat_templates" / "reranker.jinja").write_text("{{ messages[1].role }}")
    (published / "1_LogitScore").mkdir()
    (published / "1_LogitScore" / "config.json").write_text('{"true_token_id": 846, "false_token_id": 556}')
    (published / "modules.json").write_text("[]")
    assert Backbone.load(published, device="cpu").processor.chat_template == settings["chat_template"]
    again = load(published, RERANKER)
    assert again.fingerprint == backbone.fingerprint
    saved = Classifier.zero_shot(again, yes="yes", no="no").save(tmp_path / "saved")
    np.testing.assert_array_equal(
        Classifier.load(saved, device="cpu").predict_proba(ROWS)[:, 1], scores(backbone, ROWS)
    )
    np.testing.assert_array_equal(scores(again, ROWS), scores(backbone, ROWS))


def test_by_command(folder, backbone, tmp_path, monkeypatch):
    """A classifier that was trained keeps the template, and its margins are the score's but for a temperature."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", split="test", name="train", seed=0, scenes=6, per_scene=2)
    Path("reranker.jinja").write_text(RERANKER)
    train = ["train", "data/train.jsonl", "--model", str(folder), "--device", "cpu", "--dtype", "float32"]
    train += ["--chat-template", "reranker.jinja", "--yes", "yes", "--no", "no", "--heads", "zero-shot"]
    train += ["--min-pixels", "4096", "--max-pixels", "1843200", "--taps", "last:-1", "--folds", "2"]
    assert main([*train, "--out", "zero"]) == 0
    Path("reranker.jinja").unlink()
    rows = load_examples("data/train.jsonl")[:4]
    trained = Classifier.load("zero", device="cpu")
    assert trained.temperature != 1
    trained.temperature = 1.0
    np.testing.assert_allclose(trained.predict_proba(rows)[:, 1], scores(backbone, rows), atol=1e-6)


def test_the_embedding_is_the_last_token_after_the_norm(folder, published):
    backbone = load(folder, EMBEDDING)
    rows = [(RED, ""), (None, "a red square"), (WIDE, " black or white? ")]
    features = backbone.encode([Example(*row) for row in rows], [Tap(-1, "last"), Tap(-1, "mean")])
    embeddings = features / np.linalg.norm(features, axis=-1, keepdims=True)
    expected = np.stack([published.embedding(*row, instruction="Represent the user's input.") for row in rows])
    np.testing.assert_allclose(embeddings[:, 0], expected, atol=1e-6)
    assert np.abs(embeddings[:, 1] - expected).max() > 1e-2
