"""Read single rows of a checkpoint's language head, which is never loaded whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwen_vl_classifier.backbone.checkpoint.weight_files import read_headers, read_tensors
from qwen_vl_classifier.backbone.checkpoint.weight_names import HEAD
from qwen_vl_classifier.errors import CheckpointError, ConfigError


def word_tokens(tokenizer: Any, words: Sequence[str], name: str) -> list[int]:
    """Return the ids of words that are one token each.

    Args:
        tokenizer: A transformers tokenizer.
        words: The words.
        name: The checkpoint's name, for messages.

    Raises:
        ConfigError: A word is not one token.
    """
    tokens = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ConfigError(f"{word!r} is {len(ids)} tokens of {name}; give a word that is one token")
        tokens += ids
    return tokens


def head_rows(folder: Path, tokens: Sequence[int], name: str, *, tied: Tensor | None) -> Tensor:
    """Read rows of the language head from the files, else from the embeddings that it is tied to.

    Args:
        folder: The folder of the checkpoint.
        tokens: Token ids of the rows.
        name: Its name, for messages.
        tied: The embeddings, shape (vocabulary, hidden), if the configuration ties the head to them. A head in the
            files has priority: training may have changed only one of the two.

    Returns:
        float32, shape (tokens, hidden).

    Raises:
        CheckpointError: There is no language head, or it has no such row.
    """
    head = read_headers(folder, name).of_model.get(HEAD)
    if head is None and tied is None:
        raise CheckpointError(
            f"{name}: no {HEAD} among its weights, so it cannot answer zero-shot; train a classifier on it instead"
        )
    if head is None:
        assert tied is not None
        return tied[list(tokens)].detach().cpu().float()
    if len(head.shape) != 2 or max(tokens) >= head.shape[0]:
        raise CheckpointError(
            f"{name}: {head.name} in {head.path.name} has shape {list(head.shape)}, expected a row {max(tokens)}; "
            "give the tokeniser that was saved with these weights"
        )
    with safe_open(head.path, framework="pt") as file:
        rows = file.get_slice(head.name)
        return torch.stack([rows[token : token + 1][0] for token in tokens]).float()


def is_untied(folder: Path, name: str, tied: Tensor | None) -> bool:
    """Tell whether the files hold a language head that differs from the embeddings it should be tied to.

    Args:
        folder: The folder of the checkpoint.
        name: Its name, for messages.
        tied: The embeddings, shape (vocabulary, hidden), if the configuration ties the head to them.
    """
    head = None if tied is None else read_headers(folder, name).of_model.get(HEAD)
    if tied is None or head is None:
        return False
    stored = read_tensors({HEAD: head}, name)[HEAD]
    return stored.shape != tied.shape or not torch.equal(stored.to(tied.dtype), tied.detach().cpu())
