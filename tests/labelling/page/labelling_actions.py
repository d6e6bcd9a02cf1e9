"""What people do on the labelling page."""

from __future__ import annotations

from tests.serving.page.stub import MILLISECONDS

READY = "#stage[aria-busy=false]"
"""There while a question is in view that can be answered, and where there is none."""


def ready(page) -> None:
    """Wait until the question in view can be answered."""
    page.wait_for_selector(READY, timeout=MILLISECONDS)


def press(page, *keys: str) -> None:
    """Press keys, each when the question in view can be answered."""
    for key in keys:
        ready(page)
        page.keyboard.press(key)
    ready(page)


def swipe(page, *steps: tuple[float, float], fingers: int = 1) -> None:
    """Move a finger over the card along points, given as parts of its width and height."""
    box = page.locator("#card").bounding_box()
    touch = page.context.new_cdp_session(page)

    def at(step: tuple[float, float]) -> list[dict[str, float]]:
        x, y = box["x"] + step[0] * box["width"], box["y"] + step[1] * box["height"]
        return [{"x": x + 30 * finger, "y": y, "id": finger} for finger in range(fingers)]

    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": at(steps[0])})
    for step in steps[1:]:
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": at(step)})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
