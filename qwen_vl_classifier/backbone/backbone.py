"""Backbone: a Qwen-VL model without its language head, loaded whole or not at all."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.checkpoint.adapter_layout import Adapter, base_weights
from qwen_vl_classifier.backbone.checkpoint.expert_arrays import lay_out_experts
from qwen_vl_classifier.backbone.checkpoint.fingerprint import (
    adapter_digests,
    content_digest,
    file_digests,
    fingerprint_of,
    tensor_digests,
)
from qwen_vl_classifier.backbone.checkpoint.hub import commit_of, locate
from qwen_vl_classifier.backbone.checkpoint.language_head import head_rows, is_untied, word_tokens
from qwen_vl_classifier.backbone.checkpoint.model import load_config, load_model, load_processor
from qwen_vl_classifier.backbone.checkpoint.quantisation import (
    Quantization,
    check_quantization,
    use_whole_products,
)
from qwen_vl_classifier.backbone.checkpoint.stored import read_json
from qwen_vl_classifier.backbone.checkpoint.writing import copy_settings, write_weights
from qwen_vl_classifier.backbone.devices import (
    DType,
    choose_devices,
    choose_dtype,
    choose_token_budget,
    memory_advice,
    release_memory,
    settle_kernels,
    spelled_devices,
)
from qwen_vl_classifier.backbone.encoder import TokensOf, encode_in_batches, pooled_states
from qwen_vl_classifier.backbone.families import Family
from qwen_vl_classifier.backbone.layers.attention import use_faster_attention
from qwen_vl_classifier.backbone.layers.fused import fuse_layers
from qwen_vl_classifier.backbone.layers.joined import join_layers
from qwen_vl_classifier.backbone.layers.kinds import describe_layers
from qwen_vl_classifier.backbone.layers.linear_attention import use_packed_linear_attention
from qwen_vl_classifier.backbone.packing import pack_tensors
from qwen_vl_classifier.backbone.placement import devices_of
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.backbone.windows import prepare, windows
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ConfigError, shown
from qwen_vl_classifier.files.html_pieces import fact_card

_log = logging.getLogger(__name__)


class Backbone:
    """A checkpoint of one of the `FAMILIES` of Qwen vision-language models, ready to turn examples into features.

    Make one with `Backbone.load`.

    Attributes:
        name: The name or path that was given to `load`.
        revision: The commit on the hub if it is known, else the branch or tag that was given, or `None`.
        local_folder: Absolute path of the folder it was loaded from; `None` for a built-in backbone or one of the hub.
        family: Its family.
        folder: The folder with its files.
        model: The transformers model without language head; frozen and in evaluation mode after loading.
        processor: Turns examples into its inputs.
        total_layers: Number of decoder layers of the checkpoint; `num_layers` of them are loaded.
        quantization: How its linear layers and experts are quantised: "8bit", "4bit", or `None`.
        passed_over: Names of stored weights that belong to other trainers' heads, and were not loaded.
        adapter: The settings of the attached adapter, or `None`; see `backbone/adapters.py`.
    """

    def __init__(
        self,
        *,
        name: str,
        revision: str | None,
        family: Family,
        folder: Path,
        model: nn.Module,
        processor: Processor,
        total_layers: int,
        quantization: Quantization | None = None,
        passed_over: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.revision = revision
        self.local_folder = folder.absolute() if folder == Path(name).expanduser() else None
        self.family = family
        self.folder = folder
        self.model = model
        self.processor = processor
        self.total_layers = total_layers
        self.quantization = quantization
        self.passed_over = passed_over
        self.adapter: Adapter | None = None
        self._fingerprint: str | None = None
        self._changed = False
        self._token_budget: int | None = None  # the budget that fitted, once a batch did not

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: DType | torch.dtype = "auto",
        num_layers: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        revision: str | None = None,
        quantization: Quantization | None = None,
        chat_template: str | None = None,
        max_text_tokens: int | None = None,
    ) -> Backbone:
        """Load a backbone.

        Args:
            name: A name on the Hugging Face hub, a local folder in the hub's layout, or "builtin:tiny".
            device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps", "xpu", ...; or "spread" to divide
                the decoder's layers among all GPUs, "spread:cuda:0,cuda:1" among these (extra "finetune").
            dtype: "auto" (bfloat16 on GPUs and CPUs that compute in it natively, else float32), "float32" or
                "bfloat16".
            num_layers: Load only this many decoder layers, the first ones; `None` loads all.
            min_pixels: Enlarge pictures to at least this many pixels; `None` keeps the checkpoint's limit.
            max_pixels: Shrink pictures to at most this many pixels; `None` keeps the checkpoint's limit.
            revision: Branch, tag or commit on the hub.
            quantization: Quantise the decoder's linear layers and experts to "8bit" or "4bit" (extra "finetune"). This
                takes less memory and changes features. The vision tower, norms, embeddings and gates stay in `dtype`.
            chat_template: The text of a chat template that replaces the checkpoint's own; this changes features.
            max_text_tokens: Refuse texts of more tokens; `None` allows as many as the model has positions.

        Raises:
            CheckpointError: Not found, unreachable, of another family, or a weight is missing or left over.
            ConfigError: An argument is out of its range, or quantised layers do not run on the device.
            MissingExtraError: bitsandbytes is not installed, and `quantization` asks for it.
            OutOfMemoryError: The model does not fit.

        Example:
            >>> backbone = Backbone.load("builtin:tiny", device="cpu")
            >>> backbone.hidden_size
            128
        """
        began = time.perf_counter()
        name = str(name)
        devices = choose_devices(device)
        torch_dtype = choose_dtype(dtype, devices)
        for one in devices:
            check_quantization(quantization, one)
        folder = locate(name, revision)
        family, config, total_layers = load_config(folder, name, num_layers)
        processor = load_processor(folder, config, name, min_pixels, max_pixels, chat_template, max_text_tokens)
        with memory_advice(f"loading {name}"):
            model, passed_over = load_model(
                family,
                folder,
                config,
                torch_dtype,
                name,
                total_layers=total_layers,
                devices=devices,
                quantization=quantization,
            )
            if quantization is not None:
                use_whole_products(model)
            lay_out_experts(model)
            model = model.eval().requires_grad_(False)
            if devices[0].type == "cuda":
                join_layers(model)
                release_memory(devices[0])
        use_faster_attention(model)
        use_packed_linear_attention(model)
        fuse_layers(model)
        settle_kernels()
        backbone = cls(
            name=name,
            revision=commit_of(folder) or revision,
            family=family,
            folder=folder,
            model=model,
            processor=processor,
            total_layers=total_layers,
            quantization=quantization,
            passed_over=passed_over,
        )
        _log.debug(
            "loaded backbone %s from %s: %s, decoder layers %s, %s on %s, in %.1f s",
            name,
            folder,
            family.name,
            backbone.describe_layers(),
            quantization or str(backbone.dtype).removeprefix("torch."),
            spelled_devices(backbone.devices),
            time.perf_counter() - began,
        )
        return backbone

    def __repr__(self) -> str:
        return f"<Backbone: {shown(self.name)}, " + ", ".join(self._description().values()) + ">"

    def _repr_html_(self) -> str:
        """Return a card for notebooks."""
        return fact_card(f"Backbone {self.name}", self._description())

    def _description(self) -> dict[str, str]:
        quantised = {} if self.quantization is None else {"quantised": f"quantised to {self.quantization}"}
        return {
            "family": self.family.name,
            "layers": f"{self.num_layers} of {self.total_layers} layers",
            "features": f"hidden size {self.hidden_size}",
            "computes in": str(self.dtype).removeprefix("torch."),
            "device": " and ".join(map(str, self.devices)),
            **quantised,
            **({} if self.adapter is None else {"adapter": "with an adapter"}),
        }

    def __sklearn_clone__(self) -> Backbone:
        """Return itself: the clones that scikit-learn makes of an estimator share its backbone."""
        return self

    @property
    def num_layers(self) -> int:
        """Number of decoder layers that are loaded."""
        return len(self.model.language_model.layers)  # type: ignore[union-attr,arg-type]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]

    def describe_layers(self, tap: Tap | None = None) -> str:
        """Describe how many decoder layers of which kinds are loaded, or how many of them a tap needs."""
        model: Any = self.model
        depth = self.num_layers if tap is None or tap.layer == LAST_NORM else tap.layer
        return describe_layers(model.language_model.layers[:depth], self.total_layers, model.config.get_text_config())

    @property
    def device(self) -> torch.device:
        """The device of the model, to which inputs go; the first one of a model that is spread over several."""
        return next(self.model.parameters()).device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that hold parts of the model, in the order of its layers."""
        return devices_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights."""
        return next(self.model.parameters()).dtype

    @property
    def pixel_limits(self) -> tuple[int, int]:
        """Fewest and most pixels of a picture after resizing."""
        return self.processor.pixel_limits

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration, tokeniser, prompt, picture settings, dtype, quantisation and adapter.

        Features and classifiers made with one fingerprint are never used with another. The number of layers that
        are loaded does not enter: the layers that both have are the same.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(processor=self.processor.fingerprint(), **self._facts())
        return self._fingerprint

    @property
    def content(self) -> str:
        """SHA-256 over the files and settings that decide features; the same for all versions of libraries."""
        return content_digest(self.folder, self.processor, self._facts())

    def _facts(self) -> dict[str, Any]:
        weights = tensor_digests(base_weights(self.model)) if self._changed else None
        return {
            "config": read_json(self.folder / "config.json", self.name),
            "weights": weights or file_digests(self.folder, self.name),
            "dtype": str(self.dtype),
            "quantization": self.quantization,
            "adapter": adapter_digests(self.model, self.adapter),
        }

    def enable_gradient_checkpointing(self) -> None:
        """Train with less memory and more time."""
        # Renamed in transformers 5.2x; both names have the same default, which works with frozen parts.
        model = self.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()  # type: ignore[operator]
        # transformers lets embeddings of frozen parts record a graph, for another way of checkpointing than this one.
        model.disable_input_require_grads()  # type: ignore[operator]

    def mark_changed(self) -> None:
        """Record that weights have changed: those of the adapter if there is one, otherwise the backbone's own.

        The fingerprint is then computed again.
        """
        self._changed = self._changed or self.adapter is None
        self._fingerprint = None

    @property
    def changed(self) -> bool:
        """Whether the backbone's own weights, without an adapter's, differ from those in its files."""
        return self._changed

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the current weights in the hub's layout without language head, and use that folder from now on.

        Afterwards `fingerprint` covers the written weights, and `total_layers` is `num_layers`. An adapter is not
        written (see `write_adapter`) and stays attached.

        Args:
            folder: Path of the new folder; it must not exist yet.

        Raises:
            ConfigError: The weights are quantised.
        """
        if self.quantization is not None:
            raise ConfigError(
                f"{self.name} is quantised to {self.quantization}, and quantised weights cannot be saved; load it "
                f"without quantization to save it"
            )
        folder = Path(folder)
        folder.mkdir()
        untie = is_untied(self.folder, self.name, self._tied_embeddings())  # else embeddings would replace the head
        copy_settings(self.folder, folder, self.name, self.num_layers, untie=untie)
        write_weights(self.model, self.family, folder)
        self.folder = folder
        self.total_layers = self.num_layers
        self._changed = False
        self._fingerprint = None

    def encode(
        self,
        examples: Iterable[Example],
        taps: Sequence[Tap],
        *,
        token_budget: int | None = None,
        share_prefixes: bool = True,
    ) -> npt.NDArray[np.float32]:
        """Read features of examples at taps, in one pass and without gradients.

        Values equal transformers' own forward pass pooled by hand, whatever else is in the batch, and the same example
        given twice has the same features to the last bit.

        Args:
            examples: What to encode, without their labels. Read lazily, a few hundred at a time.
            taps: Where to read; any number costs one pass.
            token_budget: Most tokens in one batch; `None` chooses by free memory. A batch that does not fit after all
                is split.
            share_prefixes: Encode a picture once for all examples of the same picture, with the same result.

        Returns:
            float32, shape (examples, taps, hidden).

        Raises:
            ConfigError: This backbone does not have a tap, or the token budget is below 1.
            ImageError: Pictures cannot be opened; the message lists the rows.
            OutOfMemoryError: A single example does not fit.
        """
        taps = self.check_taps(taps)
        bad = BadRows()
        keys: dict[int, bytes] = {}  # by position
        known: dict[bytes, npt.NDArray[np.float32]] = {}
        for window in windows(self.processor, examples, bad, group=True):
            new = {item.key: item for item in window.prepared if item.key not in known}
            encoded = self.encode_prepared(
                list(new.values()), taps, token_budget=token_budget, share_prefixes=share_prefixes
            )
            known |= zip(new, encoded, strict=True)
            keys |= zip(window.positions, (item.key for item in window.prepared), strict=True)
        bad.check(len(keys) + len(bad))
        features = np.empty((len(keys), len(taps), self.hidden_size), dtype=np.float32)
        for position, key in keys.items():
            features[position] = known[key]
        return features

    def prepare(self, examples: Iterable[Example]) -> list[EncodedExample]:
        """Tokenise examples and open their pictures, each picture once however many texts come with it.

        Raises:
            ImageError: A picture cannot be opened.
        """
        return prepare(self.processor, examples)

    @torch.inference_mode()
    def encode_prepared(
        self,
        prepared: Sequence[EncodedExample],
        taps: Sequence[Tap],
        *,
        token_budget: int | None = None,
        share_prefixes: bool = True,
        tokens_of: TokensOf | None = None,
    ) -> npt.NDArray[np.float32]:
        """Read features of prepared examples; see `encode`, and `encode_in_batches` for `tokens_of`."""
        taps = self.check_taps(taps)
        if token_budget is not None and token_budget < 1:
            raise ConfigError(f"token_budget {token_budget}: expected 1 or more")
        budget = token_budget or self._token_budget or choose_token_budget(self.model.config, self.devices, self.dtype)
        features, fitted = encode_in_batches(
            self.model,
            self.processor,
            prepared,
            taps,
            token_budget=budget,
            share_prefixes=share_prefixes,
            tokens_of=tokens_of,
        )
        if fitted < budget:  # do not try the larger one again with the next examples
            self._token_budget = fitted
        return features

    def encode_batch(self, inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Tensor:
        """Read features of a batch of tensors; differentiable, as training needs it.

        Args:
            inputs: As `processor` makes them, padded on the right or on the left, on any device.
            taps: Where to read.

        Returns:
            float32, shape (rows, taps, hidden), on the backbone's device.
        """
        taps = self.check_taps(taps)
        batch = pack_tensors(self.processor, {name: tensor.to(self.device) for name, tensor in inputs.items()})
        return pooled_states(self.model, batch, taps)

    def check_taps(self, taps: Sequence[Tap]) -> Sequence[Tap]:
        """Return the taps if this backbone has them all.

        Raises:
            ConfigError: No taps, or a layer that is not loaded.
        """
        if not taps:
            raise ConfigError("no taps: give at least one, for example Tap(-1, 'mean')")
        for tap in taps:
            if tap.layer > self.num_layers:
                raise ConfigError(
                    f"tap {tap}: {self.name} has {self.num_layers} layers loaded; "
                    f"give 1 to {self.num_layers}, or load it with a larger num_layers"
                )
            if tap.layer == LAST_NORM and self.num_layers < self.total_layers:
                raise ConfigError(
                    f"tap {tap}: only {self.num_layers} of {self.total_layers} layers of {self.name} are loaded, "
                    "and -1 means the last of all; load it without num_layers"
                )
        return taps

    def token_rows(self, words: Sequence[str]) -> Tensor:
        """Read the language head's weights for words that are one token each.

        Only these rows are read from the weight files. If the files hold no head and the configuration ties it to
        the embeddings, rows of the embeddings are returned.

        Returns:
            float32, shape (words, hidden).

        Raises:
            ConfigError: A word is not one token.
            CheckpointError: The checkpoint has no language head.
        """
        tokens = word_tokens(self.processor.tokenizer, words, self.name)
        return head_rows(self.folder, tokens, self.name, tied=self._tied_embeddings())

    def _tied_embeddings(self) -> Tensor | None:
        """Return the embeddings if the configuration ties the language head to them."""
        tied = self.model.config.tie_word_embeddings  # type: ignore[union-attr]
        return self.model.get_input_embeddings().weight if tied else None  # type: ignore[operator]


def as_backbone(backbone: Backbone | str | os.PathLike[str]) -> Backbone:
    """Return a backbone; one given by name or folder is loaded with the defaults of `Backbone.load`."""
    return backbone if isinstance(backbone, Backbone) else Backbone.load(backbone)
