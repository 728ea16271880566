"""Plots drawn with Pillow only: grids of captioned images, and loss curves."""

import io
import math
import unicodedata
from bisect import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmdit.atomic import write_atomically
from mmdit.printable import printable

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
Point: TypeAlias = tuple[float, float]

LARGEST_GRID = 64  # images in a grid that can still be viewed at once
THUMBNAIL = 256  # pixels of a thumbnail's longer side
INK, FAINT, PAPER = (40, 40, 40), (215, 215, 215), (255, 255, 255)
PALETTE = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189))


def grid_image(
    images: Tensor, captions: Sequence[str], *, columns: int = 8, side: int = 128
) -> Image.Image:
    """A grid of images (n, h, w, 3) uint8, enlarged without smoothing, each above its caption."""
    font = ImageFont.load_default(11)
    columns = max(1, min(columns, len(images)))
    scale = max(1, side // images.shape[2])
    width, height = images.shape[2] * scale, images.shape[1] * scale
    texts = [_wrapped(caption, width, font) for caption in captions]
    below = 14 * max((len(lines) for lines in texts), default=1) + 6
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * (width + 6) + 6, rows * (height + below) + 6), PAPER)
    pen = ImageDraw.Draw(page)
    for i, (pixels, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = 6 + (i % columns) * (width + 6), 6 + (i // columns) * (height + below)
        cell = Image.fromarray(pixels.cpu().numpy())
        page.paste(cell.resize((width, height), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline=FAINT)
        for row, line in enumerate(lines):
            pen.text((x, y + height + 1 + 14 * row), line, fill=INK, font=font)
    return page


def save_grid(images: Tensor, captions: Sequence[str], *, path: Path) -> Path:
    """Save `grid_image` as a PNG, and return the path."""
    write_atomically(path, png(grid_image(images, captions)))
    return path


def png(image: Image.Image, **options: Any) -> bytes:
    """Encode an image as PNG, to be written by the caller.

    Pillow hides the system's error when it cannot write a file, so we write files ourselves.
    """
    data = io.BytesIO()
    image.save(data, format="PNG", **options)
    return data.getvalue()


class Thumbnails:
    """Collects small copies of images, all of one size, for a grid."""

    def __init__(self) -> None:
        self._images: list[Tensor] = []
        self._captions: list[str] = []

    def add(self, pixels: Tensor, caption: str) -> None:
        """Add an image, uint8 (h, w, 3)."""
        image = Image.fromarray(pixels.cpu().numpy())
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        self._images.append(torch.from_numpy(np.array(image)))
        self._captions.append(caption)

    def image(self) -> Image.Image:
        """The grid of all images added so far."""
        return grid_image(torch.stack(self._images), self._captions)


def _wrapped(text: str, width: int, font: Font, most: int = 3) -> list[str]:
    """Wrap text to at most `most` lines of `width` pixels; the rest is cut, with an ellipsis.

    Lines break at spaces, or anywhere in text without spaces: Chinese, Japanese, Thai, long words.
    """
    rest = printable(" ".join(text.split()))
    lines: list[str] = []
    while rest and len(lines) < most:
        end = _fitting(rest, width, font)
        if end < len(rest):
            space = rest.rfind(" ", 1, end + 1)
            end = _before_mark(rest, end) if space < 0 else space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        lines[-1] = _cut(f"{lines[-1]} …", width, font)
    return lines


def _fitting(text: str, width: int, font: Font, suffix: str = "") -> int:
    """Number of characters of `text`, at least one, that fit together with `suffix`; by bisection.

    Never more than there are pixels, so that even text without width takes no time.
    """
    lengths = range(1, min(len(text), width) + 1)
    return max(1, bisect(lengths, False, key=lambda n: font.getlength(text[:n] + suffix) > width))


def _before_mark(text: str, end: int) -> int:
    """Move a break back so as not to separate a letter from its accents or vowel signs."""
    start = end
    while start > 1 and unicodedata.category(text[start]).startswith("M"):
        start -= 1
    return start if start > 1 else end


def _cut(line: str, width: int, font: Font) -> str:
    if font.getlength(line) <= width:
        return line
    return f"{line[: _fitting(line, width, font, '…')]}…"


LOSSES = ("loss", "ema/loss", "raw/loss", "ema/psnr")  # metrics shown in a run's plot


class Curves:
    """Metrics over steps, with a bounded number of points however long the run is.

    A curve of more than `parts` points is stored as the minimum and the maximum of equal parts,
    whose length doubles whenever there are too many. So outliers remain visible.

    Args:
        names: names of the metrics.
        parts: maximum number of parts of each curve; even.
    """

    def __init__(self, names: Sequence[str], *, parts: int = 2000) -> None:
        self._curves = {name: _Curve(parts) for name in names}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the metrics of a row, which has a 'step'; values that are not finite are left out."""
        for name, curve in self._curves.items():
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                curve.add((row["step"], value))

    def points(self) -> dict[str, list[Point]]:
        """Points (step, value) by metric name, sorted by step; empty ones are left out."""
        found = {name: curve.points() for name, curve in self._curves.items()}
        return {name: points for name, points in found.items() if points}


class _Curve:
    """Points in parts of `_size`; the last part may be incomplete."""

    def __init__(self, most: int) -> None:
        self._most, self._size, self._count = most, 1, 0
        self._parts: list[list[Point]] = []  # one point, or minimum and maximum in order
        self._last: list[Point] = []

    def add(self, point: Point) -> None:
        if self._count % self._size == 0:
            if len(self._parts) == self._most:
                pairs = zip(self._parts[::2], self._parts[1::2], strict=True)
                self._parts, self._size = [_ends(a + b) for a, b in pairs], 2 * self._size
            self._parts.append([])
        self._parts[-1] = _ends([*self._parts[-1], point])
        self._last = [point]
        self._count += 1

    def points(self) -> list[Point]:
        kept = [point for part in self._parts for point in part]
        return kept if kept[-1:] == self._last else kept + self._last


def _ends(points: list[Point]) -> list[Point]:
    """The minimum and the maximum, in their original order."""
    if len(points) < 3:
        return points
    heights = [y for _, y in points]
    ends = {heights.index(min(heights)), heights.index(max(heights))}
    return [points[i] for i in sorted(ends)]


def plot_losses(losses: Curves, path: Path) -> None:
    """Plot the training loss and the validation losses over steps, as a PNG."""
    curves = losses.points()
    psnr = curves.pop("ema/psnr", [])
    if psnr:
        curves["ema/psnr (dB / 100)"] = [(step, value / 100) for step, value in psnr]
    plot(curves, path, x_label="step", y_label="loss")


def plot(curves: Mapping[str, Sequence[Point]], path: Path, *, x_label: str, y_label: str) -> None:
    """Save `plot_image` as a PNG."""
    write_atomically(path, png(plot_image(curves, x_label=x_label, y_label=y_label)))


def plot_image(curves: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str) -> Image.Image:
    """Plot named curves of (x, y) in one frame with ticks, a grid and a legend.

    Points that are not finite are left out.
    """
    curves = {
        name: [p for p in curve if all(map(math.isfinite, p))] for name, curve in curves.items()
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    width, height, left, right, top, bottom = 800, 480, 70, 20, 20, 50
    page = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return page
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (width - left - right), height - bottom - up * (
            height - top - bottom
        )

    for x in x_ticks:
        at = place(x, y_ticks[0])
        pen.line((at, place(x, y_ticks[-1])), fill=FAINT)
        pen.text((at[0], at[1] + 6), f"{x:g}", fill=INK, font=font, anchor="mt")
    for y in y_ticks:
        at = place(x_ticks[0], y)
        pen.line((at, place(x_ticks[-1], y)), fill=FAINT)
        pen.text((at[0] - 8, at[1]), f"{y:g}", fill=INK, font=font, anchor="rm")
    for i, (name, curve) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        if len(curve) > 1:
            pen.line([place(*point) for point in curve], fill=colour, width=2, joint="curve")
        x, y = place(*curve[-1])
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        pen.line(
            (width - 180, top + 16 + 18 * i, width - 155, top + 16 + 18 * i), fill=colour, width=3
        )
        pen.text((width - 148, top + 16 + 18 * i), name, fill=INK, font=font, anchor="lm")
    pen.text((width / 2, height - 16), x_label, fill=INK, font=font, anchor="mm")
    pen.text((8, 4), y_label, fill=INK, font=font)
    return page


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round values that cover [low, high]."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]
