"""Turn the probability that a server gives into a decision. Python's standard library alone is needed."""

import bisect
import math
from typing import Any


def decide(probability: float, rules: dict[str, Any]) -> dict[str, Any]:
    """Return the calibrated probability of class 1, the name of the class, and "yes", "no" or "abstain".

    Args:
        probability: What the server gives for class 1.
        rules: The content of `decision.json`.
    """
    if rules["margin_offset"] and 0 < probability < 1:
        odds = probability / (1 - probability) * math.exp(rules["margin_offset"])
        probability = odds / (1 + odds)
    if rules["isotonic"]:  # a line from knot to knot, flat beyond the ends
        knots, values = ([ends[0], *ends, ends[-1]] for ends in (rules["isotonic"]["in"], rules["isotonic"]["out"]))
        at = bisect.bisect(knots, probability, 1, len(knots) - 1)
        width = knots[at] - knots[at - 1]
        share = (probability - knots[at - 1]) / width if width else 0.0
        probability = values[at - 1] + share * (values[at] - values[at - 1])
    label, band = int(probability >= rules["threshold"]), rules["abstention"]
    decision = "abstain" if band and band[0] <= probability <= band[1] else ("no", "yes")[label]
    return {"probability": probability, "label": rules["label_names"][label], "decision": decision}
