"""Small real images that come with ordinary packages, written as the files a user would have. Nothing is downloaded.

`spyndex` carries a Sentinel-2 scene (300×300 pixels, four 10 m bands, reflectance ×10000, no georeference);
`nilearn` the MNI152 2009a T1 template with maps of grey and white matter. Neither package is imported.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning

from modalities.scene import SceneError

SENTINEL_BANDS = ("B02", "B03", "B04", "B08")
TISSUES = ("other", "grey matter", "white matter")


def write_satellite_sample(folder: Path) -> Path:
    """A folder with one GeoTIFF of four named bands.

    Raises:
        SceneError: The package that carries the sample is not installed.
    """
    import warnings

    source = _inside("spyndex", "data/S2_10m.json")
    pixels = np.asarray(json.loads(source.read_text()), dtype=np.uint16)
    images = folder / "satellite"
    images.mkdir(parents=True, exist_ok=True)
    shape = {"count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2], "dtype": "uint16"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(images / "scene.tif", "w", driver="GTiff", compress="deflate", **shape) as out:
            out.write(pixels)
            out.descriptions = SENTINEL_BANDS
    return images


def write_mri_sample(folder: Path) -> tuple[Path, Path]:
    """A folder with a T1 volume, and one with its tissue labels: 0 other, 1 grey, 2 white matter, where a map exceeds one half.

    Raises:
        SceneError: The package that carries the sample is not installed.
    """
    names = {kind: f"datasets/data/mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")}
    paths = {kind: _inside("nilearn", name) for kind, name in names.items()}
    images, labels = folder / "mri" / "images", folder / "mri" / "labels"
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(paths["t1"], images / "mni152_T1w.nii.gz")
    grey, white = (nib.load(paths[kind]) for kind in ("gm", "wm"))
    share = np.stack([np.asarray(image.dataobj, dtype=np.float32) / 255 for image in (grey, white)])
    tissue = np.where(share.max(axis=0) >= 0.5, share.argmax(axis=0) + 1, 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(tissue, grey.affine), labels / "mni152_T1w.nii.gz")
    return images, labels


def _inside(package: str, name: str) -> Path:
    """A file that an installed package carries."""
    found = find_spec(package)
    places = list(found.submodule_search_locations or []) if found else []
    for place in places:
        if (Path(place) / name).is_file():
            return Path(place) / name
    raise SceneError(f"the sample data of {package} are not here; install them with: pip install 'terravox[samples]'")
