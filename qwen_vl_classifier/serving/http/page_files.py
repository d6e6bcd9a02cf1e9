"""Serve the files that a page consists of: a fixed table, under a strict policy.

Nothing is read from a path that a request names: only what stands in the table is found. The policy lets a page load
only what its own server gives, and run only script files of that server.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request, Response

from qwen_vl_classifier.files.pages import page_file

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def list_files(folder: str) -> dict[str, str]:
    """List styles, scripts and drawings in a folder of this package, such as `serving/page`.

    Returns:
        The media type of each by its path below the folder.
    """
    found = sorted(_names(importlib.resources.files("qwen_vl_classifier").joinpath(folder)))
    types = {name: _MEDIA_TYPES.get(PurePath(name).suffix) for name in found}
    return {name: media_type for name, media_type in types.items() if media_type is not None}


def add_files(router: APIRouter, folder: str, files: Mapping[str, str]) -> None:
    """Serve files at `/page/NAME`.

    Args:
        router: What gets a route for each.
        folder: Their folder in this package.
        files: The media type of each by its path below the folder, as of `list_files`.
    """
    for name, media_type in files.items():
        router.add_api_route(f"/page/{name}", _file(folder, name, media_type))


def page_answer(request: Request, content: bytes, media_type: str) -> Response:
    """Answer with a file, or with 304 where the browser has this very content (RFC 9110, section 13.1.2)."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "ETag": tag,
        # Kept, but asked about each time: after an upgrade no page may run with half of its scripts old.
        "Cache-Control": "private, no-cache",
        "Content-Security-Policy": PAGE_POLICY,
    }
    known = {part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")}
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


def _file(folder: str, name: str, media_type: str) -> Any:
    async def file(request: Request) -> Response:
        return page_answer(request, page_file(folder, name).encode(), media_type)

    return file


def _names(folder: Traversable, prefix: str = "") -> Iterator[str]:
    for file in folder.iterdir():
        if file.is_dir():
            yield from _names(file, f"{prefix}{file.name}/")
        else:
            yield prefix + file.name
