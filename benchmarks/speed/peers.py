"""Pictures a second of imagecorruptions and albumentations, where they have a corruption of ours.

    python -m venv peers && peers/bin/pip install 'setuptools<81' imagecorruptions albumentations
    peers/bin/python benchmarks/speed/peers.py runs/pictures.npz --output runs/peers.json

In an environment of its own: imagecorruptions needs an old setuptools. builder.py writes the pictures and lays the
numbers beside ours. (imagecorruptions' gaussian_blur does not run with a current scikit-image.) Strengths are as near to ours at high as the libraries have them; imagecorruptions has five levels, of which it is the fifth.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from pictures import rate

IMAGECORRUPTIONS = {
    "motion_blur": "motion_blur",
    "jpeg_compression": "jpeg_compression",
    "gaussian_noise": "gaussian_noise",
    "hsv_saturation": "saturate",
}
ALBUMENTATIONS = {
    "lens_blur": ("GaussianBlur", {"sigma_limit": (18, 18), "blur_limit": (101, 101)}),
    "lens_flare": ("RandomSunFlare", {"num_flare_circles_range": (29, 30)}),
    "motion_blur": ("MotionBlur", {"blur_limit": (27, 27)}),
    "hsv_saturation": ("HueSaturationValue", {"sat_shift_limit": (-90, -90)}),
    "jpeg_compression": ("ImageCompression", {"quality_range": (14, 14)}),
    "dark_illumination": ("RandomBrightnessContrast", {"brightness_limit": (-0.81, -0.81)}),
    "gaussian_noise": ("GaussNoise", {"std_range": (0.265, 0.265)}),
    "sharpness_change": ("Sharpen", {"alpha": (0.3, 0.3)}),
}


def by_imagecorruptions(name: str, picture: np.ndarray) -> np.ndarray:
    import imagecorruptions

    return imagecorruptions.corrupt(picture, corruption_name=name, severity=5)


def by_albumentations(name: str, settings: dict, picture: np.ndarray) -> np.ndarray:
    import albumentations

    return getattr(albumentations, name)(p=1.0, **settings)(image=picture)["image"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    found: dict[str, dict[str, dict[str, object]]] = {}
    for ours, theirs in IMAGECORRUPTIONS.items():
        speed = rate(partial(by_imagecorruptions, theirs), args.pictures, args.processes)
        found.setdefault(ours, {})["imagecorruptions"] = {"name": theirs, "rate": round(speed, 1)}
        print(f"{ours:24s} imagecorruptions {theirs:22s} {speed:8.1f}", flush=True)
    for ours, (theirs, settings) in ALBUMENTATIONS.items():
        speed = rate(partial(by_albumentations, theirs, settings), args.pictures, args.processes)
        found.setdefault(ours, {})["albumentations"] = {"name": theirs, "rate": round(speed, 1)}
        print(f"{ours:24s} albumentations   {theirs:22s} {speed:8.1f}", flush=True)
    versions = {name: metadata.version(name) for name in ("imagecorruptions", "albumentations", "numpy")}
    args.output.write_text(
        json.dumps({"rates": found, "versions": versions, "processes": args.processes}, indent=2) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
