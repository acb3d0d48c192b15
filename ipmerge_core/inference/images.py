"""Open a picture from an untrusted source: known formats, bounded size, upright, RGB."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ipmerge_core.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image


MOST_PIXELS = 20_000_000


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


def open_image(file: str | Path | BinaryIO) -> Image:
    """Open a picture that a stranger gave: PNG, JPEG or WebP of a bearable size, upright, RGB.

    Raises: RunError when it is something else; nothing is decoded before its size is known.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = Path(file).name if isinstance(file, str | Path) else "picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as picture:
                width, height = picture.size
                if width * height > MOST_PIXELS:
                    raise RunError(
                        f"The image '{name}' has {width} x {height} pixels; at most "
                        f"{MOST_PIXELS / 1e6:.0f} million are taken. Make it smaller."
                    )
                picture.verify()
            with Image.open(file, formats=IMAGE_FORMATS) as picture:  # verify() used it up
                return ImageOps.exif_transpose(picture).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RunError(f"The image '{name}' is too large to open. Make it smaller.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RunError(
            f"'{name}' is not a readable image. Expected a PNG, JPEG or WebP file."
        ) from error
