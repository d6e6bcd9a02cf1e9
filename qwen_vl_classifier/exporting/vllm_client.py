"""Ask a vLLM server that serves this folder, and decide: `python client.py TEXT [PICTURE ...]`.

It needs Python's standard library alone, and `decide.py` and `decision.json` beside it.
"""

import base64
import json
import mimetypes
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

from qwen_vl_classifier.exporting.decide import check_text, decide

SERVER = os.environ.get("VLLM_SERVER", "http://127.0.0.1:8000")
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '')}"}


def rules() -> dict[str, Any]:
    """Return the content of `decision.json`."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("decision.json").read_text(encoding="utf-8"))
    return content


def ask(text: str, *pictures: str) -> float:
    """Return the server's probability of class 1. Pictures come before the text, as in training."""
    check_text(text, rules(), pictures=bool(pictures))
    content: list[dict[str, Any]] = []
    for picture in pictures:
        data = base64.b64encode(Path(picture).read_bytes()).decode()
        url = f"data:{mimetypes.guess_type(picture)[0] or 'image/png'};base64,{data}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": text})
    body = {"model": "classifier", "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(f"{SERVER}/classify", json.dumps(body).encode(), HEADERS)
    with urllib.request.urlopen(request, timeout=60) as response:
        return float(json.load(response)["data"][0]["probs"][1])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(decide(ask(*sys.argv[1:]), rules()), ensure_ascii=False) + "\n")
