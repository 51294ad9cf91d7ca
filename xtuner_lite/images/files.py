"""Image files: found below their folder and nowhere else, opened with limits, brought to RGB."""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

#: Pixels of the largest image that is decoded: PIL's own border of a decompression bomb.
MAX_PIXELS = 89_478_485
#: Bytes of the largest file that is read.
MAX_BYTES = 100_000_000
#: Formats that Pillow hands to an interpreter (Ghostscript): files must not make us run programs.
_PROGRAMS = ("EPS",)
_DATA_PREFIX = "data:"
_URL_PREFIXES = ("http://", "https://", "ftp://", "s3://")


class ImageError(ValueError):
    """An image that cannot be used; says which and why."""


def is_data_uri(name: str) -> bool:
    """Whether a name holds the image itself (``data:image/png;base64,...``)."""
    return name[: len(_DATA_PREFIX)].lower() == _DATA_PREFIX


def is_web_address(name: str) -> bool:
    """Whether a name is an address, which nothing here fetches."""
    return name.lower().startswith(_URL_PREFIXES)


@dataclass(frozen=True)
class ImageFiles:
    """Opens the images that rows name.

    A name is a path below ``folder``, or a data URI (``data:image/png;base64,...``). Web addresses
    are refused: a training run fetches nothing that its data tells it to.

    Args:
        folder: all paths lie below it, absolute ones too. Links inside it are followed.
        max_pixels: width x height of the largest image that is decoded.
    """

    folder: Path
    max_pixels: int = MAX_PIXELS

    def path_of(self, name: str) -> Path:
        """Where a named file lies.

        Raises:
            ImageError: the name leads out of the folder, or is a web address.
        """
        if is_web_address(name):
            raise ImageError(
                f"{shown_name(name)} is a web address, which is not fetched; download the image "
                "into image_folder and name the file"
            )
        root = os.path.abspath(self.folder)
        path = os.path.abspath(os.path.join(root, name.removeprefix("file://")))
        if os.path.commonpath([root, path]) != root:
            raise ImageError(
                f"{shown_name(name)} lies outside image_folder ({self.folder}); put the image "
                "below it, or set image_folder to a folder above both"
            )
        return Path(path)

    def check(self, name: str) -> None:
        """Looks at an image's first bytes, so that a missing one is told before it is needed.

        Raises:
            ImageError: as ``size``, but that damage behind the head is not seen.
        """
        with self._opened(name):
            pass

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) in pixels, turned as the camera was held; the whole file is decoded once.

        Raises:
            ImageError: the image is missing, empty, damaged, too large or no image.
        """
        with self._opened(name) as image:
            # JPEG decoders can go through the file at an eighth of the size, which finds what is
            # cut off or damaged as well, and is much faster.
            width, height = image.size
            image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))
            image.load()
            return (height, width) if _orientation(image) in _TURNED else (width, height)

    def open(self, name: str, size: tuple[int, int] | None = None) -> Image.Image:
        """The image in RGB, upright; of several frames the first, on white where transparent.

        Args:
            name: path or data URI.
            size: what ``size`` said when the data was prepared.

        Raises:
            ImageError: as ``size``; or it has another size now.
        """
        with self._opened(name) as image:
            image.load()
            picture = to_rgb(image)
        if size is not None and picture.size != tuple(size):
            raise ImageError(
                f"{shown_name(name)} is {picture.size[0]}x{picture.size[1]} pixels and was "
                f"{size[0]}x{size[1]} when the data was prepared; put the old file back, or "
                "prepare the data again (another cache folder, or cache=False)"
            )
        return picture

    @contextmanager
    def _opened(self, name: str) -> Iterator[Image.Image]:
        from PIL import Image, UnidentifiedImageError

        try:
            source = self._source(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's hints on bombs and odd metadata
                with Image.open(source) as image:
                    if image.format in _PROGRAMS:
                        raise ImageError(
                            f"{shown_name(name)} is a {image.format} file, a program that draws an "
                            "image and is not run; save it as PNG or JPEG"
                        )
                    pixels = image.size[0] * image.size[1]
                    if pixels > self.max_pixels:
                        raise ImageError(
                            f"{shown_name(name)} has {image.size[0]}x{image.size[1]} pixels; at "
                            f"most {self.max_pixels:,} are decoded: make it smaller"
                        )
                    yield image
        except UnidentifiedImageError as error:
            raise ImageError(f"{shown_name(name)} is no image that Pillow can read") from error
        except Image.DecompressionBombError as error:
            raise ImageError(f"{shown_name(name)} is too large to be decoded: {error}") from error
        except ImageError:
            raise
        except OSError as error:  # a name too long, a folder that may not be read, a damaged file
            what = f"read: {error.strerror}" if error.strerror else f"decoded: {error}"
            raise ImageError(f"{shown_name(name)} cannot be {what}") from error
        # Decoders of damaged files raise anything: SyntaxError, struct.error, RuntimeError, ...
        except Exception as error:
            raise ImageError(f"{shown_name(name)} cannot be decoded: {error}") from error

    def _source(self, name: str) -> Path | io.BytesIO:
        if is_data_uri(name):
            return io.BytesIO(_decoded(name))
        path = self.path_of(name)
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise ImageError(
                f"{shown_name(name)} {what} in image_folder ({self.folder}); correct the path in "
                "the row, or image_folder"
            )
        num_bytes = path.stat().st_size
        if num_bytes == 0:
            raise ImageError(f"{shown_name(name)} is empty (0 bytes)")
        if num_bytes > MAX_BYTES:
            raise ImageError(
                f"{shown_name(name)} has {num_bytes:,} bytes; at most {MAX_BYTES:,} are read"
            )
        return path


def _decoded(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(
            f"{shown_name(uri)} is a data URI without base64; allowed: data:image/png;base64,..."
        )
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError(f"{shown_name(uri)} holds more than {MAX_BYTES:,} bytes")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{shown_name(uri)}: its base64 is damaged: {error}") from error
    if not data:
        raise ImageError(f"{shown_name(uri)} is empty (0 bytes)")
    return data


def image_name(image: Any) -> str:
    """A name for what a row gives as an image: its path, or a data URI of its pixels.

    Args:
        image: path, data URI, PIL image, bytes of a file, or datasets' {"bytes": ..., "path": ...}.

    Raises:
        ImageError: something else.
    """
    if isinstance(image, os.PathLike):
        return os.fspath(image)
    if isinstance(image, str):
        return image
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
        return image_name(image)
    if isinstance(image, bytes):
        return _as_uri(image, "octet-stream")
    from PIL import Image

    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, format="PNG", compress_level=1)
        return _as_uri(buffer.getvalue(), "png")
    raise ImageError(
        f"the image is a {type(image).__name__} ({image!r:.40}); allowed: a path, a PIL image, "
        "bytes, or a data URI"
    )


def _as_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright by its EXIF note; transparent parts on white, 16-bit greys scaled to 8."""
    from PIL import Image

    image.load()  # decoders of some formats turn the image themselves
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I"):  # 16-bit greys, which convert() would cut off at 255
        low, high = image.getextrema()
        if low < 0 or high > 255:
            image = image.convert("I").point(lambda value: value / 257).convert("L")
    upright = image
    if turn is not None:
        upright = image.transpose(Image.Transpose[turn])
        for note in _NOTES:  # or whoever gets it would turn it again
            upright.info.pop(note, None)
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        picture = upright.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return upright.convert("RGB")


_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # values of the EXIF orientation that swap width and height
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
_NOTES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8; 1 where the note about it is damaged: the pixels are not."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # as decoders of images, its reader raises anything
        return 1
    return value if value in _UPRIGHT else 1


def shown_name(name: str) -> str:
    """The name, short: data URIs are long."""
    return name if len(name) <= 120 else f"{name[:60]}...({len(name):,} characters)"
