"""Image rows as pixels: decoded once to bytes, normalised (and enlarged where they are small) batch by batch.

The image processors of ``transformers`` are not used, since they may need torchvision.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fltac.config import BackboneConfig
from fltac.data.image_settings import Geometry, Normalisation, read_image_settings
from fltac.data.loading import RawSplit
from fltac.data.store import BATCH, Stored
from fltac.data.tasks import ResolvedTask
from fltac.errors import InputError

INTERPOLATIONS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that a batch can be enlarged with; others are applied when encoding."""

QUARTER_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
"""One, two and three, against the clock; pixels move, nothing is interpolated."""

ORIENTATION = 0x0112
"""Exif tag; the values 5 to 8 exchange width and height."""


@dataclass(frozen=True)
class PixelRows:
    """Reads batches from one split's pixels.

    Attributes:
        chunks: uint8 ``[BATCH, H, W, 3]``; the last may be shorter.
        geometry: Applied where H x W is not the backbone's size yet.
        normalisation: Applied to every batch.
    """

    chunks: tuple[NDArray[np.uint8], ...]
    geometry: Geometry
    normalisation: Normalisation

    @property
    def lengths(self) -> NDArray[np.int64]:
        """1 for every image: all are equally large."""
        return np.ones(sum(len(chunk) for chunk in self.chunks), dtype=np.int64)

    def batch(self, rows: NDArray[np.int64], pad_to: int | None) -> dict[str, NDArray[Any]]:
        """``pixel_values`` float32 ``[b, 3, height, width]``; ``pad_to`` does not matter."""
        pixels = np.stack([self.chunks[row // BATCH][row % BATCH] for row in rows])
        if pixels.shape[1:3] != (self.geometry.height, self.geometry.width):
            pixels = _enlarge(pixels, self.geometry)
        rule = self.normalisation
        deviation = np.array(rule.deviation, dtype=np.float64)
        factor = (rule.scale / deviation).astype(np.float32)
        shift = (np.array(rule.mean, dtype=np.float64) / deviation).astype(np.float32)
        values = pixels.astype(np.float32) * factor - shift
        return {"pixel_values": np.ascontiguousarray(values.transpose(0, 3, 1, 2))}


@dataclass(frozen=True)
class ImageEncoder:
    """Decodes images to the size that a backbone reads, or smaller where all are."""

    geometry: Geometry
    normalisation: Normalisation
    fingerprint: str
    max_length: None = None

    def content(self, split: RawSplit) -> Iterator[bytes]:
        """The images' files and how they are turned, for a fingerprint."""
        if split.turns is not None:
            yield split.turns.tobytes()
        for row, value in enumerate(_values(split)):
            yield _file_bytes(split, row, value)

    def encode(self, split: RawSplit) -> Iterator[pa.RecordBatch]:
        """Record batches of ``BATCH`` rows: the pixels of each image and its label."""
        height, width = self._stored_size(split)
        facts = {"truncated": "0", "height": str(height), "width": str(width)}
        pixels: list[NDArray[np.uint8]] = []
        start = 0
        for row, value in enumerate(_values(split)):
            pixels.append(self._pixels(_decode(split, row, value), height, width))
            if len(pixels) == BATCH or row == len(split.rows) - 1:
                labels = pa.array(split.labels[start : row + 1])
                flat = pa.py_buffer(np.stack(pixels))
                kind = pa.binary(height * width * 3)
                images = pa.FixedSizeBinaryArray.from_buffers(kind, len(pixels), [None, flat])
                batch = pa.RecordBatch.from_arrays([images, labels], names=["pixels", "label"])
                yield batch.replace_schema_metadata(facts)
                pixels, start = [], row + 1

    def reader(self, stored: Stored) -> PixelRows:
        """Reads batches from the mapped file without copying it."""
        height, width = int(stored.facts["height"]), int(stored.facts["width"])
        chunks = []
        for batch in stored.batches:
            column = batch.column("pixels")
            flat = np.frombuffer(column.buffers()[1], np.uint8)
            begin = column.offset * height * width * 3
            size = batch.num_rows * height * width * 3
            chunks.append(flat[begin : begin + size].reshape(batch.num_rows, height, width, 3))
        return PixelRows(tuple(chunks), self.geometry, self.normalisation)

    def _stored_size(self, split: RawSplit) -> tuple[int, int]:
        """The size that all images have if that is not larger than the backbone's, else the backbone's."""
        target = self.geometry.height, self.geometry.width
        if self.geometry.resample not in INTERPOLATIONS:
            return target
        common = None
        for row, value in enumerate(_values(split)):
            size = _size(split, row, value)
            if size[0] > target[0] or size[1] > target[1] or size != (common or size):
                return target
            common = size
        return common or target

    def _pixels(self, image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
        """uint8 ``[height, width, 3]``."""
        geometry = self.geometry
        if (image.height, image.width) != (height, width):
            rows, columns = geometry.resized(image.height, image.width)
            image = image.resize((columns, rows), Image.Resampling(geometry.resample))
            top, left = geometry.corner(rows, columns)
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image, dtype=np.uint8)


def image_encoder(config: BackboneConfig, folder: str, task: ResolvedTask) -> ImageEncoder:
    """Makes the encoder for a backbone.

    Args:
        config: The ``backbone`` section.
        folder: Local folder or hub id of the pretrained model.
        task: The task that needs it, for errors.

    Raises:
        InputError: the backbone's image settings are missing or cannot be followed.
    """
    geometry, normalisation = read_image_settings(config, folder, task.name)
    content = json.dumps([asdict(geometry), asdict(normalisation)], sort_keys=True)
    return ImageEncoder(geometry, normalisation, hashlib.sha256(content.encode()).hexdigest())


def image_files(split: RawSplit) -> Iterator[bytes]:
    """Each row's image as the bytes of a file: as it is stored, or a PNG file of what has been turned.

    Raises:
        InputError: a row has no image, or its file cannot be read, or not be decoded where it is turned.
    """
    for row, value in enumerate(_values(split)):
        if split.turns is None:
            yield _file_bytes(split, row, value)
        else:
            buffer = io.BytesIO()
            _decode(split, row, value).save(buffer, "PNG")
            yield buffer.getvalue()


def _enlarge(pixels: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """uint8 ``[b, H, W, 3]`` at the backbone's size, within a level of what Pillow makes of it."""
    size = geometry.resized(pixels.shape[1], pixels.shape[2])
    mode = INTERPOLATIONS[geometry.resample]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    smooth = mode != "nearest-exact"
    images = F.interpolate(images, size=size, mode=mode, antialias=smooth)
    top, left = geometry.corner(*size)
    images = images[:, :, top : top + geometry.height, left : left + geometry.width]
    enlarged: NDArray[np.uint8] = images.permute(0, 2, 3, 1).numpy()
    return enlarged


def _values(split: RawSplit) -> Iterator[object]:
    """Each row's image as stored: a mapping of bytes and path, bytes, or a path."""
    (column,) = split.task.columns
    for table in split.data.with_format("arrow").iter(BATCH):
        yield from table.column(column).to_pylist()


def _file_bytes(split: RawSplit, row: int, value: object) -> bytes:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if isinstance(value, bytes):
        data = value
    if isinstance(data, bytes):
        return data
    if not isinstance(path, str):
        kind = "nothing" if value is None or path is None else type(value).__name__
        raise InputError(f"{split.where(row)} has no image: its column holds {kind}; allowed are image files")
    try:
        return (split.folder / path).read_bytes()
    except OSError as error:
        raise InputError(f"{split.where(row)}: {path!r} cannot be read: {error.strerror}") from error


@contextmanager
def _decoding(split: RawSplit, row: int) -> Iterator[None]:
    """Turns what Pillow raises into an InputError that names the row."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{split.where(row)} is not an image that Pillow can decode") from error


def _opened(split: RawSplit, row: int, value: object) -> Image.Image:
    image = Image.open(io.BytesIO(_file_bytes(split, row, value)))
    if image.mode[0] in "IF":
        raise InputError(f"{split.where(row)} has pixels of mode {image.mode}; allowed are 8 bits per channel")
    return image


def _size(split: RawSplit, row: int, value: object) -> tuple[int, int]:
    """Height and width as turned, from the file's header where the format allows it."""
    with _decoding(split, row):
        image = _opened(split, row, value)
        lies = image.getexif().get(ORIENTATION, 1) >= 5
        if split.turns is not None and split.turns[row] % 2:
            lies = not lies
        return (image.width, image.height) if lies else (image.height, image.width)


def _decode(split: RawSplit, row: int, value: object) -> Image.Image:
    """The whole image in RGB, turned."""
    with _decoding(split, row):
        image = ImageOps.exif_transpose(_opened(split, row, value)).convert("RGB")
    turns = 0 if split.turns is None else int(split.turns[row])
    return image.transpose(QUARTER_TURNS[turns - 1]) if turns else image
