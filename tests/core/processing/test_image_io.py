"""Image files of all modes and formats: the right colours, or an error that says what to do."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from janus_modular.errors import ImageError
from janus_modular.processing.image_io import open_image, to_image


def file_of(image: Image.Image, format_name: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format_name, **options)
    return out.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that claim to be a huge image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def photo() -> Image.Image:
    ramp = np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3) * 7 % 256
    return Image.fromarray(ramp.astype(np.uint8))


def test_path_bytes_and_image_are_the_same(photo: Image.Image, tmp_path: Path) -> None:
    data = file_of(photo, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png", str(tmp_path / "a.png"), photo):
        assert open_image(source).tobytes() == photo.tobytes()


def test_exif_orientation_is_applied(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    image = open_image(file_of(photo, "PNG", exif=exif))
    assert image.size == (48, 64)
    assert image.tobytes() == photo.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_cmyk() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert open_image(red).getpixel((5, 5)) == (255, 0, 0)
    r, g, b = open_image(file_of(red, "JPEG")).getpixel((5, 5))
    assert r > 240
    assert max(g, b) < 15  # JPEG is lossy


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.array([[0, 257 * 100, 65535, 300]], np.uint16)
    for source in (
        Image.fromarray(grey),
        file_of(Image.fromarray(grey), "PNG"),
        file_of(Image.fromarray(grey), "TIFF"),
    ):
        assert np.asarray(open_image(source))[0, :, 0].tolist() == [0, 100, 255, 1]
    wide = Image.fromarray(grey.astype(np.int32))
    assert np.asarray(open_image(wide))[0, :, 1].tolist() == [0, 100, 255, 1]


def test_modes_without_defined_colours_are_errors() -> None:
    with pytest.raises(ImageError, match="from -1 to 70000"):
        open_image(Image.fromarray(np.array([[-1, 70000]], np.int32)))
    with pytest.raises(ImageError, match="mode F"):
        open_image(Image.fromarray(np.array([[0.5]], np.float32)))


def test_transparent_is_white() -> None:
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (255, 0, 0, 255))
    palette = half.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    for source in (half, file_of(half, "PNG"), file_of(half, "WEBP", lossless=True), file_of(palette, "GIF")):
        image = open_image(source)
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((1, 0)) == (255, 0, 0)
    assert open_image(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "RGBa", "I", "I;16"]
)
def test_every_mode_gives_rgb(mode: str) -> None:
    assert open_image(Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format_name: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    data = file_of(
        frames[0], format_name, save_all=True, append_images=frames[1:], duration=10, lossless=True
    )
    r, g, b = open_image(data).getpixel((4, 4))
    assert r > 240
    assert max(g, b) < 15


def test_extreme_aspect_ratios() -> None:
    assert open_image(Image.new("RGB", (1, 1), "red")).size == (1, 1)
    assert open_image(file_of(Image.new("RGB", (20_000, 10)), "PNG")).size == (20_000, 10)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated(photo: Image.Image, format_name: str) -> None:
    data = file_of(photo, format_name)
    with pytest.raises(ImageError, match=r"damaged|not an image|cannot be opened"):
        open_image(data[: len(data) // 2])


def test_damaged_pil_image(photo: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(file_of(photo, "PNG")[:100])
    with Image.open(tmp_path / "half.png") as image, pytest.raises(ImageError, match=r"half\.png.*damaged"):
        open_image(image)


@pytest.mark.parametrize(
    ("size", "message"), [((12_000, 12_000), "144,000,000 pixels; at most"), ((60_000, 60_000), "too large")]
)
def test_decompression_bomb(size: tuple[int, int], message: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ImageError, match=message):
            open_image(png_claiming(*size))
    assert not caught  # Pillow's warning says less, and shows a line of ours


def test_max_pixels_argument(photo: Image.Image) -> None:
    with pytest.raises(ImageError, match=r"64 x 48 = 3,072 pixels; at most 100 "):
        open_image(photo, max_pixels=100)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(ImageError):
        open_image(data)


def test_paths_without_an_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png' is not there"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="Download it first"):
        open_image("https://example.org/a.png")
    with pytest.raises(ImageError, match="empty"):
        open_image(Image.new("RGB", (0, 3)))


def test_to_image_clips_and_truncates() -> None:
    x = np.zeros((3, 1, 4), np.float32)
    x[:, 0] = [-2.0, -1.0, 0.0, 1.5]
    assert np.asarray(to_image(x))[0, :, 0].tolist() == [0, 0, 127, 255]  # 127.5 is truncated
    assert np.asarray(to_image((x + 1) / 2, value_range=(0, 1)))[0, :, 0].tolist() == [0, 0, 127, 255]
    exact = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    assert (np.asarray(to_image(exact)).transpose(2, 0, 1) == exact).all()
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        to_image(np.zeros((2, 2, 3)))


def test_transparent_16_bit_grey_is_white() -> None:
    grey = Image.fromarray(np.array([[40_000, 1_000]], np.uint16))
    shown = np.asarray(open_image(file_of(grey, "PNG", transparency=40_000)))
    assert shown[0, :, 0].tolist() == [255, 4]


@pytest.mark.parametrize("source", [None, [[0, 0, 0]], 5])
def test_error_names_the_type_of_other_objects(source: object) -> None:
    with pytest.raises(ImageError, match=f"found a {type(source).__name__}; expected an image"):
        open_image(source)


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_formats_that_need_another_program_are_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a path, bytes and an image that is not decoded yet, whatever the file is called."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    Image.new("RGB", (8, 8), "red").save(tmp_path / name, "EPS")
    with Image.open(tmp_path / name) as undecoded:
        for source in (tmp_path / name, (tmp_path / name).read_bytes(), undecoded):
            with pytest.raises(ImageError, match=r"format EPS, .*another program.* Export it as PNG"):
                open_image(source)


def test_windows_metafile_is_an_error() -> None:
    box, inch = struct.pack("<4h", 0, 0, 9, 9), struct.pack("<H", 96)
    metafile = b"\xd7\xcd\xc6\x9a\x00\x00" + box + inch + bytes(6) + b"\x01\x00\t\x00" + bytes(40)
    with pytest.raises(ImageError, match=r"of the format WMF, .*another program"):
        open_image(metafile)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_arrays_are_images(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = open_image(array[:, ::-1])  # no copy in memory's order
    assert (image.mode, image.size) == ("RGB", (7, 5))
    assert image.tobytes() == open_image(Image.fromarray(np.ascontiguousarray(array[:, ::-1]))).tobytes()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 5, 7), np.uint8), r"array \(3, 5, 7\) of uint8; expected .*Put the channels last"),
        (np.zeros((5, 7, 3), np.float32), "of float32; expected uint8.* Scale floats to 0..255"),
        (np.zeros((1, 5, 7, 3), np.uint8), r"array \(1, 5, 7, 3\) of uint8"),
        (np.zeros((0, 7, 3), np.uint8), r"array \(0, 7, 3\)"),
        (np.array("a.png"), r"array \(\) of <U5"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        open_image(array)


@pytest.mark.parametrize("shape", [(20_000, 20_000, 3), (2, 600_000)])
def test_views_of_many_pixels_are_refused_before_they_are_copied(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"the array \(.*pixels; at most"):
        open_image(np.broadcast_to(np.uint8(0), shape))
