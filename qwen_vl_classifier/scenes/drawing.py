"""Pictures of coloured shapes: what is in them, drawn at random, and how they are rendered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

Colour: TypeAlias = tuple[int, int, int]
Rng: TypeAlias = np.random.Generator

COLOURS: dict[str, Colour] = {
    "red": (215, 45, 40),
    "green": (45, 160, 65),
    "blue": (45, 85, 210),
    "yellow": (240, 205, 40),
    "purple": (145, 65, 185),
    "orange": (240, 135, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")

SIZES: tuple[tuple[int, int], ...] = ((112, 112), (140, 84), (84, 140), (112, 140), (140, 112))
"""Picture sizes of pre-training in pixels, (width, height)."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape; centre and radius in pixels, angle in radians."""

    shape: str
    colour: str
    large: bool
    x: float
    y: float
    radius: float
    angle: float

    @property
    def size(self) -> str:
        """The word for its size."""
        return "large" if self.large else "small"


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes on a background."""

    width: int
    height: int
    background: Colour
    things: tuple[Thing, ...]

    def cell(self, thing: Thing) -> tuple[int, int]:
        """Return the row and column of a thing on a 3 x 3 grid over the picture."""
        row = min(2, int(3 * thing.y / self.height))
        column = min(2, int(3 * thing.x / self.width))
        return row, column


def sample_scene(
    rng: Rng,
    *,
    size: tuple[int, int] | None = None,
    exclude: frozenset[tuple[str, str]] = frozenset(),
    max_things: int = 8,
) -> Scene:
    """Draw a scene at random: few colours and shapes in each, so that counts above one are common.

    Args:
        rng: Where randomness comes from.
        size: (width, height) in pixels; `None` picks one of `SIZES`.
        exclude: Colour-shape pairs that must not occur.
        max_things: Most shapes in the scene.
    """
    width, height = size or SIZES[rng.integers(len(SIZES))]
    # Light, dark, or a grey between them that no colour of a thing is near.
    low, high = ((215, 256), (0, 50), (120, 190))[rng.choice(3, p=(0.6, 0.25, 0.15))]
    background = vary((int(rng.integers(low, high)),) * 3, rng, 12)
    colours = rng.choice(list(COLOURS), size=rng.integers(1, 5), replace=False)
    shapes = rng.choice(SHAPES, size=rng.integers(1, 4), replace=False)
    pairs = [(str(c), str(s)) for c in colours for s in shapes if (str(c), str(s)) not in exclude]
    if not pairs:
        pairs = [next((c, s) for c in COLOURS for s in SHAPES if c == str(colours[0]) and (c, s) not in exclude)]
    unit = min(width, height) / 112
    things: list[Thing] = []
    for _ in range(int(rng.integers(1, max_things + 1))):
        colour, shape = pairs[rng.integers(len(pairs))]
        large = bool(rng.random() < 0.4)
        radius = unit * (rng.uniform(13, 17) if large else rng.uniform(7, 9.5))
        for _ in range(30):  # give up on a crowded scene rather than let shapes overlap
            x, y = rng.uniform(radius + 1, width - radius - 1), rng.uniform(radius + 1, height - radius - 1)
            if all(np.hypot(x - t.x, y - t.y) > radius + t.radius + 2 * unit for t in things):
                angle = float(rng.uniform(-0.35, 0.35))
                things.append(Thing(shape, colour, large, float(x), float(y), float(radius), angle))
                break
    return Scene(width, height, background, tuple(things))


def draw(
    scene: Scene, *, corners: Image.Image | None = None, hue: Callable[[str], Colour] = COLOURS.__getitem__
) -> Image.Image:
    """Render a scene as an RGB picture.

    Args:
        scene: What to draw.
        corners: A picture of 2 x 2 pixels between whose colours the background fades; by default the scene's, evenly.
        hue: Gives the fill of a thing from the name of its colour; called once for each thing, in order.
    """
    scale = 3  # drawn larger and shrunk, for smooth edges
    size = (scene.width * scale, scene.height * scale)
    if corners is None:
        canvas = Image.new("RGB", size, scene.background)
    else:
        canvas = corners.resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        fill = hue(thing.colour)
        if thing.shape == "circle":
            x, y, r = (scale * value for value in (thing.x, thing.y, thing.radius))
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        else:
            pen.polygon([(scale * x, scale * y) for x, y in _outline(thing)], fill=fill)
    return canvas.reduce(scale)


def vary(colour: Colour, rng: Rng, amount: int = 22) -> Colour:
    """Return a colour a little off, which still goes by the same name."""
    red, green, blue = (int(value) for value in np.clip(colour + rng.integers(-amount, amount + 1, 3), 0, 255))
    return red, green, blue


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Return the corners of a shape other than a circle."""
    radius, start = thing.radius, thing.angle - np.pi / 2
    if thing.shape == "square":
        polar = [(radius * 1.15, start + np.pi / 4 + k * np.pi / 2) for k in range(4)]
    elif thing.shape == "triangle":
        polar = [(radius * 1.15, start + k * 2 * np.pi / 3) for k in range(3)]
    elif thing.shape == "star":
        polar = [(radius * (1.15 if k % 2 == 0 else 0.48), start + k * np.pi / 5) for k in range(10)]
    else:  # a cross: four arms of a third of the width
        arm, far = radius * 0.36, radius * 1.05
        corners = [(arm, far), (arm, arm), (far, arm)]
        points = []
        for quarter in range(4):
            turn = thing.angle + quarter * np.pi / 2
            for x, y in (corners[0], corners[1], corners[2]):
                points.append((x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)))
        return [(thing.x + x, thing.y + y) for x, y in points]
    return [(thing.x + r * np.cos(a), thing.y + r * np.sin(a)) for r, a in polar]
