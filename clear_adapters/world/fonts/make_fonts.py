"""Makes the four typefaces of this folder from Debian packages; run by hand, never by the library.

    apt-get download fonts-dejavu-core fonts-roboto-slab fonts-courier-prime fonts-comic-neue
    for d in *.deb; do dpkg -x "$d" unpacked; done
    python make_fonts.py unpacked

Each face is cut to printable ASCII and renamed, as LICENSE.md beside this file explains. Needs fontTools.
"""

import sys
from pathlib import Path

SOURCES = {
    "sans": ("World Sans", "truetype/dejavu/DejaVuSans-Bold.ttf"),
    "slab": ("World Slab", "opentype/roboto/slab/RobotoSlab-Bold.otf"),
    "type": ("World Typewriter", "opentype/courier-prime/Courier Prime Bold.otf"),
    "hand": ("World Hand", "opentype/comic-neue/ComicNeue-Bold.otf"),
}
LICENCE_NAMES = (0, 13, 14)
"""Entries of a font's name table that are kept: copyright, licence, address of the licence."""


def make(source: Path, family: str, target: Path) -> None:
    """Writes one subset and renamed font.

    Args:
        source: The original font file.
        family: Its new family name.
        target: Where to write.
    """
    from fontTools import subset  # type: ignore[import-untyped]
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    options = subset.Options(
        hinting=False, name_IDs=[*LICENCE_NAMES], notdef_outline=True, layout_features=[]
    )
    font = TTFont(source, recalcTimestamp=False)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=range(0x20, 0x7F))
    cutter.subset(font)
    postscript = family.replace(" ", "")
    for entry, text in {
        1: family,
        2: "Bold",
        3: f"{postscript}-subset",
        4: f"{family} Bold",
        6: f"{postscript}-Bold",
    }.items():
        font["name"].setName(text, entry, 3, 1, 0x409)
    if "CFF " in font:
        cff = font["CFF "].cff
        cff.fontNames = [f"{postscript}-Bold"]
        for key, value in {"FamilyName": family, "FullName": f"{family} Bold"}.items():
            if hasattr(cff.topDictIndex[0], key):
                setattr(cff.topDictIndex[0], key, value)
    font.save(target)


if __name__ == "__main__":
    root = Path(sys.argv[1]) / "usr/share/fonts"
    for short, (name, path) in SOURCES.items():
        make(root / path, name, Path(__file__).parent / f"{short}{Path(path).suffix}")
