"""What users of the page do and see."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

from playwright.sync_api import expect

from tests.serving.client import picture
from tests.serving.page.stub import model

RED, BLUE = picture("red"), picture("blue", "JPEG")
THREE = [
    model("claims", abstention=[0.42, 0.61]),
    model("receipts", labels=("no receipt", "a receipt"), threshold=0.35),
    model("plain", labels=("0", "1")),
]
SCORES = {"claims": 0.55, "receipts": 0.12, "plain": 0.9997}
PASTE = """(target, clipboardData) => target.dispatchEvent(
  new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }))"""
_TRANSFER = """([files, words]) => {
  const transfer = new DataTransfer();
  for (const [name, type, data] of files) {
    transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
  }
  if (words) transfer.setData("text/plain", words);
  return transfer;
}"""


def upload(page, *files: tuple[str, bytes, str]) -> None:
    """Choose pictures of one example."""
    page.set_input_files("#files", [{"name": name, "buffer": data, "mimeType": kind} for name, data, kind in files])
    if len(files) > 1:
        page.get_by_role("button", name=f"One example with {len(files)} pictures").click()


def upload_two(page) -> None:
    upload(page, ("red.png", RED, "image/png"), ("blue.jpg", BLUE, "image/jpeg"))


def transfer(page, *files: tuple[str, str, bytes], words: str = "") -> Any:
    """Make what a drop or a paste carries."""
    encoded = [[name, kind, base64.b64encode(data).decode()] for name, kind, data in files]
    return page.evaluate_handle(_TRANSFER, [encoded, words])


def classify(page, text: str = "There is a tower.", *, which: str | None = None) -> None:
    page.fill("#text", text)
    if which is not None:
        page.select_option("#model", which)
    page.click("#classify")
    expect(page.locator("#busy")).to_be_hidden()


def explain(page) -> None:
    page.get_by_role("button", name="Explain this answer").first.click()
    page.wait_for_selector(".words")


def answers(page) -> list[str]:
    return [re.sub(r"\s+", " ", text) for text in page.locator(".answer").all_inner_texts()]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
