"""The silhouettes of scene objects: how each shape is drawn in the unit square, with one or two inner details."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw


class Pen:
    """Draws in unit coordinates (y down) on the layers of a silhouette: ``body``, ``dark`` and ``pale`` details."""

    def __init__(self, side: int):
        self.side = side
        self.layers = {name: Image.new("L", (side, side)) for name in ("body", "dark", "pale")}
        self._draw = {name: ImageDraw.Draw(layer) for name, layer in self.layers.items()}

    def _scale(self, points):
        return [(x * self.side, y * self.side) for x, y in points]

    def polygon(self, *points, layer="body", value=255):
        self._draw[layer].polygon(self._scale(points), fill=value)

    def ellipse(self, left, top, right, bottom, layer="body", value=255):
        self._draw[layer].ellipse(self._scale([(left, top), (right, bottom)]), fill=value)

    def disc(self, x, y, radius, layer="body", value=255):
        self.ellipse(x - radius, y - radius, x + radius, y + radius, layer, value)

    def box(self, left, top, right, bottom, layer="body", value=255):
        self._draw[layer].rectangle(self._scale([(left, top), (right, bottom)]), fill=value)

    def line(self, *points, width=0.045, layer="dark"):
        self._draw[layer].line(self._scale(points), fill=255, width=max(1, round(width * self.side)), joint="curve")

    def arc(self, left, top, right, bottom, start, end, width=0.045, layer="dark"):
        box = self._scale([(left, top), (right, bottom)])
        self._draw[layer].arc(box, start, end, fill=255, width=max(1, round(width * self.side)))


def _ball(pen: Pen) -> None:
    pen.disc(0.5, 0.5, 0.46)


def _box(pen: Pen) -> None:
    pen.box(0.07, 0.18, 0.93, 0.38)
    pen.box(0.13, 0.38, 0.87, 0.88)
    pen.line((0.1, 0.39), (0.9, 0.39))
    pen.box(0.38, 0.50, 0.62, 0.56, layer="dark")


def _triangle(pen: Pen) -> None:
    pen.polygon((0.5, 0.04), (0.94, 0.82), (0.06, 0.82))


def _star(pen: Pen) -> None:
    turns = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.23, 0.52)
    pen.polygon(*zip(0.5 + radii * np.sin(turns), 0.53 - radii * np.cos(turns), strict=True))


def _heart(pen: Pen) -> None:
    t = np.linspace(0, 2 * np.pi, 60)
    x = np.sin(t) ** 3
    y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    pen.polygon(*zip(0.5 + 0.48 * x, 0.46 - 0.48 * y, strict=True))


def _moon(pen: Pen) -> None:
    pen.disc(0.52, 0.5, 0.46)
    pen.disc(0.74, 0.4, 0.37, value=0)


def _cloud(pen: Pen) -> None:
    for x, y, radius in ((0.23, 0.6, 0.2), (0.43, 0.42, 0.24), (0.66, 0.47, 0.2), (0.79, 0.63, 0.18)):
        pen.disc(x, y, radius)
    pen.box(0.23, 0.58, 0.79, 0.8)


def _flower(pen: Pen) -> None:
    for turn in np.arange(6) * np.pi / 3:
        pen.disc(0.5 + 0.29 * np.sin(turn), 0.5 - 0.29 * np.cos(turn), 0.185)
    pen.disc(0.5, 0.5, 0.25)
    pen.disc(0.5, 0.5, 0.17, layer="dark")
    pen.disc(0.5, 0.5, 0.12, layer="dark", value=0)
    pen.disc(0.5, 0.5, 0.13, layer="pale")


def _tree(pen: Pen) -> None:
    pen.box(0.41, 0.8, 0.59, 0.98)
    pen.box(0.41, 0.84, 0.59, 0.98, layer="dark")
    for top, bottom, half in ((0.02, 0.36, 0.24), (0.2, 0.6, 0.34), (0.42, 0.85, 0.43)):
        pen.polygon((0.5, top), (0.5 + half, bottom), (0.5 - half, bottom))


def _mushroom(pen: Pen) -> None:
    pen.polygon((0.37, 0.5), (0.63, 0.5), (0.7, 0.95), (0.3, 0.95))
    pen.polygon((0.37, 0.5), (0.63, 0.5), (0.7, 0.95), (0.3, 0.95), layer="pale")
    pen.ellipse(0.04, 0.06, 0.96, 1.04)
    pen.box(0, 0.56, 0.29, 1.0, value=0)
    pen.box(0.71, 0.56, 1.0, 1.0, value=0)
    pen.box(0.29, 0.96, 0.71, 1.0, value=0)
    for edge, corner, foot in ((0.29, 0.37, 0.3), (0.71, 0.63, 0.7)):
        pen.polygon((edge, 0.56), (corner, 0.56), (foot, 0.97), (edge, 0.97), value=0)
    pen.box(0, 0, 1, 0.55, layer="pale", value=0)
    pen.line((0.05, 0.55), (0.95, 0.55))


def _house(pen: Pen) -> None:
    pen.box(0.7, 0.1, 0.82, 0.4)
    pen.polygon((0.5, 0.04), (0.98, 0.48), (0.02, 0.48))
    pen.box(0.16, 0.46, 0.84, 0.92)
    pen.line((0.06, 0.48), (0.94, 0.48))
    pen.box(0.55, 0.62, 0.73, 0.92, layer="dark")
    pen.box(0.26, 0.6, 0.44, 0.77, layer="pale")


def _umbrella(pen: Pen) -> None:
    pen.ellipse(0.02, 0.06, 0.98, 1.02)
    pen.box(0, 0.53, 1, 1.03, value=0)
    for x in (0.18, 0.5, 0.82):
        pen.ellipse(x - 0.16, 0.45, x + 0.16, 0.62, value=0)
    for layer in ("body", "dark"):
        pen.line((0.5, 0.45), (0.5, 0.86), width=0.065, layer=layer)
        pen.arc(0.5 - 0.03, 0.74, 0.5 + 0.2, 0.97, 0, 180, width=0.065, layer=layer)
    pen.line((0.5, 0.0), (0.5, 0.08), width=0.05, layer="body")
    for bend in (0.34, 0.66):
        pen.line((0.5, 0.08), ((0.5 + bend) / 2, 0.24), (bend, 0.48), width=0.025)


def _cup(pen: Pen) -> None:
    pen.ellipse(0.52, 0.28, 0.98, 0.74)
    pen.ellipse(0.64, 0.39, 0.87, 0.63, value=0)
    pen.polygon((0.06, 0.18), (0.74, 0.18), (0.66, 0.92), (0.14, 0.92))
    pen.ellipse(0.06, 0.09, 0.74, 0.28)
    pen.ellipse(0.12, 0.12, 0.68, 0.25, layer="dark")


def _key(pen: Pen) -> None:
    pen.disc(0.26, 0.5, 0.25)
    pen.disc(0.24, 0.5, 0.1, value=0)
    pen.box(0.45, 0.42, 0.99, 0.58)
    pen.box(0.66, 0.55, 0.77, 0.74)
    pen.box(0.87, 0.55, 0.99, 0.78)


def _crown(pen: Pen) -> None:
    pen.polygon((0.09, 0.26), (0.3, 0.5), (0.5, 0.14), (0.7, 0.5), (0.91, 0.26), (0.87, 0.86), (0.13, 0.86))
    for x, y in ((0.11, 0.25), (0.5, 0.13), (0.89, 0.25)):
        pen.disc(x, y, 0.07)
    pen.line((0.13, 0.72), (0.87, 0.72))


def _fish(pen: Pen) -> None:
    pen.polygon((0.3, 0.5), (0.02, 0.22), (0.08, 0.5), (0.02, 0.78))
    pen.polygon((0.42, 0.3), (0.56, 0.1), (0.74, 0.32))
    pen.ellipse(0.18, 0.22, 0.98, 0.78)
    pen.arc(0.48, 0.3, 0.7, 0.7, -60, 60)
    pen.disc(0.82, 0.43, 0.075, layer="pale")
    pen.disc(0.83, 0.43, 0.04, layer="dark")


def _boat(pen: Pen) -> None:
    pen.polygon((0.02, 0.68), (0.98, 0.68), (0.82, 0.94), (0.18, 0.94))
    pen.polygon((0.46, 0.04), (0.46, 0.62), (0.1, 0.62))
    pen.polygon((0.54, 0.14), (0.54, 0.62), (0.86, 0.62))
    for layer in ("body", "dark"):
        pen.line((0.5, 0.02), (0.5, 0.7), width=0.05, layer=layer)


def _car(pen: Pen) -> None:
    pen.polygon((0.22, 0.5), (0.34, 0.24), (0.66, 0.24), (0.8, 0.5))
    pen.box(0.03, 0.47, 0.97, 0.74)
    for window in (
        ((0.3, 0.48), (0.38, 0.31), (0.48, 0.31), (0.48, 0.48)),
        ((0.53, 0.48), (0.53, 0.31), (0.63, 0.31), (0.72, 0.48)),
    ):
        pen.polygon(*window, layer="pale")
    for x in (0.25, 0.75):
        pen.disc(x, 0.74, 0.135)
        pen.disc(x, 0.74, 0.135, layer="dark")
        pen.disc(x, 0.74, 0.055, layer="dark", value=0)


def _arrow(pen: Pen) -> None:
    pen.polygon((0.02, 0.36), (0.5, 0.36), (0.5, 0.12), (0.98, 0.5), (0.5, 0.88), (0.5, 0.64), (0.02, 0.64))


SHAPE_PAINTERS: dict[str, Callable[[Pen], None]] = {
    "ball": _ball,
    "box": _box,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "cloud": _cloud,
    "flower": _flower,
    "tree": _tree,
    "mushroom": _mushroom,
    "house": _house,
    "umbrella": _umbrella,
    "cup": _cup,
    "key": _key,
    "crown": _crown,
    "fish": _fish,
    "boat": _boat,
    "car": _car,
    "arrow": _arrow,
}
