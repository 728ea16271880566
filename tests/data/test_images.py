import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mmdit.data.images import BadImage, decode, read_bytes, suffix_of

from .conftest import bomb, encoded, noise, png

RAMP = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)
COLOURS = noise(4, 4)
ALPHA = RAMP[::-1]


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, np.float64)[..., None], 3, axis=2)


def rows_of(values: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in values)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette(transparent: int | None = None) -> tuple[bytes, np.ndarray]:
    table = noise(1, 16, seed=3)[0]
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    image.putpalette(table.tobytes())
    options = {} if transparent is None else {"transparency": transparent}
    golden = table.reshape(4, 4, 3).astype(np.float64)
    if transparent is not None:
        golden[divmod(transparent, 4)] = 255
    return saved(image, "PNG", **options), golden


def cmyk() -> tuple[bytes, np.ndarray]:
    inks = np.dstack([noise(4, 4, seed=1), RAMP])
    golden = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    return saved(Image.fromarray(inks, "CMYK"), "TIFF"), golden


def grey16() -> tuple[bytes, np.ndarray]:
    values = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    return png(4, 4, 16, 0, rows_of(values.astype(">u2"))), grey(values / 257)


def grey16_with_hole() -> tuple[bytes, np.ndarray]:
    values = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    golden = grey(values / 257)
    golden[0, 1] = 255
    hole = b"tRNS" + struct.pack(">H", values[0, 1])
    return png(4, 4, 16, 0, rows_of(values.astype(">u2")), hole), golden


def rgb16() -> tuple[bytes, np.ndarray]:
    values = np.random.default_rng(2).integers(0, 65536, (4, 4, 3), dtype=np.uint16)
    return png(4, 4, 16, 2, rows_of(values.astype(">u2"))), values / 257


def grey_of_bits(bits: int) -> tuple[bytes, np.ndarray]:
    """All values of so few bits, one of them transparent."""
    values = np.arange(2**bits, dtype=np.uint8)
    packed = np.packbits(np.unpackbits(values[:, None], axis=1)[:, -bits:])
    golden = grey((values * 255.0 / (2**bits - 1))[None])
    golden[0, 1] = 255
    hole = b"tRNS" + struct.pack(">H", 1)
    return png(2**bits, 1, bits, 0, b"\0" + packed.tobytes(), hole), golden


def tiff(width: int, bits: int, white_is: int, strip: bytes) -> bytes:
    """One row of grey by hand; `white_is`: what 0 stands for, 0 white and 1 black."""
    tags = (256, 257, 258, 259, 262, 273, 277, 278, 279)
    values = (width, 1, bits, 1, white_is, 122, 1, 1, len(strip))
    rows = zip(tags, values, strict=True)
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in rows)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + strip


def tiff16(white_is: int) -> tuple[bytes, np.ndarray]:
    values = np.linspace(0, 65535, 8).astype("<u2")
    golden = grey((values / 257)[None])
    return tiff(8, 16, white_is, values.tobytes()), golden if white_is else 255 - golden


def animated(kind: str) -> tuple[bytes, np.ndarray]:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    return data, np.tile([255.0, 0, 0], (4, 4, 1))


def turned(orientation: int) -> tuple[bytes, np.ndarray]:
    """As a camera stores it: the golden image turned back, and the word how to turn it."""
    golden = noise(3, 5, seed=4)
    stored = {
        2: golden[:, ::-1],
        3: golden[::-1, ::-1],
        4: golden[::-1],
        5: golden.swapaxes(0, 1),
        6: np.rot90(golden),
        7: golden[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(golden, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(np.ascontiguousarray(stored), exif=exif), golden.astype(np.float64)


def rgb_of(ycc: np.ndarray) -> np.ndarray:
    """JFIF's definition of the colours that a JPEG file holds."""
    y, cb, cr = (channel.astype(np.float64) for channel in np.moveaxis(ycc, -1, 0))
    cb, cr = cb - 128, cr - 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    return rgb.clip(0, 255)


def flat_blocks(*colours: tuple[int, ...]) -> np.ndarray:
    """Blocks of 8 x 8 pixels of one colour each, beside each other: JPEG keeps those exactly."""
    return np.repeat(np.repeat(np.array([colours], np.uint8), 8, axis=0), 8, axis=1)


def jpeg(pixels: np.ndarray, mode: str, **options: object) -> bytes:
    image = Image.fromarray(pixels, mode)
    return saved(image, "JPEG", quality=100, subsampling=0, **options)


def jpeg_turned() -> tuple[bytes, np.ndarray]:
    stored = flat_blocks((90, 100, 180), (160, 120, 70))  # the first lies at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right: the left comes up
    return jpeg(stored, "YCbCr", exif=exif), np.rot90(rgb_of(stored), -1)


def palette_of_alphas() -> tuple[bytes, np.ndarray]:
    """By hand: a table of 16 colours, and the opacities of the first eight."""
    table, alphas = noise(1, 16, seed=5)[0], np.arange(0, 256, 36, dtype=np.uint8)
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4)
    opacity = np.full(16, 255.0)
    opacity[: len(alphas)] = alphas
    chunks = (b"PLTE" + table.tobytes(), b"tRNS" + alphas.tobytes())
    return png(4, 4, 8, 3, rows_of(indices), *chunks), on_white(table, opacity).reshape(4, 4, 3)


YCC = flat_blocks((128, 128, 128), (90, 100, 180), (160, 120, 70), (40, 140, 120))
INKS = flat_blocks((0, 0, 0, 0), (200, 30, 90, 60), (10, 250, 120, 128), (0, 0, 0, 255))

FIXTURES = {
    "rgb": (encoded(COLOURS), COLOURS),
    "grey": (saved(Image.fromarray(RAMP), "PNG"), grey(RAMP)),
    "1-bit": (
        saved(Image.fromarray(RAMP > 127), "PNG"),
        grey(np.where(RAMP > 127, 255, 0)),
    ),
    "rgb and alpha": (
        saved(Image.fromarray(np.dstack([COLOURS, ALPHA])), "PNG"),
        on_white(COLOURS, ALPHA),
    ),
    "grey and alpha": (
        saved(Image.fromarray(np.dstack([RAMP, ALPHA]), "LA"), "PNG"),
        on_white(grey(RAMP), ALPHA),
    ),
    "palette": palette(),
    "palette with a transparent entry": palette(transparent=5),
    "a transparent colour": (
        png(4, 4, 8, 0, rows_of(RAMP), b"tRNS" + struct.pack(">H", 34)),
        grey(np.where(RAMP == 34, 255, RAMP)),
    ),
    "palette with opacities": palette_of_alphas(),
    "cmyk": cmyk(),
    "cmyk jpeg": (
        jpeg(INKS, "CMYK"),
        (255.0 - INKS[..., :3]) * (255.0 - INKS[..., 3:]) / 255,
    ),
    "ycbcr jpeg": (jpeg(YCC, "YCbCr"), rgb_of(YCC)),
    "grey jpeg": (jpeg(YCC[..., 0], "L"), grey(YCC[..., 0])),
    "16-bit grey": grey16(),
    "16-bit grey, a transparent value": grey16_with_hole(),
    "16-bit rgb": rgb16(),
    **{f"{bits}-bit grey, a transparent value": grey_of_bits(bits) for bits in (1, 2, 4, 8)},
    "16-bit grey tiff": tiff16(1),
    "16-bit grey tiff, 0 is white": tiff16(0),
    "12-bit grey tiff": (
        tiff(4, 12, 1, bytes([0xFF, 0xF8, 0x00, 0x00, 0x00, 0x10])),  # of 12 bits each, packed
        grey(np.array([[4095, 2048, 0, 16]]) / 4095 * 255),
    ),
    "animated gif": animated("GIF"),
    "animated webp": animated("WEBP"),
    "turned jpeg": jpeg_turned(),
    **{f"orientation {number}": turned(number) for number in range(2, 9)},
}  # fmt: skip


@pytest.mark.parametrize("name", FIXTURES)
def test_every_colour_mode_gives_its_golden_pixels(name):
    data, golden = FIXTURES[name]
    pixels = decode(data)
    assert pixels.dtype == np.uint8 and pixels.shape == golden.shape
    tolerance = 3 if name == "animated webp" else 1  # that one is stored with losses
    assert np.abs(pixels - golden).max() <= tolerance


def test_sixteen_bits_are_scaled_and_not_clipped():
    pixels = decode(grey16()[0])
    assert pixels[0, 0, 0] == 0 and pixels[-1, -1, 0] == 255
    assert len(np.unique(pixels)) == 16


@pytest.mark.parametrize("mode", ["F", "I"])
def test_modes_without_a_range_are_refused(mode):
    values = np.zeros((4, 4), {"F": np.float32, "I": np.int32}[mode])
    with pytest.raises(BadImage, match=f"colour mode {mode}"):
        decode(saved(Image.fromarray(values), "TIFF"))


def test_a_transparent_colour_that_pixels_cannot_tell_is_refused():
    data = png(1, 1, 16, 2, b"\0" + bytes(6), b"tRNS" + bytes([0, 0, 0, 0, 0, 1]))
    with pytest.raises(BadImage, match="transparent colour of 16 bits"):
        decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_counts_as_none(kind):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x010F], exif[0x8769] = "Maker", {0x9003: "2020:01:01 00:00:00"}
    upright = decode(encoded(COLOURS, kind))
    for _ in range(100):
        damaged = bytearray(exif.tobytes())
        for place in rng.integers(6, len(damaged), 4):
            damaged[place] = rng.integers(0, 256)
        pixels = decode(encoded(COLOURS, kind, exif=bytes(damaged)))
        assert np.array_equal(pixels, upright)


QUIET = """
import sys
from pathlib import Path
from PIL import Image
from mmdit.data.images import decode
Image.MAX_IMAGE_PIXELS = 10  # of the library: warns above, refuses above the double
for path in sys.argv[1:]:
    decode(Path(path).read_bytes(), max_pixels=64)
"""


def test_the_library_neither_limits_nor_warns(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Maker, of more bytes than lie there"
    paths = []
    for number, (side, end) in enumerate(((4, None), (8, None), (4, -20))):
        path = tmp_path / str(number)
        path.write_bytes(encoded(noise(side, side), "JPEG", exif=exif.tobytes()[:end]))
        paths.append(str(path))
    command = [sys.executable, "-W", "always", "-c", QUIET, *paths]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stderr == ""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_a_truncated_file_is_refused_unless_all_pixels_are_there(kind):
    data = encoded(noise(24, 24), kind)
    whole = decode(data)
    refused = 0
    for end in (*range(0, len(data), 97), *range(len(data) - 30, len(data))):
        try:
            assert np.array_equal(decode(data[:end]), whole)  # the end mark alone was cut
        except BadImage:
            refused += 1
    assert refused >= len(range(0, len(data), 97))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_is_refused_or_decoded_but_no_other_error():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        data = np.frombuffer(encoded(noise(16, 16), kind), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            places = rng.integers(0, len(data), 4)
            damaged[places] = rng.integers(0, 256, 4)
            try:
                assert decode(damaged.tobytes()).dtype == np.uint8
            except BadImage as error:
                assert str(error)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"not an image", "not an image in a supported format"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not an image in a supported format",
        ),
        (bomb(), "pixels"),
        (png(90, 100, 8, 0, b""), "90 x 100 pixels are more than the limit of 8999"),
    ],
)
def test_what_is_no_image_says_why(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, max_pixels=8999)


def test_an_image_of_exactly_the_limit_is_taken():
    assert decode(encoded(noise(5, 6)), max_pixels=30).shape == (5, 6, 3)


def claiming(kind: str) -> bytes:
    """A small file whose header promises billions of pixels, or all that the format can say."""
    lossless = {"lossless": True} if kind == "WEBP" else {}
    small = bytearray(saved(Image.new("RGB", (8, 8)), kind, **lossless))
    if kind == "GIF":
        small[6:10] = b"\xff" * 4  # of the screen; each frame lies within it
    elif kind == "BMP":
        small[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    elif kind == "WEBP":
        small[21:25] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    elif kind == "JPEG":
        start = small.index(b"\xff\xc0")  # start of frame: length, precision, height, width
        small[start + 5 : start + 9] = b"\xff" * 4
    elif kind == "PPM":
        small[:] = b"P6 1000000000 1000000000 255\n" + bytes(192)
    elif kind == "TIFF":
        count = int.from_bytes(small[4:8], "little") + 2
        for entry in range(count, len(small) - 11, 12):  # of 12 bytes: tag, type, number, value
            if int.from_bytes(small[entry : entry + 2], "little") in (256, 257):  # width, height
                small[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 2**31 - 1)
    return bytes(small)


def huge_texts() -> bytes:
    text = b"zTXt" + b"k\0\0" + zlib.compress(b"\0" * 10**8)
    return png(8, 8, 8, 2, b"", text, text, text)


HUGE = {
    **{kind: claiming(kind) for kind in ("GIF", "BMP", "WEBP", "JPEG", "PPM", "TIFF")},
    "PNG": bomb(),
    "PNG above our limit, below Pillow's": png(9000, 9000, 8, 2, b"\0" * 9000),
    "PNG of huge texts": huge_texts(),
}
REFUSE = """
import resource, sys, time
from mmdit.data.images import BadImage, decode
contents = [open(path, "rb").read() for path in sys.argv[2:]]
good, bad = contents[: int(sys.argv[1])], contents[int(sys.argv[1]) :]
for data in good:  # so that the readers are loaded
    decode(data)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 50_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    bytearray(60_000_000)
    sys.exit("the limit does not hold")
except MemoryError:
    pass
for data in bad:
    began = time.process_time()
    try:
        decode(data)
        sys.exit("was decoded")
    except BadImage as error:
        print(time.process_time() - began, error)
"""


def test_bombs_are_refused_in_50_ms_and_50_megabytes(tmp_path):
    good = {kind: encoded(COLOURS, kind) for kind in (name.split()[0] for name in HUGE)}
    paths = [tmp_path / str(i) for i in range(len(good) + len(HUGE))]
    for path, data in zip(paths, [*good.values(), *HUGE.values()], strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-W", "ignore", "-c", REFUSE, str(len(good)), *map(str, paths)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for name, line in zip(HUGE, found.stdout.splitlines(), strict=True):
        seconds, reason = line.split(" ", 1)
        assert ("Decompressed" if "texts" in name else "pixels") in reason, name
        assert float(seconds) < 0.05, name


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing")
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(2**40)  # a hole: takes no room on the disk
    for name, reason in (
        ("folder.png", "is a folder"),
        ("link.png", "a broken link"),
        ("none.png", "no such file"),
        ("large.png", "bytes are more than the limit"),
    ):
        with pytest.raises(BadImage, match=reason):
            read_bytes(tmp_path / name)


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif")])
def test_the_suffix_follows_the_content(kind, suffix):
    assert suffix_of(encoded(COLOURS, kind)) == suffix
