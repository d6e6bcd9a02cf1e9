"""Pictures of three boxes side by side: items scattered in each, or blocks piled up to towers.

The style is that of a published task about spatial language (NLVR, Suhr et al., ACL 2017, https://aclanthology.org/P17-2034);
pictures and statements are drawn here at random, from seeds, and none of its pictures or sentences is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from qwen_vl_classifier.scenes.drawing import COLOURS, Colour, Rng, vary
from tools.tiny.degradation import degrade

BOX_COLOURS: dict[str, Colour] = {**COLOURS, "black": (15, 15, 15)}
BOX_SHAPES = ("square", "circle", "triangle")
ITEM_SIZES = {"small": 10, "medium": 20, "large": 30}
BOXES, SIDE, GAP = 3, 100, 50
"""Number of boxes, side of a box and width of the bar between two of them, in pixels."""

BLOCK = 20  # side of the blocks that towers are built of
MOST_BLOCKS = 4
MOST_ITEMS = 8

_USUAL = ("yellow", "blue", "black")  # the colours most pictures are limited to
_BRIGHT = {"yellow": (255, 255, 0), "blue": (0, 153, 255), "black": (0, 0, 0)}


@dataclass(frozen=True, slots=True)
class Item:
    """A thing in a box; centre in pixels from the corner of its box."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Half of its side."""
        return ITEM_SIZES[self.size] / 2

    @property
    def walls(self) -> frozenset[str]:
        """Which walls of its box it touches."""
        near = {
            "left": self.x - self.radius,
            "top": self.y - self.radius,
            "right": SIDE - self.x - self.radius,
            "bottom": SIDE - self.y - self.radius,
        }
        return frozenset(wall for wall, distance in near.items() if distance < 1)

    @property
    def in_corner(self) -> bool:
        """Whether it touches two walls that meet."""
        return bool(self.walls & {"left", "right"}) and bool(self.walls & {"top", "bottom"})


@dataclass(frozen=True, slots=True)
class Strip:
    """Three boxes; in a tower, items go from the bottom up."""

    boxes: tuple[tuple[Item, ...], ...]
    towers: bool

    @property
    def items(self) -> tuple[Item, ...]:
        """Everything in all boxes."""
        return tuple(item for box in self.boxes for item in box)


def sample_strip(rng: Rng, *, exclude: frozenset[tuple[str, str]] = frozenset()) -> Strip:
    """Draw the contents of three boxes at random.

    Args:
        rng: Where randomness comes from.
        exclude: Colour-shape pairs that must not occur.
    """
    colours = _USUAL if rng.random() < 0.7 else tuple(str(c) for c in rng.choice(list(BOX_COLOURS), 3, replace=False))
    towers = bool(rng.random() < 0.45)
    return Strip(tuple(_box(rng, colours, towers, exclude) for _ in range(BOXES)), towers)


def _box(rng: Rng, colours: tuple[str, ...], towers: bool, exclude: frozenset[tuple[str, str]]) -> tuple[Item, ...]:
    # Boxes of one or two colours are common, so that statements about them are true often enough.
    colours = tuple(str(c) for c in rng.choice(colours, size=rng.integers(1, len(colours) + 1), replace=False))
    shapes = ("square",) if towers else tuple(str(s) for s in rng.choice(BOX_SHAPES, rng.integers(1, 4), replace=False))
    pairs = [(c, s) for c in colours for s in shapes if (c, s) not in exclude] or [("black", shapes[0])]
    if towers:
        height = int(rng.integers(1, MOST_BLOCKS + 1))
        chosen = [pairs[rng.integers(len(pairs))] for _ in range(height)]
        return tuple(
            Item(shape, colour, "medium", SIDE / 2, SIDE - BLOCK / 2 - level * (BLOCK + 1))
            for level, (colour, shape) in enumerate(chosen)
        )
    items: list[Item] = []
    for _ in range(int(rng.integers(1, MOST_ITEMS + 1))):
        colour, shape = pairs[rng.integers(len(pairs))]
        size = str(rng.choice(list(ITEM_SIZES)))
        radius = ITEM_SIZES[size] / 2
        for _ in range(20):  # give up on a crowded box rather than let items overlap
            # Towards a wall as often as not, else touching would be rare.
            x, y = (_coordinate(rng, radius) for _ in range(2))
            if all(max(abs(x - i.x), abs(y - i.y)) >= radius + i.radius + 1 for i in items):
                items.append(Item(shape, colour, size, x, y))
                break
    return tuple(items)


def _coordinate(rng: Rng, radius: float) -> float:
    if rng.random() < 0.2:
        return float(rng.choice([radius, SIDE - radius]))
    return float(rng.integers(int(radius) + 4, int(SIDE - radius) - 3))


def on_picture(strip: Strip) -> tuple[Item, ...]:
    """Return everything in all boxes, with centres in pixels of the whole picture."""
    return tuple(
        replace(item, x=item.x + number * (SIDE + GAP)) for number, box in enumerate(strip.boxes) for item in box
    )


def box_caption(strip: Strip) -> str:
    """Name what each box holds: towers from the bottom up, other items in reading order with the walls they touch."""
    parts = []
    for box in strip.boxes:
        if strip.towers:
            parts.append(", ".join(item.colour for item in box))
            continue
        ordered = sorted(box, key=lambda item: (int(3 * item.y / SIDE), item.x))
        parts.append(", ".join(" ".join([item.size, item.colour, item.shape, *sorted(item.walls)]) for item in ordered))
    return "; ".join(parts) + "."


def draw_strip(strip: Strip, *, rng: Rng | None = None) -> Image.Image:
    """Render three boxes as an RGB picture of 400 x 100 pixels.

    Args:
        strip: What to draw.
        rng: If given, hues and greys vary and the picture may be degraded as real ones are (see `degrade`).
    """
    scale = 3
    wall, bar = (211, 211, 211), (128, 128, 128)
    hues = {**BOX_COLOURS, **_BRIGHT}
    if rng is not None:
        amount = int(rng.integers(0, 20))
        hues = {name: vary(hue, rng, amount) for name, hue in hues.items()}
        wall, bar = vary(wall, rng, amount), vary(bar, rng, amount)
    canvas = Image.new("RGB", ((BOXES * SIDE + (BOXES - 1) * GAP) * scale, SIDE * scale), bar)
    pen = ImageDraw.Draw(canvas)
    for number, box in enumerate(strip.boxes):
        left = number * (SIDE + GAP)
        pen.rectangle((left * scale, 0, (left + SIDE) * scale - 1, SIDE * scale - 1), fill=wall)
        for item in box:
            x, y, r = ((left + item.x) * scale, item.y * scale, item.radius * scale)
            if item.shape == "circle":
                pen.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=hues[item.colour])
            elif item.shape == "square":
                pen.rectangle((x - r, y - r, x + r - 1, y + r - 1), fill=hues[item.colour])
            else:
                pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=hues[item.colour])
    picture = canvas.reduce(scale)
    return picture if rng is None else degrade(picture, rng)
