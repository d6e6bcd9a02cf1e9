"""Example -> token ids, resized pictures, grids and token types.

The prompt is the checkpoint's own chat template over one user message: pictures first, then the text, with the
generation prompt added (`prompt.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from qwen_vl_classifier.backbone.pixels import CHANNELS, PatchMaker, Pictures, Pixels
from qwen_vl_classifier.backbone.prompts.prompt import TEXT_MARK, Prompt
from qwen_vl_classifier.backbone.prompts.text_tokens import TextTokens
from qwen_vl_classifier.backbone.prompts.thinking import (
    DEFAULT_CHAT_TEMPLATE,
    RenderingError,
    render_prompt,
    with_thinking_closed,
)
from qwen_vl_classifier.backbone.taps import Spans
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import BatchError, CheckpointError, TextError
from qwen_vl_classifier.images.identity import remember, stamp_of
from qwen_vl_classifier.images.opening import open_image

Observer: TypeAlias = Callable[[bytes, Image.Image], None]
"""Called with the stamp of a source and the picture that was opened from it, in the thread that opened it, several at a
time; it must not change the picture."""

PICTURE_SETTINGS = (
    "do_convert_rgb",
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
)


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """The model inputs of one example.

    Attributes:
        ids: Token ids, every picture expanded to its number of tokens.
        prefix_length: Tokens that all pictures are among: up to the text; all of them where the text comes first.
        spans: Positions of pictures and text in `ids`.
        pictures: Its pictures, resized.
        shares_prefix: Whether examples with other texts about the same pictures have the same prefix.
        prefix_key: Tells prefixes of the same pictures apart where they differ by more.
    """

    ids: list[int]
    prefix_length: int
    spans: Spans
    pictures: Pictures
    shares_prefix: bool = True
    prefix_key: bytes = b""

    @property
    def key(self) -> bytes:
        """Digest of tokens and pictures."""
        return hashlib.blake2b(np.asarray(self.ids).tobytes(), digest_size=32, key=self.pictures.key).digest()


class Processor:
    """Turn examples into model inputs for one checkpoint.

    Args:
        tokenizer: A transformers tokenizer with Qwen's special tokens.
        image_processor: A transformers image processor of the Qwen2-VL kind (PIL backend).
        chat_template: The checkpoint's template, or `None` for a Qwen default. If its generation prompt leaves a
            thinking block open, the block is closed (`with_thinking_closed`).
        image_token_id: The id of one merged picture patch.
        video_token_id: Its counterpart for videos, which are refused.
        brings_template: Whether the template is the checkpoint's own.
        positions: Number of positions that the model supports; `None` sets no limit.
        max_text_tokens: Most tokens of a text; `None` means `positions`.
        vocab_size: Number of tokens that the model has embeddings for; `None` for as many as the tokenizer has.

    Attributes:
        patches: Makes the patches that the model reads of resized pictures.
        brings_template: Whether the template is the checkpoint's own, not the default or one given by the user.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        *,
        chat_template: str | None,
        image_token_id: int,
        video_token_id: int,
        brings_template: bool = True,
        positions: int | None = None,
        max_text_tokens: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.patches = PatchMaker(image_processor)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self._vocab_size = vocab_size
        self.pad_token_id = tokenizer.pad_token_id or 0
        if vocab_size is not None and self.pad_token_id >= vocab_size:  # any other token pads as well
            self.pad_token_id = 0
        self.brings_template = brings_template and bool(chat_template)
        self._positions = positions
        self._texts = TextTokens(tokenizer, positions if max_text_tokens is None else max_text_tokens)
        template = with_thinking_closed(tokenizer, chat_template or DEFAULT_CHAT_TEMPLATE)
        self._prompt = Prompt(tokenizer, template, self._texts, image_token_id)

    @property
    def chat_template(self) -> str:
        """The template in use."""
        return self._prompt.template

    @property
    def max_text_tokens(self) -> int | None:
        """Most tokens of a text; `None` for no limit."""
        return self._texts.most

    @property
    def merge_size(self) -> int:
        """Side of the square of patches that becomes one token."""
        return self.patches.merge_size

    @property
    def token_side(self) -> int:
        """Side of the square of pixels that becomes one token."""
        return self.patches.patch_size * self.patches.merge_size

    @property
    def pixel_limits(self) -> tuple[int, int]:
        """Fewest and most pixels of a picture after resizing."""
        size = self.image_processor.size
        return int(size["shortest_edge"]), int(size["longest_edge"])

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Build one right-padded batch, exactly what transformers' own forward takes.

        Args:
            examples: At least one example.

        Returns:
            `input_ids`, `attention_mask` and `mm_token_type_ids`, each int64 of shape (examples, tokens); and, where
            there are pictures, `pixel_values` (float32, the patches of all pictures one after the other) and
            `image_grid_thw` (int64, shape (pictures, 3)).

        Raises:
            BatchError: No examples.
            ImageError: A picture cannot be opened.
        """
        if not examples:
            raise BatchError("a batch of no examples: pass at least one")
        encoded = [self.encode(example) for example in examples]
        length = max(len(item.ids) for item in encoded)
        input_ids = torch.full((len(encoded), length), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(len(encoded), length, dtype=torch.long)
        for row, item in enumerate(encoded):
            input_ids[row, : len(item.ids)] = torch.tensor(item.ids)
            attention_mask[row, : len(item.ids)] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": self.token_types(input_ids, attention_mask),
        }
        grids = [grid for item in encoded for grid in item.pictures.grids]
        if grids:
            pixels = [picture for item in encoded for picture in item.pictures.pixels]
            batch["pixel_values"] = self.patches(list(map(torch.from_numpy, pixels)), torch.float32)
            batch["image_grid_thw"] = torch.tensor(grids)
        return batch

    def encode(self, example: Example, pictures: Pictures | None = None) -> EncodedExample:
        """Tokenise one example.

        Args:
            example: What to encode.
            pictures: Its pictures as `read_pictures` returned them, to read them once for several texts.

        Raises:
            ImageError: A picture cannot be opened.
            TextError: The text is too long.
        """
        if pictures is None:
            pictures = self.read_pictures(example)
        tokens, text = self._prompt.tokens(example.text, len(pictures.grids))
        self._check_text(tokens[slice(*text)])
        ids, places, images = self._expanded(tokens, pictures)
        start, end = (places[place] for place in text)
        return EncodedExample(
            ids=ids,
            prefix_length=len(ids) if self._prompt.text_first else start,
            spans=Spans(tokens=((0, len(ids)),), image=images, text=(start, end)),
            pictures=pictures,
            shares_prefix=not self._prompt.text_first,
        )

    def encode_interleaved(self, pieces: Sequence[str | None], pictures: Pictures) -> EncodedExample:
        """Tokenise one example whose pictures are within its text; it shares its prefix with no other example.

        Args:
            pieces: Texts in their order, with `None` in the place of each picture.
            pictures: The pictures, in their order.

        Raises:
            TextError: The text is too long.
            CheckpointError: The chat template does not let pictures stand there.
        """
        tokens = self._prompt.interleaved(pieces)
        texts = list(tokens)
        for _ in pictures.grids:
            texts.remove(self.image_token_id)
        self._check_text(texts)
        ids, _, images = self._expanded(tokens, pictures)
        whole = 0, len(ids)
        spans = Spans(tokens=(whole,), image=images, text=whole)
        return EncodedExample(ids, len(ids), spans, pictures, shares_prefix=False)

    @cached_property
    def interleaves(self) -> bool:
        """Whether the chat template allows pictures within a text."""
        try:
            self._prompt.interleaved(["a", None, "b"])
        except CheckpointError:
            return False
        return True

    def _expanded(
        self, tokens: Sequence[int], pictures: Pictures
    ) -> tuple[list[int], list[int], tuple[tuple[int, int], ...]]:
        """Repeat the token of each picture as often as the model reads it.

        Returns:
            Token ids; for each of `tokens`, and for their end, its place among them; and the ranges of pictures.
        """
        ids: list[int] = []
        places = []
        images = []
        remaining = iter(pictures.grids)
        for token in tokens:
            places.append(len(ids))
            if token == self.image_token_id:
                count = math.prod(next(remaining)) // self.merge_size**2
                images.append((len(ids), len(ids) + count))
                ids += [token] * count
            else:
                ids.append(token)
        self._check_vocabulary(ids)
        self._check_positions(ids, pictures)
        return ids, [*places, len(ids)], tuple(images)

    def read_pictures(self, example: Example, *, observe: Observer | None = None, identify: bool = True) -> Pictures:
        """Open the pictures of an example, and resize them.

        Args:
            example: The example.
            observe: Called with every picture that was opened.
            identify: Whether to remember what each picture is (`images/identity.py`), which takes longer than decoding
                a JPEG. Pass false where nobody compares pictures.

        Raises:
            ImageError: A picture cannot be opened.
        """
        pixels = []
        for source in example.images:
            stamp = stamp_of(source)
            image = open_image(source)
            if identify:
                remember(stamp, source, image)
            if observe is not None:
                observe(stamp, image)
            pixels.append(self._resized(image))  # one at a time: at full size a picture may take 100 MB
        return self.take_pictures(pixels)

    def resize_pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Resize the pictures of one example, as the image processor would.

        Args:
            images: As `open_image` returns them, upright and of mode RGB.
        """
        return self.take_pictures([self._resized(image) for image in images])

    def _resized(self, image: Image.Image) -> Pixels:
        """Resize a picture, without the four copies at full size that the image processor makes."""
        resized = image.resize(self._size_of(image.width, image.height), self.image_processor.resample)
        return np.array(resized)  # a copy that torch may write to

    def take_pictures(self, pixels: Sequence[Pixels]) -> Pictures:
        """Take pictures that have their size already, both sides multiples of `token_side`; they are not copied."""
        return Pictures.of(pixels, self.patches.patch_size)

    def join_pictures(self, parts: Sequence[Pictures]) -> Pictures:
        """Return the pictures of an example that were resized one by one, as if they had been together."""
        return Pictures.joined(parts)

    def picture_bytes(self, width: int, height: int) -> int:
        """Return how many bytes a picture takes up after resizing, from its sides in pixels."""
        return math.prod(self._size_of(width, height)) * CHANNELS

    def _size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height of a picture after resizing."""
        least, most = self.pixel_limits
        height, width = smart_resize(height, width, self.token_side, min_pixels=least, max_pixels=most)
        return width, height

    def text_offsets(self, example: Example) -> list[tuple[int, int]]:
        """Return for each token of an example's text the half-open range of its characters."""
        return self._prompt.offsets(example.text, len(example.images))

    def token_types(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Derive `mm_token_type_ids` from the ids: 1 at image tokens, 0 elsewhere.

        transformers falls back to text-only positions, silently, where these are missing.
        """
        return ((input_ids == self.image_token_id) & (attention_mask > 0)).long()

    def text_span(self, ids: Sequence[int]) -> tuple[int, int]:
        """Find the user's text in the token ids of an example."""
        pictures = [token == self.image_token_id for token in ids]
        places = [index for index, inside in enumerate(pictures) if not (inside and index and pictures[index - 1])]
        tokens = [ids[place] for place in places]  # each picture as one
        places.append(len(ids))
        start, end = self._prompt.text_range(tokens, tokens.count(self.image_token_id))
        return places[min(start, len(tokens))], places[min(end, len(tokens))]

    def fingerprint(self) -> dict[str, Any]:
        """Describe everything here that changes what the model reads, as JSON-able values."""
        settings = {name: getattr(self.image_processor, name) for name in PICTURE_SETTINGS}
        vocabulary = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        # Templates may print special tokens by name, which no other entry covers.
        special = {
            name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if name in self.chat_template
        }
        return {
            **({"special_tokens": special} if special else {}),
            "pixel_limits": self.pixel_limits,
            "image_processor": {name: str(value) for name, value in settings.items()},
            **self.prompt_facts(),
            "tokenizer": vocabulary,
        }

    def prompt_facts(self) -> dict[str, Any]:
        """Return the template in use, and whether it strips texts."""
        return {"prompt": self.chat_template, **({"texts": "stripped"} if self._prompt.strips else {})}

    def _check_text(self, ids: Sequence[int]) -> None:
        if self.image_token_id in ids or self.video_token_id in ids:
            raise CheckpointError(
                "this checkpoint's tokenizer turns a special token written in a text into the token itself; "
                "use a tokenizer that declares <|image_pad|> and <|video_pad|> as special"
            )

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        if self._vocab_size is not None and max(ids, default=0) >= self._vocab_size:
            raise CheckpointError(
                f"this checkpoint's tokenizer gives token {max(ids):,}, and the model has {self._vocab_size:,} tokens; "
                "give the tokeniser files that were saved with these weights"
            )

    def _check_positions(self, ids: Sequence[int], pictures: Pictures) -> None:
        """Check that a prompt has no more positions than the model supports; a picture takes those of its longest side.

        Raises:
            TextError: It has more.
        """
        if self._positions is None or len(ids) <= self._positions:
            return
        sides = [max(t, h // self.merge_size, w // self.merge_size) for t, h, w in pictures.grids]
        tokens = [math.prod(grid) // self.merge_size**2 for grid in pictures.grids]
        used = len(ids) - sum(tokens) + sum(sides)
        if used > self._positions:
            raise TextError(
                f"the prompt with pictures and text takes {used:,} positions, and the model has {self._positions:,}; "
                "shorten the text"
            )


def renders_nothing(tokenizer: Any, template: str) -> bool:
    """Tell whether a chat template renders neither picture nor text, as those of some base checkpoints do.

    Args:
        tokenizer: A transformers tokenizer, which renders the template.
        template: A Jinja chat template.
    """
    try:
        return not render_prompt(tokenizer, template, TEXT_MARK, images=1).strip()
    except RenderingError:  # reported when the processor renders the template
        return False
