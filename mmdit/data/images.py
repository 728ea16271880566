"""Decoding of image files to uint8 RGB (h, w, 3), with one policy for every kind of file.

| in the file | here |
|---|---|
| EXIF orientation | applied; ignored if EXIF cannot be read |
| alpha, a transparent colour | composited on white |
| palette, 1-bit, grey, CMYK, YCbCr | converted; grey is repeated over the three channels |
| 12 or 16 bits a channel | scaled to 8 (4095 or 65535 becomes 255), not clipped |
| grey whose 0 is white | inverted |
| several frames | the first |
| ICC profile | ignored: pixels are assumed to be sRGB |
| 32-bit integers, floats, LAB | rejected: no defined white level, or not convertible |
| 16-bit RGB with a transparent colour | rejected: only 8 bits are read, too few to identify it |
| more than `max_pixels`, truncated, not an image | rejected |

Size and colour mode are checked in the header, before anything is decoded.
"""

import errno
import io
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as Pillow
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from mmdit.data.drawing import Image
from mmdit.errors import UserError, first_line

# A problem with a file is reported once, as the reason for setting it aside, or does not matter.
# The filter is permanent because catching warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")

# An explicit list, because Pillow would also try readers that start other programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIX_OF = {
    "BMP": "bmp",
    "GIF": "gif",
    "JPEG": "jpg",
    "MPO": "jpg",  # Pillow's name for a JPEG file with several images
    "PNG": "png",
    "PPM": "ppm",
    "TIFF": "tif",
    "WEBP": "webp",
}
MODES = (
    *("1", "L", "P", "RGB", "CMYK", "YCbCr"),
    *("LA", "La", "PA", "RGBA", "RGBa"),
    *("I;16", "I;16B", "I;16L"),
)
MAX_PIXELS = 2**26  # 8192 x 8192, 200 MB of RGB
MAX_BYTES = 2**28
TURNS = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
# Errors of a path that cannot exist, as opposed to disk failures: circular links, a file used as a
# folder, a name that is too long.
NOWHERE = frozenset((errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG))


class BadImage(UserError):
    """An unusable image; the message is the reason, without the file's name."""


class Missing(BadImage):
    """A file that does not exist."""


class TooLarge(BadImage):
    """An image with more pixels than the limit; it may be usable under a higher limit."""


def read_bytes(path: Path) -> bytes:
    """The content of a regular file of at most `MAX_BYTES`.

    Raises:
        BadImage: it does not exist, is not a file, has an invalid name, or permission is denied.
        OSError: the disk or the network failed, which is not a fault of the image.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadImage("is a folder")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            raise BadImage("is not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"{status.st_size} bytes are more than the limit of {MAX_BYTES}")
        return path.read_bytes()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise BadImage("a broken link") from error
        raise Missing("no such file") from error
    except PermissionError as error:
        raise BadImage("cannot be read (permission denied)") from error
    except OSError as error:
        if error.errno not in NOWHERE:
            raise
        raise BadImage(f"its path leads to no file ({error.strerror})") from error
    except BadImage:
        raise
    except ValueError as error:  # in the name: a zero byte, a lone surrogate
        raise BadImage("has an invalid file name") from error


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode an image to uint8 (h, w, 3), following the table in this module's docstring.

    Raises:
        BadImage: the data is empty, in an unsupported format, truncated or damaged, or in a colour
            mode without a defined range.
        TooLarge: it has more than `max_pixels` pixels. This is checked before decoding.
    """
    if not data:
        raise BadImage("is empty")
    if Pillow.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, for the whole process
        Pillow.MAX_IMAGE_PIXELS = max(Pillow.MAX_IMAGE_PIXELS, max_pixels)
    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, max_pixels)
            wide = _is_wide(image)
            if not wide and image.mode not in MODES:
                raise BadImage(f"colour mode {image.mode} has no defined range, or no RGB")
            if image.format == "PNG":
                _scale_transparent(image, bits=data[24])
            image.load()
            return _grey16(image) if wide else _rgb(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"is not an image in a supported format ({', '.join(FORMATS)})") from error
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        raise TooLarge(f"too many pixels: {first_line(error)}") from error
    except Exception as error:  # on damaged files Pillow's readers can raise anything
        raise BadImage(f"truncated or damaged: {first_line(error)}") from error


def suffix_of(data: bytes) -> str:
    """The usual suffix of an encoded image, by its content: "jpg"."""
    with Pillow.open(io.BytesIO(data), formats=FORMATS) as image:
        return SUFFIX_OF[str(image.format)]


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(f"{width} x {height} pixels are more than the limit of {max_pixels}")


def _is_wide(image: Pillow.Image) -> bool:
    """Grey of 16 bits: a mode of its own, or 32-bit integers where the format has 16 at most."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _scale_transparent(image: Pillow.Image, *, bits: int) -> None:
    """Scale the transparent colour, which the file stores in its own bit depth, to 8 bits."""
    clear = image.info.get("transparency")
    if image.mode == "L" and clear is not None:
        image.info["transparency"] = clear % 2**bits * (255 // (2**bits - 1))
    if image.mode == "RGB" and clear is not None and bits == 16:
        raise BadImage("has a transparent colour of 16 bits a channel, of which 8 are read")


def _upright(image: Pillow.Image) -> Pillow.Image:
    """Apply the EXIF orientation. Pixels are loaded already, so any failure is EXIF's."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # damaged EXIF can raise anything
        return image
    return image if turn is None else image.transpose(turn)


def _grey16(image: Pillow.Image) -> Image:
    white, inverted = 65535, False
    if isinstance(image, TiffImageFile):
        white = 2 ** image.tag_v2[BITSPERSAMPLE][0] - 1
        inverted = image.tag_v2[PHOTOMETRIC_INTERPRETATION] == 0
    values = np.asarray(_upright(image)).astype(np.uint32)
    if inverted:
        values = white - values
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def _rgb(image: Pillow.Image) -> Image:
    upright = _upright(image)
    if not upright.has_transparency_data:
        return np.array(upright.convert("RGB"))
    if upright.mode == "La":
        upright = upright.convert("LA")
    colours = upright.convert("RGBA")
    canvas = Pillow.new("RGB", colours.size, "white")
    canvas.paste(colours.convert("RGB"), mask=colours.getchannel("A"))
    return np.array(canvas)
