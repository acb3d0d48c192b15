"""Open images from untrusted sources: known formats, bounded size, upright, RGB."""

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
    """Open an untrusted image: PNG, JPEG or WebP of bounded size, rotated upright, RGB.

    Raises: RunError for anything else; nothing is decoded before the size is checked.
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
                        f"The image '{name}' has {width} x {height} pixels; the maximum is "
                        f"{MOST_PIXELS / 1e6:.0f} million. Use a smaller image."
                    )
                picture.verify()
            with Image.open(file, formats=IMAGE_FORMATS) as picture:  # verify() consumed the file
                return ImageOps.exif_transpose(picture).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RunError(f"The image '{name}' is too large. Use a smaller image.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RunError(
            f"'{name}' is not a readable image. Expected a PNG, JPEG or WebP file."
        ) from error
