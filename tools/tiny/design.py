"""Shape and tokeniser of the built-in backbone, written in the hub's own layout.

Everything follows the published Qwen2.5-VL checkpoints (flat `config.json`, `preprocessor_config.json`, byte-level
BPE with the same splitting rule and special tokens); only the numbers are small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_vl_classifier.backbone.prompts.thinking import DEFAULT_CHAT_TEMPLATE
from qwen_vl_classifier.scenes.statements import vocabulary

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

DESIGN_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
"""What `write_design` writes."""

HIDDEN_SIZE = 128
NUM_LAYERS = 6
MAX_PIXELS = 448 * 448
MIN_PIXELS = 84 * 140  # the smallest picture of pre-training: smaller ones are enlarged to what it knows

# The splitting rule of Qwen's tokenisers.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Words beside those of the scenes that become single tokens, so that other people's texts stay short.
_WORDS = """
a about above after all also an and any are area around as at attach attached away back bad base be because before
behind bellow below beneath beside between big bigger black block blocks blurred border both bottom box boxes bright
broken brown but by can center chest child clean clear close closed closely color colors colour colours contain
containing contains corner corners correct count crack damage damaged dark defect describe different directly dirty
disease do does door down each edge edges eight either else empty equal every exactly exist false far few fewer fifth
first five food for found four fourth from front full gray green grey group half has have having healthy height here
high how identical if image in including inside into is it item items its just kind kinds label large larger largest
last leaf least left less light line list long lot low made many match matches medium middle missing more most
multiple near nearest nearly neighbor neither new next nine no none normal not number object objects odd of off old on
one only open or orange order other out outside over own package pair part people person photo picture piece pink
place plant point position positions post product products question rectangle red rest right roof round row rule same
scene second see seven severe shape shaped shapes short shorter show shown shows side sides sign similar single six
size sizes small smaller smallest some something square stack stacked stands statement tall taller tallest ten text
than that the their them then there these they thing things third this those three to together top touch touches
touching tower towers true turned two type under up upper use very view visible wall walls was what when where whether
which while white who whole wide with without word work wrong yellow yes you your zero All Answer Are At Does Each
Every Exactly False First Four Here How Image In It List No None One Only Question Second Some That These They Third
This Three True Two What Where Which Yes
"""


def write_design(folder: Path) -> None:
    """Write configuration, picture settings and tokeniser of the built-in backbone, all but its weights.

    Args:
        folder: Where to write; made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    _write(folder / "config.json", _config(tokenizer.get_vocab_size(), special))
    _write(folder / "preprocessor_config.json", _preprocessor_config())
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "chat_template": DEFAULT_CHAT_TEMPLATE,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "bos_token": None,
            "add_bos_token": False,
            "add_prefix_space": False,
            "errors": "replace",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
        },
    )


def words() -> list[str]:
    """Return every word that is one token, at the start of a text and after a space."""
    return sorted({*_WORDS.split(), *vocabulary()})


def _train_tokenizer() -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    known = words()
    # Each word often enough, and in both positions, that training merges it whole.
    corpus = [text for word in known for text in (word, f" {word}")] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _config(vocab_size: int, special: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "vision_token_id": special["<|vision_pad|>"],
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": 32768,
        "max_window_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vision_config": {
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": HIDDEN_SIZE,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        "vocab_size": vocab_size,
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
