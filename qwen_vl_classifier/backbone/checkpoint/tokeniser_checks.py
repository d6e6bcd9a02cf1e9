"""Check the files of a checkpoint's tokeniser before it is built, so that no text takes minutes to tokenise.

Only parts whose cost is proportional to the text are let in. Regular expressions can take exponential time, rules that
replace text can multiply it, and very many or very long added tokens take minutes to build.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_classifier.backbone.checkpoint.stored import is_there, read_json
from qwen_vl_classifier.errors import CheckpointError, one_line

_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Sequence")
_PRE_TOKENIZERS = (
    "ByteLevel",
    "Split",
    "Digits",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
    "CharDelimiterSplit",
    "Metaspace",
    "Sequence",
)
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_EXPRESSIONS = (
    # Qwen2 and Qwen3, then Qwen3.5
    _WORD + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    _WORD + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_OTHER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MOST_TOKENS = 8192  # that are added to a vocabulary
_TEXTS_OF_A_TOKEN = 4  # the names of its settings are not counted
_LONGEST_TOKEN = 512  # characters
_TEMPLATES = ("chat_template", "response_schema")


def check_tokeniser(folder: Path, name: str) -> None:
    """Check the files of a tokeniser.

    Raises:
        CheckpointError: They cannot be read, or ask for something that could take very long.
    """
    if is_there(folder / "tokenizer.json"):
        content = read_json(folder / "tokenizer.json", name)
        _check_parts(content, name)
        _check_size(content.get("added_tokens"), "tokenizer.json", name)
    for file in _OTHER_SETTINGS:
        if is_there(folder / file):
            settings = read_json(folder / file, name)
            _check_size({key: value for key, value in settings.items() if key not in _TEMPLATES}, file, name)


def _check_parts(content: Mapping[str, Any], name: str) -> None:
    """Check the kinds of normaliser and pre-tokeniser, and every regular expression."""
    model = content.get("model")
    if isinstance(model, Mapping) and model.get("type", "BPE") != "BPE":
        raise _unusable("a model", model["type"], "BPE", name)
    for key, kinds in (("normalizer", _NORMALIZERS), ("pre_tokenizer", _PRE_TOKENIZERS)):
        for part in _objects(content.get(key)):
            if "type" in part and part["type"] not in kinds:
                raise _unusable(f"a {key}", part["type"], f"one of {', '.join(kinds)}", name)
    for key in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        for part in _objects(content.get(key)):
            if "Regex" in part and part["Regex"] not in _EXPRESSIONS:
                raise _unusable("a regular expression", part["Regex"], "that of Qwen's tokenisers", name)
        _check_size(content.get(key), "tokenizer.json", name)


def _check_size(value: Any, file: str, name: str) -> None:
    """Check that there are not very many tokens, and none that is very long."""
    tokens = 0
    for part in _parts(value):
        tokens += isinstance(part, (str, Mapping))
        if isinstance(part, str) and len(part) > _LONGEST_TOKEN:
            raise _unusable("a token", part, f"at most {_LONGEST_TOKEN} characters", name, file)
    if tokens > _TEXTS_OF_A_TOKEN * _MOST_TOKENS:
        raise _unusable("tokens or settings", f"{tokens:,}", f"at most {_MOST_TOKENS:,}", name, file)


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    return (part for part in _parts(value) if isinstance(part, Mapping))


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value and all values in it; JSON that was read here is not deep."""
    yield value
    if isinstance(value, (Mapping, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _parts(inner)


def _unusable(what: str, seen: object, expected: str, name: str, file: str = "tokenizer.json") -> CheckpointError:
    return CheckpointError(
        f"{name}: its {file} has {what} {one_line(seen, 80)!r}, expected {expected}; "
        "give the tokeniser files of its base model"
    )
