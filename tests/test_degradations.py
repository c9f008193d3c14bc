"""The sixteen corruptions: equal to the benchmark's, reproducible, safe on any picture, and growing where `fixed`.

`data/degradations.npz` holds a picture (`input_rgb`) and, under `NAME@INTENSITY`, every third pixel of every third row of
what the authors' code makes of it (RGB), for the corruptions without randomness.
"""

import hashlib
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from clear_adapters import degradations
from clear_adapters.degradations import (
    CATEGORIES,
    SEVERITIES,
    apply,
    catalogue,
    degrade,
    draw,
    intensity_of,
    list_degradations,
)
from clear_adapters.errors import ClearError, ClearTypeError, ClearValueError, ImageError, UnknownNameError

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "degradations.npz"
ENTRIES = {entry.name: entry for entry in list_degradations()}
NAMES = list(ENTRIES)
RANDOM = [name for name in NAMES if ENTRIES[name].random]
LEVELS = tuple(SEVERITIES.values())
FORMULAS = ("legacy", "fixed")

with np.load(GOLDEN) as stored:
    EXPECTED = {key: stored[key] for key in stored}
PHOTO = EXPECTED.pop("input_rgb")


def rng(seed=0):
    return np.random.default_rng(seed)


def speckled(height, width):
    """A picture without two equal neighbours."""
    return rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def damage(name, picture, intensity, formulas, seeds):
    """Mean squared error against the clean picture, over seeds."""
    clean = picture.astype(float)
    return np.mean(
        [((apply(name, picture, intensity, rng(s), formulas) - clean) ** 2).mean() for s in range(seeds)]
    )


# ---------------------------------------------------------------------------------------- the benchmark's formulas


@pytest.mark.parametrize("key", EXPECTED)
def test_equals_the_authors_code(key):
    name, intensity = key.split("@")
    result = apply(name, PHOTO, float(intensity), rng())
    gap = np.abs(result[::3, ::3].astype(int) - EXPECTED[key])
    if name == "jpeg_compression":
        # another build of the codec may round its transforms otherwise, and a level of quantisation is worth several
        assert gap.max() <= 12
        assert gap.mean() < 1
    else:
        assert gap.max() <= 1  # the last rounding only


def test_golden_data_cover_every_corruption_without_randomness():
    assert {key.split("@")[0] for key in EXPECTED} == set(NAMES) - set(RANDOM)
    assert len(EXPECTED) == 3 * (16 - len(RANDOM))


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(RANDOM)))
def test_no_seed_moves_a_corruption_without_randomness(name):
    small = PHOTO[:64, :64]
    for formulas in FORMULAS:
        first, second = (apply(name, small, 0.45, rng(seed), formulas) for seed in (1, 2))
        assert np.array_equal(first, second)


def test_color_diffusion_has_discs_only_above_the_highest_level():
    assert np.array_equal(
        apply("color_diffusion", PHOTO, 0.9, rng(1)), apply("color_diffusion", PHOTO, 0.9, rng(2))
    )
    assert not np.array_equal(
        apply("color_diffusion", PHOTO, 0.95, rng(1)), apply("color_diffusion", PHOTO, 0.95, rng(2))
    )


# ------------------------------------------------------------------------------ distributions of the random ones

GREY = np.full((200, 240, 3), 100, np.uint8)


@pytest.mark.parametrize("intensity", LEVELS)
def test_noise_has_the_stated_spread_and_rounds_down(intensity):
    middle = np.full((200, 200, 3), 128, np.uint8)
    change = apply("gaussian_noise", middle, intensity, rng()).astype(float) - 128
    if intensity < 0.5:  # hardly anything is clipped
        assert change.std() == pytest.approx(75 * intensity, rel=0.02)
        assert change.mean() == pytest.approx(-0.5, abs=0.3)
    assert abs(np.corrcoef(change[..., 0].ravel(), change[..., 1].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize(("intensity", "size"), [(0.23, 6), (0.45, 13), (0.9, 27)])
def test_motion_blur_spreads_a_point_over_its_length_in_any_direction(intensity, size):
    point = np.zeros((61, 61, 3), np.uint8)
    point[30, 30] = 255
    spreads = []
    for seed in range(40):
        ys, xs = np.nonzero(apply("motion_blur", point, intensity, rng(seed))[..., 0] > 2)
        spreads.append((np.ptp(ys) + 1, np.ptp(xs) + 1))
    spreads = np.array(spreads)
    assert spreads.max() <= size
    assert spreads.max(axis=0).min() >= size - 1  # upright and flat ones occur
    assert spreads.min() <= size / 2


@pytest.mark.parametrize(("intensity", "flares"), [(0.23, 9), (0.9, 30)])
def test_flares_add_light_of_their_colour(intensity, flares):
    black = np.zeros((1500, 1500, 3), np.uint8)
    shares = []
    for seed in range(3):
        result = apply("lens_flare", black, intensity, rng(seed))
        top = result.reshape(-1, 3).max(axis=0)
        assert top.tolist() == [
            int(0.9 * intensity * level) for level in (235, 255, 255)
        ]  # RGB: red is the weaker
        shares.append((result[..., 1] > 0).mean())
    disc = np.pi * np.mean(np.arange(10, 51) ** 2) / 1500**2  # a little is hidden, and the rays add a little
    assert np.mean(shares) == pytest.approx(flares * disc, rel=0.45)


@pytest.mark.parametrize(("intensity", "mean"), [(0.23, 7.43), (0.45, 19.54), (0.9, 47.57)])
def test_dirt_is_as_dense_as_the_authors(intensity, mean):
    """The means are those of thirty of the authors' veils; one veil's mean has a standard deviation of about 1."""
    black = np.zeros((400, 400, 3), np.uint8)
    veils = [apply("dirty_lens", black, intensity, rng(seed)).mean() for seed in range(10)]
    assert np.mean(veils) == pytest.approx(mean, abs=1.3)


def test_dirt_greys_a_picture_alike_in_all_channels():
    black = np.zeros((300, 300, 3), np.uint8)
    veils = [apply("dirty_lens", black, level, rng(5)) for level in LEVELS]
    assert all(np.array_equal(veil[..., 0], veil[..., 2]) for veil in veils)
    assert veils[0].mean() < veils[1].mean() < veils[2].mean()
    assert veils[2].max() <= 0.8 * 0.9 * 120 + 1


@pytest.mark.parametrize(("intensity", "block", "swaps"), [(0.23, 11, 8), (0.45, 18, 15), (0.9, 32, 31)])
def test_block_exchange_moves_whole_blocks_and_keeps_them(intensity, block, swaps):
    picture = speckled(20 * block + 3, 20 * block + 5)
    counts = []
    for seed in range(5):
        result = apply("block_exchange", picture, intensity, rng(seed))
        assert np.array_equal(result[20 * block :], picture[20 * block :])  # the rest beside the grid
        cut = [
            [part[y : y + block, x : x + block].tobytes() for y in range(0, 20 * block, block)
             for x in range(0, 20 * block, block)]
            for part in (picture, result)
        ]  # fmt: skip
        assert Counter(cut[0]) == Counter(cut[1])
        counts.append(sum(a != b for a, b in zip(*cut, strict=True)))
    assert max(counts) <= 2 * swaps
    assert np.mean(counts) > 1.6 * swaps


@pytest.mark.parametrize(("intensity", "lines"), [(0.23, 2), (0.45, 4)])
def test_graffiti_draws_its_number_of_coloured_lines(intensity, lines):
    seen = []
    for seed in range(30):
        changed = apply("graffiti", GREY, intensity, rng(seed)).reshape(-1, 3)
        seen.append(len(np.unique(changed, axis=0)) - 1)
    assert max(seen) == lines
    assert np.mean(seen) > lines - 0.5


def test_graffiti_stamps_a_red_word_at_the_high_level_only():
    red = (255, 0, 0)
    tall = np.full((300, 300, 3), 100, np.uint8)
    shares = {
        level: [(apply("graffiti", tall, level, rng(seed)) == red).all(axis=-1).mean() for seed in range(6)]
        for level in LEVELS
    }
    assert min(shares[0.9]) > 0.01
    assert max(shares[0.45]) == 0


def test_graffiti_leaves_the_word_out_of_a_low_picture_but_not_when_fixed():
    low = np.full((60, 300, 3), 100, np.uint8)
    for formulas, expected in (("legacy", 0), ("fixed", 8)):
        stamped = [
            (apply("graffiti", low, 0.9, rng(seed), formulas) == (255, 0, 0)).all(axis=-1).any()
            for seed in range(8)
        ]
        assert sum(stamped) == expected


@pytest.mark.parametrize(("intensity", "rectangles"), [(0.23, 4), (0.9, 14)])
def test_watermark_damage_touches_only_rectangles(intensity, rectangles):
    picture = speckled(600, 800)
    share = []
    for seed in range(3):
        result = apply("watermark_damage", picture, intensity, rng(seed))
        share.append((result != picture).any(axis=-1).mean())
    one = 126 * 51 / (600 * 800)  # mean sides; what overlaps or leaves the picture is less
    assert 0.4 * rectangles * one < np.mean(share) <= 1.2 * rectangles * one


def test_watermark_damage_falls_back_where_rectangles_cover_everything():
    """The benchmark's rectangles cover 50 x 50 whole; nothing is left to fill from, and nothing would change."""
    picture = speckled(50, 50)
    for seed in range(4):
        changed = (apply("watermark_damage", picture, 0.9, rng(seed)) != picture).any(axis=-1).mean()
        assert 0.05 < changed < 1


# --------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("formulas", FORMULAS)
@pytest.mark.parametrize("name", RANDOM)
def test_same_seed_same_picture_other_seed_another(name, formulas):
    picture = PHOTO[:96, :96]
    first = degrade(picture, name, severity="mid", seed=7, formulas=formulas)
    np.random.seed(3)  # the global generator must not matter
    again = degrade(picture, name, severity="mid", seed=7, formulas=formulas)
    other = degrade(picture, name, severity="mid", seed=8, formulas=formulas)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_leaves_the_global_generators_and_the_input_alone():
    before = np.random.get_state()[1].tobytes()
    picture = PHOTO.copy()
    for name in NAMES:
        if name != "mean_shift":
            apply(name, picture, 0.9, rng(1))
            apply(name, picture, 0.9, rng(1), "fixed")
    assert np.random.get_state()[1].tobytes() == before
    assert np.array_equal(picture, PHOTO)


FINGERPRINT = """
import hashlib, sys
import numpy as np
if sys.argv[1] == "1":
    import cv2
    cv2.setNumThreads(1)
from clear_adapters.degradations import degrade, list_degradations
picture = np.random.default_rng(4).integers(0, 256, (150, 170, 3), dtype=np.uint8)
total = hashlib.sha256()
for entry in list_degradations():
    for formulas in ("legacy", "fixed"):
        severity = 0.3 if entry.name == "mean_shift" else "high"
        total.update(degrade(picture, entry.name, severity=severity, seed=5, formulas=formulas).tobytes())
print(total.hexdigest())
"""


def test_another_process_with_another_number_of_threads_gives_the_same_pictures():
    printed = {
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT, threads], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        for threads in ("1", "all")
    }
    assert len(printed) == 1


def test_without_a_name_it_is_the_drawn_one():
    picture = PHOTO[:64, :64]
    for seed in range(6):
        drawn = degrade(picture, severity="high", seed=seed)
        assert drawn.tobytes() == degrade(picture, draw(seed), severity="high", seed=seed).tobytes()
    assert len({draw(seed) for seed in range(40)}) > 8


def test_draws_of_seeds_are_pinned():
    """A change of the streams would silently change every generated set."""
    assert [draw(seed) for seed in range(4)] == [
        "jpeg_compression",
        "jpeg_compression",
        "block_exchange",
        "dirty_lens",
    ]
    numbers = {name: catalogue.generator(0, name).integers(10**6) for name in NAMES}
    assert len(set(numbers.values())) == 16  # no two corruptions share a stream
    assert numbers["graffiti"] == 775065


def test_random_pictures_are_pinned():
    """Integer drawing only, so that no rounding of a filter enters."""
    picture = speckled(120, 130)
    pieces = [apply(name, picture, 0.45, rng(0)).tobytes() for name in ("block_exchange", "graffiti")]
    assert hashlib.sha256(pieces[0]).hexdigest()[:16] == "6c4a89d72889c226"
    assert pieces[1] != picture.tobytes()


class Counting(np.random.Generator):
    """Gives 0, 1, 2, ... where whole numbers below a bound are asked for."""

    def integers(self, bound):
        self.asked = getattr(self, "asked", -1) + 1
        assert self.asked < bound
        return self.asked


@pytest.mark.parametrize(("weights", "field"), [("benchmark", "weight"), ("training", "training_weight")])
def test_draw_follows_the_weights(weights, field):
    source = Counting(np.random.PCG64(0))
    seen = Counter(draw(source, weights) for _ in range(400))
    assert seen == {name: getattr(entry, field) for name, entry in ENTRIES.items()}
    assert len({draw(seed, weights) for seed in range(60)}) > 10


# --------------------------------------------------------------------------------------------- any picture


@pytest.mark.parametrize("formulas", FORMULAS)
@pytest.mark.parametrize("name", NAMES)
def test_every_size_and_intensity_down_to_one_pixel(name, formulas):
    for height, width in ((1, 1), (1, 2), (1, 9), (2, 1), (3, 40), (5, 5), (40, 3)):
        picture = speckled(height, width)
        for intensity in (0, 0.01, 0.23, 0.45, 0.56, 0.9, 0.95, 1):
            result = apply(name, picture, intensity, rng(1), formulas)
            assert result.shape == picture.shape
            assert result.dtype == np.uint8
            assert not np.shares_memory(result, picture)


@pytest.mark.parametrize("formulas", FORMULAS)
@pytest.mark.parametrize("name", NAMES)
def test_small_pictures_are_really_corrupted(name, formulas):
    for height, width in ((8, 8), (8, 30), (11, 15), (33, 20), (49, 60), (50, 50), (75, 60)):
        picture = speckled(height, width)
        for intensity in LEVELS:
            for seed in range(3 if ENTRIES[name].random else 1):
                result = apply(name, picture, intensity, rng(seed), formulas)
                assert (result != picture).any(), (height, width, intensity, seed)


@pytest.mark.parametrize("name", NAMES)
def test_takes_views_and_read_only_arrays(name):
    wide = np.flip(PHOTO[:64, :128:2], axis=1)
    wide.flags.writeable = False
    assert np.array_equal(apply(name, wide, 0.3, rng()), apply(name, wide.copy(), 0.3, rng()))


def test_pictures_in_any_form_give_rgb(tmp_path):
    colour = Image.fromarray(PHOTO[:40, :48])
    colour.save(tmp_path / "photo.png")
    packed = io.BytesIO()
    colour.save(packed, "PNG")
    forms = [
        colour,
        np.asarray(colour),
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        packed.getvalue(),
    ]
    results = [degrade(form, "gaussian_noise", seed=1) for form in forms]
    assert {result.tobytes() for result in results} == {results[0].tobytes()}
    for mode in ("L", "RGBA", "LA", "P", "1", "CMYK", "I;16"):
        result = degrade(
            colour.convert("L").convert(mode) if mode == "I;16" else colour.convert(mode), "lens_blur"
        )
        assert (result.mode, result.size) == ("RGB", (48, 40))


def test_colours_are_taken_as_rgb():
    """A red picture that was read as BGR would come back blue or keep another channel."""
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    for name in ("jpeg_compression", "hsv_saturation"):
        result = apply(name, red, 0.23, rng()).reshape(-1, 3).mean(axis=0)
        assert result.argmax() == 0
        assert abs(result[1] - result[2]) < 5


# --------------------------------------------------------------------------------------------- fixed formulas


@pytest.mark.parametrize("size", [(160, 208), (64, 84), (16, 12)])
@pytest.mark.parametrize("name", NAMES)
def test_fixed_damage_grows_with_severity(name, size):
    picture = cv2.resize(PHOTO, size[::-1], interpolation=cv2.INTER_AREA)
    low, mid, high = (
        damage(name, picture, level, "fixed", 12 if ENTRIES[name].random else 1) for level in LEVELS
    )
    assert 0 < low < mid < high


@pytest.mark.parametrize("name", ["lens_flare", "block_exchange", "watermark_damage"])
def test_fixed_covers_the_same_share_of_small_and_large(name):
    def share(side, formulas):
        picture = speckled(side, side) // 2  # dark enough for a flare to show everywhere
        results = [apply(name, picture, 0.45, rng(seed), formulas) for seed in range(10)]
        return np.mean([(result != picture).any(axis=-1).mean() for result in results])

    large = share(512, "legacy")
    assert share(512, "fixed") == pytest.approx(large, rel=0.3)
    assert share(96, "fixed") == pytest.approx(large, rel=0.5)  # edges are worth more on small things
    assert share(96, "legacy") > 2 * large


@pytest.mark.parametrize("name", NAMES)
def test_fixed_at_zero_is_the_picture(name):
    assert np.array_equal(apply(name, PHOTO, 0, rng(), "fixed"), PHOTO)


@pytest.mark.parametrize("name", NAMES)
def test_the_catalogue_tells_where_fixed_differs(name):
    picture = PHOTO[:100, :100]
    same = np.array_equal(apply(name, picture, 0.9, rng(3)), apply(name, picture, 0.9, rng(3), "fixed"))
    assert same is not ENTRIES[name].fixed_differs


def test_the_catalogue_tells_where_legacy_is_not_monotone():
    """color_diffusion is worst in the middle, sharpness_change alike at all levels; the others grow."""
    low, mid, high = (damage("color_diffusion", PHOTO, level, "legacy", 1) for level in LEVELS)
    assert mid > 1.3 * high
    low, mid, high = (damage("sharpness_change", PHOTO, level, "legacy", 1) for level in LEVELS)
    assert max(low, mid, high) < 1.1 * min(low, mid, high)
    assert {name for name in NAMES if not ENTRIES[name].monotone_in_legacy} == {
        "color_diffusion",
        "sharpness_change",
    }
    for name in NAMES:
        if ENTRIES[name].monotone_in_legacy:
            low, mid, high = (
                damage(name, PHOTO, level, "legacy", 8 if ENTRIES[name].random else 1) for level in LEVELS
            )
            assert low < mid < high, name


@pytest.mark.parametrize("name", ["lens_flare", "dirty_lens", "graffiti", "atmospheric_turbulence"])
def test_fixed_lengths_are_the_benchmarks_on_a_large_picture(name):
    large = cv2.resize(PHOTO, (600, 520))
    ratio = damage(name, large, 0.45, "fixed", 2) / damage(name, large, 0.45, "legacy", 2)
    assert ratio == pytest.approx(1, abs=0.3)


# --------------------------------------------------------------------------------------------- the catalogue


def test_catalogue_is_the_benchmarks():
    by_category = {category: [n for n in NAMES if ENTRIES[n].category == category] for category in CATEGORIES}
    assert by_category == {
        "capture": ["lens_blur", "lens_flare", "motion_blur", "dirty_lens", "hsv_saturation"],
        "transmission": ["jpeg_compression", "block_exchange", "mean_shift", "scan_lines"],
        "environment": ["dark_illumination", "atmospheric_turbulence", "gaussian_noise", "color_diffusion"],
        "post_processing": ["sharpness_change", "graffiti", "watermark_damage"],
    }
    weights = {category: sum(ENTRIES[n].weight for n in names) for category, names in by_category.items()}
    assert weights == dict.fromkeys(CATEGORIES, 100)
    training = {
        category: sum(ENTRIES[n].training_weight for n in names) for category, names in by_category.items()
    }
    assert training == dict.fromkeys(CATEGORIES, 100)
    assert ENTRIES["watermark_damage"].weight == 34
    assert ENTRIES["graffiti"].training_weight == 45
    assert all(entry.description for entry in ENTRIES.values())


def test_every_corruption_has_formulas_with_docstrings_in_its_categorys_module():
    from clear_adapters.degradations import capture, environment, post_processing, transmission

    modules = {m.__name__.rsplit(".", 1)[1]: m for m in (capture, environment, post_processing, transmission)}
    for category, module in modules.items():
        assert set(module.LEGACY) == {name for name in NAMES if ENTRIES[name].category == category}
        assert set(module.FIXED) == {name for name in module.LEGACY if ENTRIES[name].fixed_differs}
        assert all(formula.__doc__ for formula in (*module.LEGACY.values(), *module.FIXED.values()))


def test_listing_does_not_load_opencv_or_torch():
    code = (
        "import sys; from clear_adapters.degradations import list_degradations, draw; list_degradations(); draw(0);"
        "print([name for name in ('cv2', 'torch', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_entries_are_frozen():
    with pytest.raises(AttributeError):
        ENTRIES["graffiti"].weight = 1


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "meant"), [("lens_blurr", "lens_blur"), ("Jpeg", "jpeg_compression"), ("", None), (3, None)]
)
def test_unknown_name(name, meant):
    for call in (lambda: degrade(PHOTO, name), lambda: apply(name, PHOTO, 0.5, rng())):
        with pytest.raises(UnknownNameError) as caught:
            call()
        assert isinstance(caught.value, KeyError)
        if meant:
            assert meant in str(caught.value)


@pytest.mark.parametrize("severity", ["hard", "HIGH", "", -0.01, 1.01, float("nan"), float("inf"), 45])
def test_severity_out_of_range(severity):
    with pytest.raises(ClearValueError, match="severity"):
        degrade(PHOTO, "graffiti", severity=severity)


@pytest.mark.parametrize("severity", [None, True, [0.5], 1j])
def test_severity_of_a_wrong_type(severity):
    with pytest.raises(ClearTypeError, match="severity"):
        degrade(PHOTO, "graffiti", severity=severity)


def test_severities_are_the_benchmarks_levels():
    assert [intensity_of(word) for word in ("low", "mid", "high")] == [0.23, 0.45, 0.9]
    assert intensity_of(np.float32(0.5)) == 0.5
    assert intensity_of(1) == 1.0
    picture = PHOTO[:40, :40]
    assert (
        degrade(picture, "scan_lines", severity="high").tobytes()
        == degrade(picture, "scan_lines", severity=0.9).tobytes()
    )


@pytest.mark.parametrize("formulas", ["Legacy", "new", None, 1])
def test_unknown_formulas(formulas):
    with pytest.raises(ClearValueError, match="legacy"):
        degrade(PHOTO, "graffiti", formulas=formulas)


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_seed_of_a_wrong_type(seed):
    with pytest.raises(ClearTypeError, match="seed"):
        degrade(PHOTO, "graffiti", seed=seed)
    with pytest.raises(ClearTypeError, match="seed"):
        draw(seed)


def test_seed_below_zero_and_unknown_weights():
    with pytest.raises(ClearValueError, match="negative"):
        degrade(PHOTO, seed=-1)
    with pytest.raises(ClearValueError, match="training"):
        draw(0, "train")


def test_large_seeds_differ():
    assert (
        degrade(PHOTO, "graffiti", seed=2**70).tobytes()
        != degrade(PHOTO, "graffiti", seed=2**70 + 1).tobytes()
    )


@pytest.mark.parametrize(
    "thing", [None, 3, b"not an image", b"", "nowhere.png", [PHOTO, PHOTO], PHOTO / 255.0]
)
def test_what_is_no_image(thing):
    with pytest.raises(ClearError):
        degrade(thing, "graffiti")


@pytest.mark.parametrize(
    "array",
    [PHOTO[..., 0], PHOTO.astype(float), PHOTO[:0], np.zeros((4, 4, 4), np.uint8), Image.fromarray(PHOTO)],
)
def test_apply_refuses_other_arrays(array):
    with pytest.raises(ImageError):
        apply("graffiti", array, 0.5, rng())


def test_public_names_exist():
    assert all(hasattr(degradations, name) for name in degradations.__all__)
