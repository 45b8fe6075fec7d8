"""Pictures of each form that Pillow decodes, damaged at seeded places."""

import random
import struct
from collections.abc import Iterator
from io import BytesIO

from helpers import random_picture

# What they are saved with.
FORMS = {
    "JPEG": {"exif": b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHII", 1, 0x0112, 3, 1, 6 << 16) + bytes(4)},
    "PNG": {},
    "WEBP": {},
    "AVIF": {},
    "GIF": {},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
}


def whole_picture(form: str) -> bytes:
    buffer = BytesIO()
    random_picture(1, (48, 40)).save(buffer, form, **FORMS[form])
    return buffer.getvalue()


def damaged_pictures(form: str, count: int = 200) -> Iterator[bytes]:
    """Bytes are changed, cut out, doubled, or missing at the end; a few pictures are whole."""
    whole, rng = whole_picture(form), random.Random(form)
    for _ in range(count):
        content = bytearray(whole)
        for _ in range(rng.choice((0, 1, 4, 32))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        at = rng.randrange(len(content))
        parts = (content, content[:at], content[:at] + content[at + rng.randrange(64) :], content + content[:at])
        yield bytes(rng.choice(parts))
