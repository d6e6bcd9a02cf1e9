"""Schemas of the examples in requests: picture(s) and text, or messages of a chat that hold both.

Each route has its own requests and answers beside it; these parts are shared. From them both the checks and the OpenAPI
page are made. Requests refuse fields that they do not know: a misspelt option must not be passed over in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from qwen_vl_classifier.serving.http.problems import explain_invalid
from qwen_vl_classifier.serving.items import MAX_IMAGES, Item, ItemError

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAgAQMAAABJtOi3AAAABlBMVEXcHh7///+vM0rGAAAAE0lEQVR42mP8z8DA"
    "wMRAkBgoAACnSQEPuLP44AAAAABJRU5ErkJggg=="
)
"""A small red picture, for examples on the page of the interface, which can be sent as they stand there."""

_MAX_MESSAGES = 64
_MAX_PARTS = 256

# Not a tuple: in JSON schema that is of a form that many generators of clients do not know.
Pair: TypeAlias = Annotated[list[float], Field(min_length=2, max_length=2)]

Picture = Annotated[
    str,
    Field(description="data URI or base64 of a JPEG, PNG or WebP file; a URL or a path where the server allows them"),
]


class StrictModel(BaseModel):
    """Refuse unknown fields, and turn no value from one type into another."""

    model_config = ConfigDict(extra="forbid", strict=True)


def one_or_several(value: Any) -> Literal["<one>", "<several>"]:
    """Choose the type that a value is meant to have, so that only the errors of that type are reported."""
    return "<several>" if isinstance(value, list) else "<one>"


Pictures: TypeAlias = Annotated[
    Annotated[Picture, Tag("<one>")]
    | Annotated[list[Picture], Field(fail_fast=True, max_length=MAX_IMAGES), Tag("<several>")]
    | Annotated[None, Tag("<none>")],
    Discriminator(lambda value: "<none>" if value is None else one_or_several(value)),
]


class ClassifyItem(StrictModel):
    """One example: picture(s) and text."""

    image: Pictures = Field(default=None, description="one picture, several in reading order, or null for text alone")
    text: str = Field(description="the words that go with it")

    def to_item(self) -> Item:
        """Return the example for the service."""
        images = [self.image] if isinstance(self.image, str) else self.image or []
        return Item(self.text, tuple(images))


class TextPart(StrictModel):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class ImageURL(StrictModel):
    """A picture as OpenAI's clients send it."""

    url: Picture
    detail: Literal["auto", "low", "high"] | None = Field(
        default=None, description="accepted and ignored: the classifier chooses the resolution"
    )


class ImagePart(StrictModel):
    """A part of a message that is a picture."""

    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[ImageURL, Tag("<object>")] | Annotated[Picture, Tag("<text>")],
        Discriminator(lambda value: "<text>" if isinstance(value, str) else "<object>"),
    ]

    @property
    def picture(self) -> str:
        """The picture, as data URI or whatever the request holds."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


def _part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"text": "<text>", "image_url": "<image>"}.get(kind) if isinstance(kind, str) else None


Part: TypeAlias = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image>")], Discriminator(_part)
]


class Message(StrictModel):
    """A message of a chat; only users' messages are accepted, since a classifier has no conversations."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("<one>")]
        | Annotated[list[Part], Field(min_length=1, max_length=_MAX_PARTS), Tag("<several>")],
        Discriminator(one_or_several),
    ]


Messages: TypeAlias = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=_MAX_MESSAGES)]


class MessagesItem(StrictModel):
    """One example as messages of a chat: all their pictures, then all their text, line by line."""

    messages: Messages


def parse_item(item: Any) -> Item | ItemError:
    """Turn an item of a request into an example for the service, or an error that says what is wrong with it.

    Args:
        item: As it stands in the JSON: an object with `image` and `text`, or with `messages`.
    """
    try:
        if isinstance(item, dict) and "messages" in item:
            return item_of_messages(MessagesItem.model_validate(item).messages)
        return ClassifyItem.model_validate(item).to_item()
    except ValidationError as error:
        return ItemError("invalid_item", explain_invalid(error))


def item_of_messages(messages: list[Message]) -> Item:
    """Turn messages of a chat into one example."""
    parts: list[TextPart | ImagePart] = []
    for message in messages:
        content = message.content
        parts += [TextPart(type="text", text=content)] if isinstance(content, str) else content
    return item_of_parts(parts)


def item_of_parts(parts: list[TextPart | ImagePart]) -> Item:
    """Turn parts of messages into one example: pictures in their order, texts as lines."""
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    return Item(text, tuple(part.picture for part in parts if isinstance(part, ImagePart)))
