"""The backgrounds of scenes: painted from noise, with the phrases by which captions name them."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

NOISE_TILE = 256
NOISE_TILES = 4
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
    """A (side, side) window at a random position of a random noise tile."""
    tile, row, column = rng.integers(0, (NOISE_TILES, NOISE_TILE, NOISE_TILE))
    steps = np.arange(side)
    rows, columns = (row + steps) % NOISE_TILE, (column + steps) % NOISE_TILE
    return _noise_bank(kind)[tile][rows[:, None], columns]


@lru_cache(maxsize=4)
def unit_grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """x of shape (1, side) and y of shape (side, 1), pixel centres in [0, 1]."""
    steps = ((np.arange(side) + 0.5) / side).astype(np.float32)
    return steps[None, :], steps[:, None]


def mix(low, high, amount: np.ndarray) -> np.ndarray:
    """(H, W, 3) colours between ``low`` (amount 0) and ``high`` (amount 1)."""
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return low + (high - low) * np.clip(amount, 0, 1)[..., None]


def _paint_grass(rng: np.random.Generator, side: int) -> np.ndarray:
    blades = _noise(rng, side, "blades")
    patches = _noise(rng, side, "clouds")
    return mix((0.27, 0.37, 0.14), (0.66, 0.74, 0.40), 0.5 - 0.15 * unit_grid(side)[1] + 0.16 * blades + 0.13 * patches)


def _paint_sand(rng: np.random.Generator, side: int) -> np.ndarray:
    dunes = _noise(rng, side, "layers")
    ripples = np.sin(unit_grid(side)[1] * rng.uniform(55, 80) + 2.2 * dunes)
    grains = _noise(rng, side, "grains")
    return mix((0.66, 0.53, 0.36), (0.93, 0.84, 0.66), 0.55 + 0.12 * ripples + 0.16 * dunes + 0.06 * grains)


def _paint_sky(rng: np.random.Generator, side: int) -> np.ndarray:
    blue = mix((0.33, 0.55, 0.83), (0.68, 0.82, 0.94), np.broadcast_to(unit_grid(side)[1], (side, side)))
    clouds = np.clip(0.2 + 0.6 * _noise(rng, side, "clouds"), 0, 1)[..., None]
    return blue + (np.float32(0.95) - blue) * clouds


def _paint_night(rng: np.random.Generator, side: int) -> np.ndarray:
    haze = _noise(rng, side, "clouds")
    picture = mix((0.03, 0.04, 0.14), (0.22, 0.22, 0.44), 0.1 + 0.5 * unit_grid(side)[1] + 0.16 * haze)
    rows, columns = rng.integers(0, side, (2, 45))
    picture[rows, columns] += rng.uniform(0.2, 0.85, (45, 1)).astype(np.float32)
    return picture


def _paint_snow(rng: np.random.Generator, side: int) -> np.ndarray:
    drifts = _noise(rng, side, "layers")
    crystals = _noise(rng, side, "grains")
    return mix((0.66, 0.75, 0.88), (0.97, 0.98, 1.0), 0.6 + 0.3 * drifts + 0.07 * crystals)


def _paint_sea(rng: np.random.Generator, side: int) -> np.ndarray:
    swell = _noise(rng, side, "swell")
    y = unit_grid(side)[1]
    waves = np.sin(y * (40 + 30 * y) + 1.6 * swell)
    picture = mix((0.13, 0.36, 0.50), (0.42, 0.68, 0.74), 0.75 - 0.6 * y + 0.12 * swell + 0.07 * waves)
    foam = np.clip(0.7 * (swell + waves - 2.1), 0, 0.5)[..., None]
    return picture + (np.float32(0.95) - picture) * foam


def _paint_wood(rng: np.random.Generator, side: int) -> np.ndarray:
    grain = _noise(rng, side, "fibres")
    boards = unit_grid(side)[1] * rng.integers(4, 7)
    tones = rng.uniform(-0.15, 0.15, 8).astype(np.float32)[boards.astype(int)]
    picture = mix((0.46, 0.31, 0.19), (0.80, 0.62, 0.42), 0.5 + tones + 0.17 * grain)
    seams = np.abs(boards - np.round(boards)) < 0.035
    return picture * np.where(seams, np.float32(0.6), np.float32(1.0))[..., None]


_MUTED_PAIRS = (
    ((0.50, 0.54, 0.60), (0.71, 0.74, 0.78)),
    ((0.57, 0.50, 0.44), (0.77, 0.71, 0.63)),
    ((0.50, 0.57, 0.50), (0.70, 0.77, 0.69)),
    ((0.58, 0.49, 0.54), (0.78, 0.70, 0.74)),
)


def _paint_checks(rng: np.random.Generator, side: int) -> np.ndarray:
    x, y = unit_grid(side)
    tiles = rng.integers(5, 9)
    offset_x, offset_y = rng.uniform(0, 1, 2)
    wave = np.sin(np.pi * (x * tiles + offset_x)) * np.sin(np.pi * (y * tiles + offset_y))
    amount = np.clip(0.5 + wave * side / 8, 0.08, 0.92) + 0.07 * _noise(rng, side, "patches")
    return mix(*_MUTED_PAIRS[rng.integers(len(_MUTED_PAIRS))], amount)


def _paint_wallpaper(rng: np.random.Generator, side: int) -> np.ndarray:
    wave = np.sin(2 * np.pi * (unit_grid(side)[0] * rng.integers(5, 10) + rng.uniform()))
    amount = np.clip(0.5 + wave * side / 16, 0.08, 0.92) + 0.07 * _noise(rng, side, "patches")
    return mix(*_MUTED_PAIRS[rng.integers(len(_MUTED_PAIRS))], amount)


def _paint_bricks(rng: np.random.Generator, side: int) -> np.ndarray:
    x, y = unit_grid(side)
    rows = y * rng.integers(8, 11)
    columns = x * rng.integers(4, 6) + 0.5 * (rows.astype(int) % 2)
    tones = rng.uniform(-0.2, 0.2, (12, 8)).astype(np.float32)[rows.astype(int), columns.astype(int)]
    picture = mix((0.46, 0.25, 0.20), (0.76, 0.50, 0.41), 0.5 + tones + 0.12 * _noise(rng, side, "rough"))
    mortar = (rows % 1 < 0.14) | (columns % 1 < 0.07)
    return np.where(mortar[..., None], np.asarray((0.74, 0.70, 0.66), np.float32), picture)


def _paint_stone(rng: np.random.Generator, side: int) -> np.ndarray:
    veins = np.abs(_noise(rng, side, "patches"))
    return mix((0.36, 0.37, 0.40), (0.70, 0.69, 0.67), 0.3 + 0.38 * veins + 0.1 * _noise(rng, side, "rough"))


def _paint_sunset(rng: np.random.Generator, side: int) -> np.ndarray:
    height = unit_grid(side)[1] + 0.05 * _noise(rng, side, "layers")
    upper = mix((0.36, 0.30, 0.52), (0.92, 0.56, 0.46), height * 1.6)
    glow = np.clip(height * 1.7 - 0.75, 0, 1)[..., None]
    return upper + (np.asarray((0.98, 0.80, 0.52), np.float32) - upper) * glow


def _paint_leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    clumps = np.abs(_noise(rng, side, "patches"))
    return mix((0.05, 0.13, 0.07), (0.36, 0.50, 0.22), 0.05 + 0.45 * clumps + 0.12 * _noise(rng, side, "rough"))


class Background(NamedTuple):
    """A background: how to paint it, phrases for captions, object colours to avoid, and the shape that it already shows."""

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
