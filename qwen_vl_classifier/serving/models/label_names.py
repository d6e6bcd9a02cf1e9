"""How a label of a saved panel is named as a model: no other name that is served holds a slash."""

from __future__ import annotations


def label_model(panel: str, label: str) -> str:
    """Return the name under which a label of a saved panel can be requested by itself.

    Example:
        >>> label_model("parts", "scratch")
        'parts/scratch'
    """
    return f"{panel}/{label}"


def label_of(model: str) -> str:
    """Return the label of a name that `label_model` returned.

    Example:
        >>> label_of("parts/scratch")
        'scratch'
    """
    return model.partition("/")[2]
