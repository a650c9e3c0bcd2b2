"""The bands of Sentinel-2: their places in the spectrum, the names that they go by, and the orders in which files hold them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from modalities.raster_file import ENDINGS


@dataclass(frozen=True)
class Band:
    """A band of the instrument: centre wavelength of Sentinel-2A and native ground sampling distance."""

    wavelength_nm: float
    resolution_m: float


BANDS = {
    "B01": Band(442.7, 60),
    "B02": Band(492.4, 10),
    "B03": Band(559.8, 10),
    "B04": Band(664.6, 10),
    "B05": Band(704.1, 20),
    "B06": Band(740.5, 20),
    "B07": Band(782.8, 20),
    "B08": Band(832.8, 10),
    "B8A": Band(864.7, 20),
    "B09": Band(945.1, 60),
    "B10": Band(1373.5, 60),
    "B11": Band(1613.7, 20),
    "B12": Band(2202.4, 20),
}
"""The 13 bands in the order of the product (ESA, Sentinel-2 MSI spectral responses, S2A)."""

WORDS = {
    "coastal": "B01",
    "coastalaerosol": "B01",
    "blue": "B02",
    "green": "B03",
    "red": "B04",
    "rededge1": "B05",
    "rededge2": "B06",
    "rededge3": "B07",
    "nir": "B08",
    "nir08": "B8A",
    "nirnarrow": "B8A",
    "narrownir": "B8A",
    "nir09": "B09",
    "watervapour": "B09",
    "watervapor": "B09",
    "cirrus": "B10",
    "swir1": "B11",
    "swir16": "B11",
    "swir2": "B12",
    "swir22": "B12",
}
"""Common names in band descriptions (STAC's `eo:common_name` and what GDAL's users write), without spaces."""

_CODE = re.compile(r"b(?:and)?[ _-]?0?([1-9]|1[0-2]|8a)", re.IGNORECASE)
_IN_FILE_NAME = re.compile(r"(?:^|[^a-z0-9])(b(?:and)?0?(?:[1-9]|1[0-2]|8a))(?:_(?:10|20|60)m)?(?=$|[ _-]*\([^()]*\)$)", re.IGNORECASE)

ORDERS = {
    "l1c13": tuple(BANDS),
    "l2a12": tuple(name for name in BANDS if name != "B10"),
    "eurosat13": (*(name for name in BANDS if name != "B8A"), "B8A"),
    "land10": ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
    "hls6": ("B02", "B03", "B04", "B8A", "B11", "B12"),
}
"""Orders in which files without names hold the bands: of the product at either level, of EuroSAT, without the 60 m bands, of HLS."""


def band_name(text: str) -> str | None:
    """The band that a description or a file name speaks of, as `B02` or `B8A`; None when it names none for sure.

    Understood are a code by itself or before other words (`B2`, `b02`, `band 2`, `B4, central wavelength 665 nm`), a
    code at the end of a file name (`T48QUE_20200223_B02_10m.jp2`, `…_L2A_B8A_(Raw).tiff`) and the words of `WORDS`.
    """
    words = text.strip().lower()
    common = WORDS.get(re.sub(r"[ _-]", "", words))
    if common:
        return common
    found = re.match(_CODE.pattern + r"(?=$|[\s,:;(_]| - )", words)
    if found:
        return _canonical(found[1])
    split = split_band(Path(text).stem if Path(text).suffix.lower() in ENDINGS else text)
    return split[0] if split and not band_name(split[1]) else None


def split_band(stem: str) -> tuple[str, str] | None:
    """The band at the end of a file name without ending, and the rest that the files of one scene share."""
    found = _IN_FILE_NAME.search(stem)
    if not found:
        return None
    code = _CODE.fullmatch(found[1])
    rest = stem[: found.start()] + stem[found.end() :]
    return (_canonical(code[1]), rest.strip("_-. ")) if code else None


def split_classes(stem: str) -> str | None:
    """What the name of a scene classification without ending (`T33_SCL_20m`) has in common with its bands' names; None for others."""
    found = re.fullmatch(r"(.*?)(?:^|(?<=[^A-Za-z0-9]))SCL(?:_(?:10|20|60)m)?", stem, re.IGNORECASE)
    return found[1].strip("_-. ") if found else None


def _canonical(number: str) -> str:
    return "B8A" if number.lower() == "8a" else f"B{int(number):02d}"
