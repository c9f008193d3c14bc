"""Every form a picture may come in, and every way it may be wrong."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from clear_adapters import images
from clear_adapters.errors import ClearTypeError, ClearValueError, ImageError
from clear_adapters.images import Pictures, image_size, load_image, load_images

RAMP = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def encoded(image: Image.Image, form: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def pixels(image) -> np.ndarray:
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


@pytest.fixture
def picture():
    return Image.fromarray(RAMP)


def test_every_source_gives_the_same_pixels(picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    data = path.read_bytes()
    for source in (picture, path, str(path), data, bytearray(data), RAMP, np.asfortranarray(RAMP), RAMP[::1]):
        np.testing.assert_array_equal(pixels(source), RAMP)
    np.testing.assert_array_equal(pixels(RAMP[:, ::-1]), RAMP[:, ::-1])


def test_the_result_shares_nothing_with_the_input(picture):
    array = RAMP.copy()
    from_array, from_image = load_image(array), load_image(picture)
    array[:] = 0
    picture.putpixel((0, 0), (9, 9, 9))
    for loaded in (from_array, from_image):
        np.testing.assert_array_equal(np.asarray(loaded), RAMP)


def test_grey_and_alpha_arrays():
    grey = RAMP[..., 0]
    np.testing.assert_array_equal(pixels(grey), np.stack([grey] * 3, axis=-1))
    alpha = np.full((4, 6, 1), 255, np.uint8)
    np.testing.assert_array_equal(pixels(np.concatenate([RAMP, alpha], axis=2)), RAMP)
    alpha[0, 0] = 0
    cut = pixels(np.concatenate([RAMP, alpha], axis=2))
    assert tuple(cut[0, 0]) == (255, 255, 255)
    np.testing.assert_array_equal(cut[1:], RAMP[1:])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
        ("La", (0, 0), (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I;16B", 257 * 100, (100, 100, 100)),
        ("I;16", 100, (0, 0, 0)),
        ("I", 257 * 100, (100, 100, 100)),
        ("I", 100, (100, 100, 100)),
        ("F", 100.4, (100, 100, 100)),
        ("F", 257.0 * 100, (100, 100, 100)),
        ("F", 0.5, (128, 128, 128)),
    ],
)
def test_every_mode(mode, colour, expected):
    assert tuple(pixels(Image.new(mode, (3, 2), colour))[0, 0]) == expected


def test_palettes_with_and_without_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(palette), [[[10, 20, 30], [40, 50, 60]]])
    data = encoded(palette, transparency=0)
    np.testing.assert_array_equal(pixels(data), [[[255, 255, 255], [40, 50, 60]]])


def test_transparent_colour_of_an_rgb_png():
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (9, 9, 9))
    data = encoded(picture, transparency=(1, 2, 3))
    np.testing.assert_array_equal(pixels(data), [[[255, 255, 255], [9, 9, 9]]])


def test_a_sixteen_bit_png_is_scaled_not_clipped():
    deep = np.array([[0, 257, 257 * 128, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(deep)))[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize(("mode", "value"), [("I", -1), ("I", 70_000), ("F", -0.5), ("F", float("nan"))])
def test_a_range_that_cannot_be_told_is_an_error(mode, value):
    with pytest.raises(ImageError, match=r"which of them is white"):
        load_image(Image.new(mode, (3, 2), value))


def test_orientation_is_applied_once(picture):
    # What the camera stored, by orientation, of the picture that should be seen.
    stored = {
        1: RAMP,
        2: RAMP[:, ::-1],
        3: RAMP[::-1, ::-1],
        4: RAMP[::-1],
        5: RAMP.transpose(1, 0, 2),
        6: np.rot90(RAMP, 1),
        7: np.rot90(RAMP, 2).transpose(1, 0, 2),
        8: np.rot90(RAMP, -1),
    }
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(np.ascontiguousarray(array)), exif=exif)
        loaded = load_image(data)
        np.testing.assert_array_equal(np.asarray(loaded), RAMP, err_msg=f"orientation {orientation}")
        np.testing.assert_array_equal(pixels(loaded), RAMP)
        with Image.open(io.BytesIO(data)) as opened:
            np.testing.assert_array_equal(pixels(opened), RAMP)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_is_no_obstacle(picture):
    np.testing.assert_array_equal(pixels(encoded(picture, exif=b"Exif\0\0MM\0*garbage")), RAMP)
    np.testing.assert_array_equal(pixels(encoded(picture, exif=b"Exif\0\0nonsense")), RAMP)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(pixels(data)[0, 0]) == (255, 0, 0)
    with Image.open(io.BytesIO(data)) as opened:
        opened.seek(1)
        assert tuple(pixels(opened)[0, 0]) == (0, 0, 255)
        assert opened.tell() == 1


def test_missing_and_wrong_files_are_named(tmp_path, picture):
    with pytest.raises(ImageError, match=r"No image file at .*nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    with pytest.raises(ImageError, match=r"notes\.txt.* cannot tell the format"):
        load_image(str(text))
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png.*0 bytes"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match="Nothing is downloaded"):
        load_image("https://example.org/a.png")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("a\0b.png")
    with pytest.raises(ImageError, match=r"No image file at|cannot be read") as caught:
        load_image("x" * 5000)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_named(tmp_path, form):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    path = tmp_path / f"cut.{form.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"cut\."):
        load_image(path)


def test_a_damaged_file_never_raises_anything_else(picture):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    random = np.random.default_rng(1)
    refused = 0
    for form in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        data = bytearray(encoded(Image.fromarray(noise), form))
        for _ in range(40):
            broken = bytearray(data)
            for place in random.integers(0, min(len(data), 200), 4):
                broken[place] = random.integers(0, 256)
            try:
                load_image(bytes(broken))
            except ImageError:
                refused += 1
            except Warning:  # Pillow's own remarks, errors under this suite's settings only
                continue
    assert refused > 20


def test_a_closed_image_is_refused(tmp_path, picture):
    path = tmp_path / "picture.png"
    picture.save(path)
    with Image.open(path) as opened:
        pass
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(opened)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0)])
def test_empty_pictures_are_refused(shape):
    with pytest.raises(ImageError, match="is empty"):
        load_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("size", [(30_001, 200), (200, 30_001), (15_000, 15_000)])
def test_absurd_sizes_are_refused_before_decoding(size, monkeypatch):
    picture = Image.new("1", (1, 1))
    monkeypatch.setattr(picture, "_size", size)
    monkeypatch.setattr(picture, "load", lambda: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=f"too large: {size[0]} x {size[1]}"):
        load_image(picture)


def test_a_decompression_bomb_is_refused():
    data = bytearray(encoded(Image.new("1", (1, 1)), "BMP"))
    data[18:22] = data[22:26] = (29_000).to_bytes(4, "little")
    with pytest.raises(ImageError, match="holds more than"):
        load_image(bytes(data))


def test_extreme_shapes_are_refused():
    with pytest.raises(ImageError, match="too thin: 1 x 201"):
        load_image(Image.new("L", (1, 201)))
    assert load_image(Image.new("L", (200, 1))).size == (200, 1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RAMP.astype(np.float32), r"float32 has the wrong type.*round"),
        (RAMP.astype(np.int64), "int64 has the wrong type"),
        (RAMP > 3, "bool has the wrong type"),
        (RAMP[None], r"\(1, 4, 6, 3\).*list\(array\)"),
        (RAMP.transpose(2, 0, 1), r"\(3, 4, 6\).*transpose"),
        (RAMP[..., :1], r"\(4, 6, 1\).*array\[\.\.\., 0\]"),
        (RAMP[..., :2], "wrong shape"),
        (RAMP[0, 0], "wrong shape"),
        (np.uint8(3) * np.ones((), np.uint8), "wrong shape|Not an image"),
    ],
)
def test_wrong_arrays_are_refused(array, message):
    with pytest.raises(ClearValueError, match=message):
        load_image(np.asarray(array))


def test_other_types_are_refused(picture):
    with pytest.raises(ImageError, match="A list of 2 stands where one image"):
        load_image([picture, picture])
    for wrong in (None, 3, {"image": picture}, io.BytesIO()):
        with pytest.raises(ClearTypeError, match="Not an image"):
            load_image(wrong)


def test_one_of_each(picture):
    loaded, questions, single = load_images(picture, "What?")
    assert [image.size for image in loaded] == [(6, 4)]
    assert questions == ["What?"]
    assert single is True


def test_lists_are_paired(picture):
    other = Image.new("RGB", (2, 2))
    loaded, questions, single = load_images((picture, other), ("What?", "Who?"))
    assert [image.size for image in loaded] == [(6, 4), (2, 2)]
    assert questions == ["What?", "Who?"]
    assert single is False
    assert load_images([picture], ["What?"])[2] is False


def test_one_image_with_several_questions(picture):
    loaded, questions, single = load_images(picture, ["What?", "Who?"])
    assert len(loaded) == len(questions) == 2
    assert loaded[0] is loaded[1]
    assert single is False


def test_a_size_is_told_without_decoding(tmp_path, monkeypatch):
    lying, deep = Image.new("RGB", (6, 4)), np.zeros((4, 6), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    given = {"a.png": {}, "b.jpg": {}, "c.jpg": {"exif": turned}, "d.webp": {"exif": turned}, "e.tif": {}}
    for name, options in given.items():
        lying.save(tmp_path / name, **options)
    files = [*(tmp_path / name for name in given), (tmp_path / "c.jpg").read_bytes(), deep]
    expected = [image.size[::-1] for image in Pictures(files).load()]
    assert set(expected) == {(4, 6), (6, 4)}
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert Pictures(files).sizes() == expected
    with Image.open(tmp_path / "c.jpg") as opened:
        assert image_size(opened) == (6, 4)
    for wrong in (tmp_path / "nowhere.png", b"none", np.zeros((2, 2)), Image.new("RGB", (0, 2)), [lying]):
        with pytest.raises(ImageError):
            image_size(wrong)
    with pytest.raises(ClearTypeError, match=r"mine\[1\]: Not an image"):
        Pictures([lying, 3], "mine").sizes()


@pytest.mark.parametrize(
    ("count", "questions", "error", "message"),
    [
        (2, ["What?"], ClearValueError, "2 images came with 1 questions"),
        (0, ["What?"], ImageError, "list of images is empty"),
        (1, [], ClearValueError, "list of questions is empty"),
        (2, "What?", ImageError, "2 images in a list came with a single question"),
        (1, [""], ClearValueError, r"questions\[0\] is empty"),
        (1, [" \n"], ClearValueError, r"questions\[0\] is blank"),
        (1, [3], ClearTypeError, r"questions\[0\] must be a string, not int"),
        (1, None, ClearTypeError, "must be a string, not NoneType"),
    ],
)
def test_pairs_that_cannot_be_made(picture, count, questions, error, message):
    with pytest.raises(error, match=message):
        load_images([picture] * count, questions)


def test_a_single_blank_question_is_refused(picture):
    with pytest.raises(ClearValueError, match="The question is blank"):
        load_images(picture, "  ")


def test_several_images_for_one_question_are_refused(picture):
    with pytest.raises(ImageError, match=r"images\[1\] is a list of 2: several images for one question"):
        load_images([picture, [picture, picture]], ["What?", "Who?"])


def test_a_wrong_image_of_a_list_is_named(picture, tmp_path):
    with pytest.raises(ImageError, match=r"images\[1\]: No image file"):
        load_images([picture, tmp_path / "nowhere.png"], ["What?", "Who?"])
    with pytest.raises(ClearTypeError, match=r"images\[0\]: Not an image"):
        load_images([None, picture], ["What?", "Who?"])


def test_home_folders_are_expanded(tmp_path, monkeypatch, picture):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture.save(tmp_path / "picture.png")
    np.testing.assert_array_equal(pixels(Path("~/picture.png")), RAMP)


def test_limits_are_those_of_pillow():
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) == images.MAX_PIXELS


def test_no_program_is_started_on_bytes_of_unknown_origin(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "picture.png").write_bytes(eps)
    for given in (eps, tmp_path / "picture.png"):
        with pytest.raises(ImageError, match="cannot tell the format"):
            load_image(given)
