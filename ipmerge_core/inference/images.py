"""Open images from untrusted sources: known formats, bounded size, upright, RGB."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ipmerge_core.errors import RunError, explained

if TYPE_CHECKING:
    from PIL.Image import Image


MOST_PIXELS = 20_000_000
LONGEST_SIDE = 20_000  # pixels
MOST_ELONGATED = 100  # longer side / shorter side; processors scale the shorter side up


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


def open_image(file: str | Path | BinaryIO) -> Image:
    """Open an untrusted image: PNG, JPEG or WebP of bounded size, rotated upright, RGB.

    Both sides, their ratio and the number of pixels are checked before anything is decoded.

    Raises: RunError for anything else.
    """
    from PIL import Image, ImageOps

    name = Path(file).name if isinstance(file, str | Path) else "picture"

    def unreadable(error: Exception) -> RunError:
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            return RunError(f"The image '{name}' is too large. Use a smaller image.")
        return RunError(f"'{name}' is not a readable image. Expected a PNG, JPEG or WebP file.")

    with explained(unreadable), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; they do not affect the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=IMAGE_FORMATS) as picture:
            check_size(name, *picture.size)
            picture.verify()
        with Image.open(file, formats=IMAGE_FORMATS) as picture:  # verify() consumed the file
            check_size(name, *picture.size)
            return ImageOps.exif_transpose(picture).convert("RGB")


def check_size(name: str, width: int, height: int) -> None:
    """Raise RunError for an image with a side, a ratio of sides or a pixel count out of bounds."""
    short, long = sorted((width, height))
    if width * height > MOST_PIXELS:
        limit = f"the maximum is {MOST_PIXELS / 1e6:.0f} million. Use a smaller image."
    elif long > LONGEST_SIDE:
        limit = f"the maximum per side is {LONGEST_SIDE}. Use a smaller image."
    elif long > MOST_ELONGATED * short:
        limit = f"the longer side can be at most {MOST_ELONGATED} times the shorter. Crop it."
    else:
        return
    raise RunError(f"The image '{name}' has {width} x {height} pixels; {limit}")
