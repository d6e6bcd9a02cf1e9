"""Turn the probability that an engine gives into a decision. Python's standard library alone is needed."""

import bisect
from typing import Any


def check_text(text: str, rules: dict[str, Any], *, pictures: bool) -> None:
    """Check that an engine reads a text as the classifier did in training.

    Args:
        text: The text.
        rules: The content of `decision.json`.
        pictures: Whether pictures come with it.

    Raises:
        ValueError: It would read it in another way.
    """
    blanks = text[: len(text) - len(text.lstrip())]
    if any(token in text for token in rules["refused_in_texts"]) or (not pictures and {*"\r\n"} & {*blanks}):
        raise ValueError("the engine would not read this text as the classifier did in training")


def decide(probability: float, rules: dict[str, Any]) -> dict[str, Any]:
    """Return the calibrated probability of class 1, the name of the class, and "yes", "no" or "abstain".

    Args:
        probability: What the engine gives for class 1.
        rules: The content of `decision.json`.
    """
    if rules["isotonic"]:  # a line from knot to knot, flat beyond the ends
        knots, values = ([ends[0], *ends, ends[-1]] for ends in (rules["isotonic"]["in"], rules["isotonic"]["out"]))
        at = bisect.bisect(knots, probability, 1, len(knots) - 1)
        width = knots[at] - knots[at - 1]
        share = (probability - knots[at - 1]) / width if width else 0.0
        probability = values[at - 1] + share * (values[at] - values[at - 1])
    label, band = int(probability >= rules["threshold"]), rules["abstention"]
    decision = "abstain" if band and band[0] <= probability <= band[1] else ("no", "yes")[label]
    return {"probability": probability, "label": rules["label_names"][label], "decision": decision}
