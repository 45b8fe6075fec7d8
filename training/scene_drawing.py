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

from training.scene_shapes import SHAPE_PAINTERS, Pen

SUPERSAMPLING = 4
NOISE_TILE = 256
NOISE_TILES = 4
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


# ----------------------------------------------------------------------------------------------- backgrounds


# Exponent of the 1/f spectrum (larger is smoother) and how many times finer the texture is along x than along y.
_NOISES: dict[str, tuple[float, float]] = {
    "grains": (0.3, 1.0),
    "rough": (0.8, 1.0),
    "blades": (0.8, 5.0),
    "patches": (1.5, 1.0),
    "clouds": (1.9, 1.0),
    "layers": (2.0, 0.4),
    "swell": (1.4, 0.25),
    "fibres": (1.2, 0.12),
}


@lru_cache(maxsize=len(_NOISES))
def _noise_bank(kind: str) -> np.ndarray:
    """(NOISE_TILES, NOISE_TILE, NOISE_TILE) noise of unit variance whose tiles wrap round at their edges."""
    exponent, stretch = _NOISES[kind]
    frequency_y = np.fft.fftfreq(NOISE_TILE)[:, None]
    frequency_x = np.fft.rfftfreq(NOISE_TILE)[None, :]
    amplitude = np.maximum(np.hypot(frequency_x / stretch, frequency_y), 1 / NOISE_TILE) ** -exponent
    amplitude[0, 0] = 0
    rng = np.random.default_rng(tuple(kind.encode()))
    white = np.fft.rfft2(rng.standard_normal((NOISE_TILES, NOISE_TILE, NOISE_TILE)))
    noise = np.fft.irfft2(white * amplitude, s=(NOISE_TILE, NOISE_TILE))
    return (noise / noise.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def _noise(rng: np.random.Generator, side: int, kind: str) -> np.ndarray:
    """A (side, side) window at a random place of a random noise tile."""
    tile, row, column = rng.integers(0, (NOISE_TILES, NOISE_TILE, NOISE_TILE))
    steps = np.arange(side)
    rows, columns = (row + steps) % NOISE_TILE, (column + steps) % NOISE_TILE
    return _noise_bank(kind)[tile][rows[:, None], columns]


@lru_cache(maxsize=4)
def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """x of shape (1, side) and y of shape (side, 1), pixel centres in [0, 1]."""
    steps = ((np.arange(side) + 0.5) / side).astype(np.float32)
    return steps[None, :], steps[:, None]


def _mix(low, high, amount: np.ndarray) -> np.ndarray:
    """(H, W, 3) colours between ``low`` (amount 0) and ``high`` (amount 1)."""
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return low + (high - low) * np.clip(amount, 0, 1)[..., None]


def _paint_grass(rng: np.random.Generator, side: int) -> np.ndarray:
    blades = _noise(rng, side, "blades")
    patches = _noise(rng, side, "clouds")
    return _mix((0.27, 0.37, 0.14), (0.66, 0.74, 0.40), 0.5 - 0.15 * _grid(side)[1] + 0.16 * blades + 0.13 * patches)


def _paint_sand(rng: np.random.Generator, side: int) -> np.ndarray:
    dunes = _noise(rng, side, "layers")
    ripples = np.sin(_grid(side)[1] * rng.uniform(55, 80) + 2.2 * dunes)
    grains = _noise(rng, side, "grains")
    return _mix((0.66, 0.53, 0.36), (0.93, 0.84, 0.66), 0.55 + 0.12 * ripples + 0.16 * dunes + 0.06 * grains)


def _paint_sky(rng: np.random.Generator, side: int) -> np.ndarray:
    blue = _mix((0.33, 0.55, 0.83), (0.68, 0.82, 0.94), np.broadcast_to(_grid(side)[1], (side, side)))
    clouds = np.clip(0.2 + 0.6 * _noise(rng, side, "clouds"), 0, 1)[..., None]
    return blue + (np.float32(0.95) - blue) * clouds


def _paint_night(rng: np.random.Generator, side: int) -> np.ndarray:
    haze = _noise(rng, side, "clouds")
    picture = _mix((0.03, 0.04, 0.14), (0.22, 0.22, 0.44), 0.1 + 0.5 * _grid(side)[1] + 0.16 * haze)
    rows, columns = rng.integers(0, side, (2, 45))
    picture[rows, columns] += rng.uniform(0.2, 0.85, (45, 1)).astype(np.float32)
    return picture


def _paint_snow(rng: np.random.Generator, side: int) -> np.ndarray:
    drifts = _noise(rng, side, "layers")
    crystals = _noise(rng, side, "grains")
    return _mix((0.66, 0.75, 0.88), (0.97, 0.98, 1.0), 0.6 + 0.3 * drifts + 0.07 * crystals)


def _paint_sea(rng: np.random.Generator, side: int) -> np.ndarray:
    swell = _noise(rng, side, "swell")
    y = _grid(side)[1]
    waves = np.sin(y * (40 + 30 * y) + 1.6 * swell)
    picture = _mix((0.13, 0.36, 0.50), (0.42, 0.68, 0.74), 0.75 - 0.6 * y + 0.12 * swell + 0.07 * waves)
    foam = np.clip(0.7 * (swell + waves - 2.1), 0, 0.5)[..., None]
    return picture + (np.float32(0.95) - picture) * foam


def _paint_wood(rng: np.random.Generator, side: int) -> np.ndarray:
    grain = _noise(rng, side, "fibres")
    boards = _grid(side)[1] * rng.integers(4, 7)
    tones = rng.uniform(-0.15, 0.15, 8).astype(np.float32)[boards.astype(int)]
    picture = _mix((0.46, 0.31, 0.19), (0.80, 0.62, 0.42), 0.5 + tones + 0.17 * grain)
    seams = np.abs(boards - np.round(boards)) < 0.035
    return picture * np.where(seams, np.float32(0.6), np.float32(1.0))[..., None]


_MUTED_PAIRS = (
    ((0.50, 0.54, 0.60), (0.71, 0.74, 0.78)),
    ((0.57, 0.50, 0.44), (0.77, 0.71, 0.63)),
    ((0.50, 0.57, 0.50), (0.70, 0.77, 0.69)),
    ((0.58, 0.49, 0.54), (0.78, 0.70, 0.74)),
)


def _paint_checks(rng: np.random.Generator, side: int) -> np.ndarray:
    x, y = _grid(side)
    tiles = rng.integers(5, 9)
    offset_x, offset_y = rng.uniform(0, 1, 2)
    wave = np.sin(np.pi * (x * tiles + offset_x)) * np.sin(np.pi * (y * tiles + offset_y))
    amount = np.clip(0.5 + wave * side / 8, 0.08, 0.92) + 0.07 * _noise(rng, side, "patches")
    return _mix(*_MUTED_PAIRS[rng.integers(len(_MUTED_PAIRS))], amount)


def _paint_wallpaper(rng: np.random.Generator, side: int) -> np.ndarray:
    wave = np.sin(2 * np.pi * (_grid(side)[0] * rng.integers(5, 10) + rng.uniform()))
    amount = np.clip(0.5 + wave * side / 16, 0.08, 0.92) + 0.07 * _noise(rng, side, "patches")
    return _mix(*_MUTED_PAIRS[rng.integers(len(_MUTED_PAIRS))], amount)


def _paint_bricks(rng: np.random.Generator, side: int) -> np.ndarray:
    x, y = _grid(side)
    rows = y * rng.integers(8, 11)
    columns = x * rng.integers(4, 6) + 0.5 * (rows.astype(int) % 2)
    tones = rng.uniform(-0.2, 0.2, (12, 8)).astype(np.float32)[rows.astype(int), columns.astype(int)]
    picture = _mix((0.46, 0.25, 0.20), (0.76, 0.50, 0.41), 0.5 + tones + 0.12 * _noise(rng, side, "rough"))
    mortar = (rows % 1 < 0.14) | (columns % 1 < 0.07)
    return np.where(mortar[..., None], np.float32((0.74, 0.70, 0.66)), picture)


def _paint_stone(rng: np.random.Generator, side: int) -> np.ndarray:
    veins = np.abs(_noise(rng, side, "patches"))
    return _mix((0.36, 0.37, 0.40), (0.70, 0.69, 0.67), 0.3 + 0.38 * veins + 0.1 * _noise(rng, side, "rough"))


def _paint_sunset(rng: np.random.Generator, side: int) -> np.ndarray:
    height = _grid(side)[1] + 0.05 * _noise(rng, side, "layers")
    upper = _mix((0.36, 0.30, 0.52), (0.92, 0.56, 0.46), height * 1.6)
    glow = np.clip(height * 1.7 - 0.75, 0, 1)[..., None]
    return upper + (np.float32((0.98, 0.80, 0.52)) - upper) * glow


def _paint_leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    clumps = np.abs(_noise(rng, side, "patches"))
    return _mix((0.05, 0.13, 0.07), (0.36, 0.50, 0.22), 0.05 + 0.45 * clumps + 0.12 * _noise(rng, side, "rough"))


class Background(NamedTuple):
    """How a background is painted and said, the object colours that would not stand out and a shape it shows itself."""

    paint: Callable[[np.random.Generator, int], np.ndarray]
    phrases: tuple[str, ...]
    clashes: tuple[str, ...]
    shows: str | None = None


BACKGROUNDS: dict[str, Background] = {
    "grass": Background(_paint_grass, ("on a grassy background", "on the grass", "on a lawn"), ("green",)),
    "sand": Background(
        _paint_sand, ("on a sandy background", "on the sand", "on a beach"), ("orange", "yellow", "white", "brown")
    ),
    "sky": Background(_paint_sky, ("in front of a cloudy sky", "in a cloudy sky"), ("white", "blue", "turquoise"), "cloud"),
    "night": Background(
        _paint_night,
        ("at night", "in front of a starry sky", "under the stars"),
        ("black", "blue", "purple", "brown"),
        "star",
    ),
    "snow": Background(_paint_snow, ("on a snowy background", "in the snow", "on the snow"), ("white",)),
    "sea": Background(_paint_sea, ("on the sea", "on the water", "at sea"), ("blue", "turquoise", "green")),
    "wood": Background(_paint_wood, ("on a wooden background", "on wooden boards"), ("brown", "orange")),
    "checks": Background(_paint_checks, ("on a checkered floor", "on a tiled floor"), ()),
    "wallpaper": Background(_paint_wallpaper, ("in front of a striped wall", "on striped wallpaper"), ()),
    "bricks": Background(_paint_bricks, ("in front of a brick wall", "on a brick wall"), ("red", "brown", "orange", "pink")),
    "stone": Background(_paint_stone, ("on a stone floor", "on a rocky background"), ()),
    "sunset": Background(_paint_sunset, ("at sunset", "in the evening sky"), ("orange", "pink", "red", "yellow")),
    "leaves": Background(_paint_leaves, ("in a forest", "on a leafy background"), ("green", "black", "brown"), "tree"),
}


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
    brightness = colour @ np.float32((0.3, 0.6, 0.1))
    if brightness < 0.2:
        return np.float32((0.50, 0.50, 0.53))
    if brightness > 0.9:
        return np.float32((0.62, 0.63, 0.67))
    return colour * np.float32(0.45) if brightness > 0.68 else np.float32((0.97, 0.95, 0.88))


def _lit_colours(item: SceneObject, sprite: _Sprite, diameter: int, towards_light: tuple[float, float]) -> np.ndarray:
    """The object's (side, side, 3) surface under the scene's light."""
    side = len(sprite.body)
    surface = _surface(item, sprite, diameter, rim_strength=0.35)
    light_x, light_y = towards_light
    shiny = item.fill == "shiny"
    slope = sprite.slope_x * np.float32(light_x / 127) + sprite.slope_y * np.float32(light_y / 127)
    surface *= (1 - (0.55 if shiny else 0.38) * slope)[..., None]
    x, y = _grid(side)
    spread = 0.012 if shiny else 0.05
    distance = (x - 0.5 - 0.17 * light_x) ** 2 + (y - 0.5 - 0.17 * light_y) ** 2
    glint = (0.95 if shiny else 0.14) * np.exp(-distance / spread)
    return surface + (1 - surface) * glint[..., None]


def _surface(item: SceneObject, sprite: _Sprite, diameter: int, rim_strength: float) -> np.ndarray:
    """The object's (side, side, 3) colours without light: fill pattern, inner details and rim."""
    colour = np.float32(COLOURS[item.colour])
    surface = _mix(colour, _accent(colour), _fill_pattern(item.fill, diameter, len(sprite.body)))
    detail = np.float32((0.55, 0.55, 0.58)) if item.colour == "black" else colour * np.float32(0.38)
    surface += (np.float32((0.96, 0.95, 0.90)) - surface) * (sprite.pale[..., None] * np.float32(1 / 255))
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
    candidates = [picture[..., order] * np.float32(tint) for order, tint in palettes]
    colours = np.float32([COLOURS[item.colour] for item in scene.objects]).reshape(-1, 3)
    gaps = [np.linalg.norm(colours - candidate.mean(axis=(0, 1)), axis=1).min(initial=2.0) for candidate in candidates]
    return candidates[int(np.argmax(gaps))]


def _paint_background(scene: Scene, image_size: int, style: str, rng: np.random.Generator) -> np.ndarray:
    picture = BACKGROUNDS[scene.background].paint(rng, image_size).astype(np.float32, copy=False)
    if style == "recoloured":
        picture = _recolour(picture, scene)
    if style == "flat":
        upper, lower = (half.mean(axis=(0, 1)) for half in np.array_split(picture, 2))
        return _mix(upper, lower, np.broadcast_to(_grid(image_size)[1], picture.shape[:2]))
    x, y = _grid(image_size)
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
