"""ImageFiles: what is opened, how it comes out, and what is refused."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest

from tests.vision_parts import picture
from xtuner_lite.images.files import ImageError, ImageFiles, image_name, to_rgb


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    return ImageFiles(tmp_path / "images")


def save(files, name, image, **options):
    path = files.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return name


def test_size_and_pixels_of_a_plain_file(files):
    name = save(files, "deep/a.png", picture((10, 20, 30), (5, 7)))
    assert files.size(name) == (5, 7)
    image = files.open(name, (5, 7))
    assert image.mode == "RGB"
    assert image.size == (5, 7)
    assert image.getpixel((0, 0)) == (10, 20, 30)
    assert files.size(str(files.folder / name)) == (5, 7)  # an absolute path below the folder


@pytest.mark.parametrize(
    "name", ["../secret.png", "deep/../../secret.png", "/etc/passwd", "file:///etc/passwd"]
)
def test_a_path_out_of_the_folder_is_refused(files, tmp_path, name):
    picture().save(tmp_path / "secret.png")
    with pytest.raises(ImageError, match="lies outside image_folder"):
        files.size(name)


def test_a_neighbour_with_the_same_beginning_is_outside(files, tmp_path):
    (tmp_path / "images2").mkdir()
    picture().save(tmp_path / "images2" / "a.png")
    with pytest.raises(ImageError, match="lies outside"):
        files.size(str(tmp_path / "images2" / "a.png"))


def test_a_web_address_is_refused(files):
    with pytest.raises(ImageError, match="is a web address, which is not fetched"):
        files.size("https://example.org/a.png")


def test_missing_and_empty_files_are_named(files):
    with pytest.raises(ImageError, match=r"a\.png does not exist in image_folder"):
        files.size("a.png")
    (files.folder / "a.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"a\.png is empty"):
        files.size("a.png")
    (files.folder / "folder").mkdir()
    with pytest.raises(ImageError, match="is no file"):
        files.size("folder")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300 + ".png", "a\0b.png", "a\udc80.png", ""])
def test_a_name_that_can_be_no_file_is_one_bad_image(files, name):
    """Bare base64 in the place of a path, as other programs write it, is the first."""
    with pytest.raises(ImageError):
        files.size(name)


def test_a_format_that_is_a_program_is_not_run(files, monkeypatch):
    """Pillow would start Ghostscript."""
    from PIL import EpsImagePlugin

    save(files, "a.png", picture(), format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it was run"))
    for read in (files.size, files.open):
        with pytest.raises(ImageError, match="EPS file, a program that draws"):
            read("a.png")


def test_whatever_a_decoder_raises_is_a_bad_image(files, monkeypatch):
    """Damaged AVIF files raise RuntimeError, damaged notes struct.error."""
    from PIL import ImageFile

    def fail(image):
        raise RuntimeError("Failed to decode frame 0")

    save(files, "a.png", picture())
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    for read in (files.size, files.open):
        with pytest.raises(ImageError, match=r"a\.png cannot be decoded: Failed to decode frame 0"):
            read("a.png")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_found(files, format):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=format)
    data = buffer.getvalue()
    (files.folder / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="cut cannot be decoded|cut is no image"):
        files.size("cut")


def test_text_called_png_is_no_image_and_a_png_called_jpg_is_one(files):
    (files.folder / "a.png").write_text("<html>not found</html>")
    with pytest.raises(ImageError, match="is no image that Pillow can read"):
        files.size("a.png")
    save(files, "b.jpg", picture(size=(3, 4)), format="PNG")
    assert files.size("b.jpg") == (3, 4)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(files):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    (files.folder / "bomb.png").write_bytes(data + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match="too large|at most"):
        files.size("bomb.png")
    small = ImageFiles(files.folder, max_pixels=100)
    save(files, "a.png", picture(size=(11, 10)))
    with pytest.raises(ImageError, match="11x10 pixels; at most 100"):
        small.size("a.png")


def test_transparent_parts_come_out_white(files):
    image = picture((0, 0, 0, 0), (2, 1), "RGBA")
    image.putpixel((1, 0), (255, 0, 0, 255))
    name = save(files, "a.png", image)
    opened = files.open(name)
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]
    paletted = save(
        files, "b.gif", image.convert("P"), transparency=image.convert("P").getpixel((0, 0))
    )
    assert files.open(paletted).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_greys_are_scaled_and_not_cut_off():
    from PIL import Image

    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_cmyk_grey_and_one_pixel_are_read(files):
    for name, mode, color in (
        ("c.jpg", "CMYK", (0, 255, 255, 0)),
        ("l.png", "L", 7),
        ("1.png", "1", 1),
    ):
        opened = files.open(save(files, name, picture(color, (1, 1), mode)))
        assert opened.mode == "RGB"
        assert opened.size == (1, 1)
    assert files.open("l.png").getpixel((0, 0)) == (7, 7, 7)


def test_of_an_animation_the_first_frame_counts(files):
    frames = [picture("red"), picture("blue")]
    save(files, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert files.open("a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_taken_sideways_is_turned(files):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    name = save(files, "a.jpg", picture(size=(40, 30)), exif=exif)
    assert files.size(name) == (30, 40)
    assert files.open(name, (30, 40)).size == (30, 40)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("held", range(1, 9))
def test_all_ways_of_holding_a_camera(files, format, held):
    """As Pillow turns it, and with nothing left that would turn it once more."""
    from PIL import Image, ImageOps

    exif = Image.Exif()
    exif[0x0112] = held
    image = picture("white", size=(40, 30))
    image.paste((0, 0, 0), (0, 0, 9, 9))
    name = save(files, "a", image, format=format, exif=exif)
    with Image.open(files.folder / name) as opened:
        wanted = ImageOps.exif_transpose(opened).convert("RGB")
    found = files.open(name, files.size(name))
    assert np.array_equal(np.asarray(found), np.asarray(wanted))
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(found)), np.asarray(wanted))


def test_a_damaged_note_of_the_camera_does_no_harm(files):
    """A tag of a wrong type, which Pillow reads and cannot write: it fails to turn the image."""
    short, ascii = 3, 2
    tags = struct.pack("<HHHI4s", 2, 0x0112, short, 1, b"\6\0\0\0")  # 2 tags; to be turned
    tags += struct.pack("<HHI4s", 0x0102, ascii, 4, b"abc\0")  # bits per sample: a text
    note = b"Exif\0\0II*\0\x08\0\0\0" + tags + b"\0" * 4
    name = save(files, "a.jpg", picture(size=(40, 30)), exif=note)
    assert files.open(name, files.size(name)).size == (30, 40)


def test_another_size_than_when_prepared_is_an_error(files):
    save(files, "a.png", picture(size=(4, 4)))
    with pytest.raises(ImageError, match="is 4x4 pixels and was 8x8 when the data was prepared"):
        files.open("a.png", (8, 8))


def test_data_uris(files):
    name = image_name(picture("blue", (3, 2)))
    assert name.startswith("data:image/png;base64,")
    assert files.size(name) == (3, 2)
    assert files.open(name).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ImageError, match="without base64"):
        files.size("data:image/png,abc")
    with pytest.raises(ImageError, match="base64 is damaged"):
        files.size("data:image/png;base64,@@@@")
    with pytest.raises(ImageError, match="is empty"):
        files.size("data:image/png;base64,")
    text = base64.b64encode(b"hello").decode()
    with pytest.raises(ImageError, match="no image"):
        files.size(f"data:image/png;base64,{text}")


def test_names_of_what_rows_give(tmp_path):
    buffer = io.BytesIO()
    picture().save(buffer, format="PNG")
    assert image_name("a.png") == "a.png"
    assert image_name(tmp_path / "a.png") == str(tmp_path / "a.png")
    assert image_name({"bytes": None, "path": "a.png"}) == "a.png"
    assert ImageFiles(tmp_path).size(image_name({"bytes": buffer.getvalue(), "path": None})) == (
        40,
        30,
    )
    with pytest.raises(ImageError, match="the image is a int"):
        image_name(3)
