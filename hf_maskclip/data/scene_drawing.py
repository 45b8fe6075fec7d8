"""The vocabulary of synthetic scenes and their drawing: from a ``Scene`` description to pixels.

A scene is one or more objects (shape, colour, size, fill) on a background. ``draw_scene`` paints it with soft
shadows and light, always the same way for the same description, and also returns which pixels belong to objects.
Silhouettes and noise textures are drawn once per process and cached, so a scene costs little more than blending.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import cos, sin
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from .scene_backgrounds import BACKGROUNDS, mix, unit_grid
from .scene_shapes import SHAPE_PAINTERS, Pen

SUPERSAMPLING = 4
SHADOW_STRENGTH = 0.45
STYLES = ("plain", "noise", "blur", "sketch", "recoloured", "flat")

SHAPES = tuple(SHAPE_PAINTERS)
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.99, 0.86, 0.12),
    "green": (0.10, 0.62, 0.18),
    "turquoise": (0.10, 0.80, 0.78),
    "blue": (0.12, 0.28, 0.86),
    "purple": (0.50, 0.16, 0.70),
    "pink": (0.99, 0.50, 0.74),
    "brown": (0.45, 0.25, 0.10),
    "black": (0.11, 0.11, 0.13),
    "white": (0.97, 0.97, 0.97),
}
# Diameter as a fraction of the image side. No point of a silhouette is farther than REACH diameters from its centre.
SIZES: dict[str, float] = {"small": 0.23, "medium": 0.34, "large": 0.50}
REACH = 0.56


@dataclass(frozen=True)
class SceneObject:
    """One object. ``centre`` is (x, y) and ``diameter`` a length, all as fractions of the image side."""

    shape: str
    colour: str
    size: str
    fill: str
    centre: tuple[float, float]
    diameter: float
    angle: int = 0  # degrees, anticlockwise
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """A picture without pixels. ``light_angle`` (radians) points to the light; ``texture_seed`` fixes all noise."""

    objects: tuple[SceneObject, ...]
    background: str
    light_angle: float
    texture_seed: int


# ----------------------------------------------------------------------------------------------------- fills


def _soft_threshold(wave: np.ndarray, sharpness: float) -> np.ndarray:
    return np.clip(0.5 + wave * sharpness, 0, 1)


def _stripes(x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    return _soft_threshold(np.cos((x + y) * (np.sqrt(2) * np.pi / cell)) - 0.25, 0.35 * cell)


def _dots(x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    column, row = (x + y) / cell, (x - y) / cell
    distance = np.hypot(column - np.round(column), row - np.round(row)) * cell / np.sqrt(2)
    return _soft_threshold(0.24 * cell - distance, 1.0)


def _checks(x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    return _soft_threshold(np.sin(x * np.pi / cell) * np.sin(y * np.pi / cell), 0.6 * cell)


def _no_pattern(x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    return np.zeros_like(x)


# How much of the accent colour shows at pixel offsets (x, y) from the centre; "shiny" differs by its light alone.
_FILL_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "plain": _no_pattern,
    "striped": _stripes,
    "dotted": _dots,
    "checkered": _checks,
    "shiny": _no_pattern,
}
FILLS = tuple(_FILL_PATTERNS)


@lru_cache(maxsize=256)
def _fill_pattern(fill: str, diameter: int, side: int) -> np.ndarray:
    offsets = (np.arange(side) - (side - 1) / 2).astype(np.float32)
    x, y = np.meshgrid(offsets, offsets)
    return _FILL_PATTERNS[fill](x, y, max(diameter / 6.5, 3.2))


# --------------------------------------------------------------------------------------------------- objects


class _Sprite(NamedTuple):
    """Layers of one silhouette, (side, side) each. Slopes are int8 (127 is steepest), the others uint8 opacities."""

    body: np.ndarray
    dark: np.ndarray
    pale: np.ndarray
    rim: np.ndarray
    shadow: np.ndarray
    slope_x: np.ndarray
    slope_y: np.ndarray

    def mirrored(self) -> "_Sprite":
        flipped = _Sprite(*(layer[:, ::-1] for layer in self))
        return flipped._replace(slope_x=-flipped.slope_x)


@lru_cache(maxsize=1024)
def _sprite(shape: str, diameter: int, angle: int) -> _Sprite:
    """Draw ``shape`` ``diameter`` pixels wide, with a margin for its shadow."""
    pen = Pen(diameter * SUPERSAMPLING)
    SHAPE_PAINTERS[shape](pen)
    margin = 2 + diameter // 6
    side = diameter + 2 * margin
    layers = {}
    for name, layer in pen.layers.items():
        padded = Image.new("L", (side * SUPERSAMPLING,) * 2)
        padded.paste(layer, (margin * SUPERSAMPLING,) * 2)
        layers[name] = padded.rotate(angle, Image.Resampling.BILINEAR).reduce(SUPERSAMPLING)
    body = layers["body"]
    rim = ImageChops.subtract(body, body.filter(ImageFilter.MinFilter(3)))
    shadow = body.filter(ImageFilter.GaussianBlur(diameter * 0.05))
    height = sum(
        np.asarray(body.filter(ImageFilter.GaussianBlur(diameter * radius)), np.float32) * weight
        for radius, weight in ((0.035, 0.5), (0.14, 1.4))
    )
    slope_y, slope_x = np.gradient(height)
    steepest = max(np.abs(slope_x).max(), np.abs(slope_y).max()) / 127
    images = (body, layers["dark"], layers["pale"], rim, shadow)
    slopes = ((slope / steepest).astype(np.int8) for slope in (slope_x, slope_y))
    return _Sprite(*(np.asarray(image) for image in images), *slopes)


def _accent(colour: np.ndarray) -> np.ndarray:
    """The second colour of a pattern: cream, but a darker shade on light colours and grey on black and white.

    Cream on black would leave open which of the two is the object's colour.
    """
    brightness = colour @ np.asarray((0.3, 0.6, 0.1), np.float32)
    if brightness < 0.2:
        return np.asarray((0.50, 0.50, 0.53), np.float32)
    if brightness > 0.9:
        return np.asarray((0.62, 0.63, 0.67), np.float32)
    return colour * np.float32(0.45) if brightness > 0.68 else np.asarray((0.97, 0.95, 0.88), np.float32)


def _lit_colours(item: SceneObject, sprite: _Sprite, diameter: int, towards_light: tuple[float, float]) -> np.ndarray:
    """The object's (side, side, 3) surface under the scene's light."""
    side = len(sprite.body)
    surface = _surface(item, sprite, diameter, rim_strength=0.35)
    light_x, light_y = towards_light
    shiny = item.fill == "shiny"
    slope = sprite.slope_x * np.float32(light_x / 127) + sprite.slope_y * np.float32(light_y / 127)
    surface *= (1 - (0.55 if shiny else 0.38) * slope)[..., None]
    x, y = unit_grid(side)
    spread = 0.012 if shiny else 0.05
    distance = (x - 0.5 - 0.17 * light_x) ** 2 + (y - 0.5 - 0.17 * light_y) ** 2
    glint = (0.95 if shiny else 0.14) * np.exp(-distance / spread)
    return surface + (1 - surface) * glint[..., None]


def _surface(item: SceneObject, sprite: _Sprite, diameter: int, rim_strength: float) -> np.ndarray:
    """The object's (side, side, 3) colours without light: fill pattern, inner details and rim."""
    colour = np.asarray(COLOURS[item.colour], np.float32)
    surface = mix(colour, _accent(colour), _fill_pattern(item.fill, diameter, len(sprite.body)))
    detail = np.asarray((0.55, 0.55, 0.58), np.float32) if item.colour == "black" else colour * np.float32(0.38)
    surface += (np.asarray((0.96, 0.95, 0.90), np.float32) - surface) * (sprite.pale[..., None] * np.float32(1 / 255))
    surface += (detail - surface) * (sprite.dark[..., None] * np.float32(1 / 255))
    surface *= 1 - sprite.rim[..., None] * np.float32(rim_strength / 255)
    return surface


def _overlap(left: int, top: int, side: int, image_size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a square at (left, top) meets the image: its index into the image and into the square itself."""
    x0, x1 = max(left, 0), min(left + side, image_size)
    y0, y1 = max(top, 0), min(top + side, image_size)
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _draw_object(canvas: np.ndarray, mask: np.ndarray, item: SceneObject, light_angle: float, flat: bool) -> None:
    """Blend one object and its shadow into ``canvas`` and mark its pixels in ``mask``, both in place."""
    image_size = len(mask)
    diameter = max(8, round(item.diameter * image_size))
    sprite = _sprite(item.shape, diameter, item.angle)
    if item.mirrored:
        sprite = sprite.mirrored()
    side = len(sprite.body)
    left, top = (round(position * image_size - side / 2) for position in item.centre)
    towards_light = cos(light_angle), sin(light_angle)
    if flat:
        surface = _surface(item, sprite, diameter, rim_strength=0.85)
    else:
        surface = _lit_colours(item, sprite, diameter, towards_light)
        shift_x, shift_y = (round(-0.07 * diameter * component) for component in towards_light)
        region, part = _overlap(left + shift_x, top + shift_y, side, image_size)
        canvas[region] *= 1 - sprite.shadow[part][..., None] * np.float32(SHADOW_STRENGTH / 255)
    region, part = _overlap(left, top, side, image_size)
    opacity = sprite.body[part][..., None] * np.float32(1 / 255)
    canvas[region] += (surface[part] - canvas[region]) * opacity
    mask[region] |= sprite.body[part] > 127


# ---------------------------------------------------------------------------------------------------- scenes


def _recolour(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """Permute the background's colour channels, so that it stands out best from all the objects."""
    # The tints change even grey backgrounds, which a permutation would leave as they were.
    palettes = (((1, 2, 0), (1.12, 0.95, 0.82)), ((2, 0, 1), (0.84, 0.98, 1.14)), ((2, 1, 0), (1.06, 0.86, 1.08)))
    candidates = [picture[..., order] * np.asarray(tint, np.float32) for order, tint in palettes]
    colours = np.asarray([COLOURS[item.colour] for item in scene.objects], np.float32).reshape(-1, 3)
    gaps = [np.linalg.norm(colours - candidate.mean(axis=(0, 1)), axis=1).min(initial=2.0) for candidate in candidates]
    return candidates[int(np.argmax(gaps))]


def _paint_background(scene: Scene, image_size: int, style: str, rng: np.random.Generator) -> np.ndarray:
    picture = BACKGROUNDS[scene.background].paint(rng, image_size).astype(np.float32, copy=False)
    if style == "recoloured":
        picture = _recolour(picture, scene)
    if style == "flat":
        upper, lower = (half.mean(axis=(0, 1)) for half in np.array_split(picture, 2))
        return mix(upper, lower, np.broadcast_to(unit_grid(image_size)[1], picture.shape[:2]))
    x, y = unit_grid(image_size)
    falloff = (x - 0.5) * cos(scene.light_angle) + (y - 0.5) * sin(scene.light_angle)
    return picture * (1 + 0.22 * falloff)[..., None]


def _sketch(image: Image.Image) -> Image.Image:
    """A crayon drawing: dark contours over a pale wash of the image's colours."""
    grey = image.convert("L")
    blurred = np.asarray(grey.filter(ImageFilter.GaussianBlur(max(1.0, image.width / 48))), np.float32)
    contours = np.clip((np.asarray(grey, np.float32) + 20) / (blurred + 20), 0.3, 1) ** 1.6
    wash = 255 - 0.7 * (255 - np.asarray(image.filter(ImageFilter.MedianFilter(3)), np.float32))
    return Image.fromarray((wash * contours[..., None]).astype(np.uint8))


def draw_scene(scene: Scene, image_size: int = 96, style: str = "plain") -> tuple[Image.Image, np.ndarray]:
    """Draw ``scene`` as a square RGB image, always the same for the same arguments.

    Objects keep their shape and colour in every style: ``noise`` and ``blur`` degrade the picture, ``sketch`` turns
    it into a crayon drawing, ``recoloured`` gives the background other colours and ``flat`` leaves out light, shadow
    and texture for outlined cartoon shapes.

    Returns the image and an (image_size, image_size) bool array: which pixels belong to an object.
    Raises ValueError for an unknown style or an image smaller than 16 pixels.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose one of {', '.join(STYLES)}")
    if image_size < 16:
        raise ValueError(f"image_size is {image_size}: a scene needs at least 16 pixels")
    rng = np.random.default_rng(scene.texture_seed)
    canvas = _paint_background(scene, image_size, style, rng)
    mask = np.zeros((image_size, image_size), bool)
    for item in scene.objects:
        _draw_object(canvas, mask, item, scene.light_angle, flat=style == "flat")
    grain = {"flat": 0.0, "noise": 0.13}.get(style, 0.012)
    if grain:
        canvas += grain * rng.standard_normal(canvas.shape, np.float32)
    image = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    if style == "blur":
        image = image.filter(ImageFilter.GaussianBlur(image_size / 55))
    elif style == "sketch":
        image = _sketch(image)
    return image, mask
