"""Sentinel-2 products as the agency lays them out, small: dark water beside bright land, so that their pixels tell what was added."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from modalities.sentinel2_bands import BANDS
from tests.synthetic_rasters import UTM, north_up

TIMES = {"L1C": "20200717T221941", "L2A": "20220413T150759"}
SIZE = 192
"""Rows and columns at 10 m."""

AIR = {"B01": 0.12, "B02": 0.09, "B03": 0.06, "B04": 0.04, "B05": 0.03}
"""What the atmosphere alone reflects, about."""


def reflectance(band: str, level: str) -> NDArray[np.float64]:
    """Water in the upper half and land in the lower, at the band's own resolution; land grows brighter to the east."""
    step = int(BANDS[band].resolution_m / 10)
    rows = columns = SIZE // step
    land = 0.1 + 0.02 * list(BANDS).index(band) + 0.05 * np.arange(columns) / columns
    values = np.where(np.arange(rows)[:, None] < rows // 2, 0.012, land[None, :])
    if band == "B10":
        return np.full((rows, columns), 0.002)
    return values + (AIR.get(band, 0.0) if level == "L1C" else 0.0)


def metadata(
    level: str, offsets: dict[int, int] | None = None, quantification: str = "10000", baseline: str = "02.09", extra: str = ""
) -> str:
    """A product's metadata with nothing but what is read of it."""
    boa, offset = ("", "RADIO_ADD_OFFSET") if level == "L1C" else ("BOA_", "BOA_ADD_OFFSET")
    listed = "".join(f'<{offset} band_id="{number}">{value}</{offset}>' for number, value in (offsets or {}).items())
    time = f"{TIMES[level][:4]}-{TIMES[level][4:6]}-{TIMES[level][6:8]}T{TIMES[level][9:11]}:{TIMES[level][11:13]}:{TIMES[level][13:]}.024Z"
    return f"""<?xml version="1.0" encoding="UTF-8"?>{extra}
<n1:Level-{level[1:]}_User_Product xmlns:n1="urn:x"><n1:General_Info><Product_Info><PRODUCT_START_TIME>{time}</PRODUCT_START_TIME>
<PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE><SENSING_ORBIT_NUMBER>29</SENSING_ORBIT_NUMBER>
<Granule granuleIdentifier="S2A_OPER_MSI_{level}_TL_SGS__20200717T234135_A026481_T33XWJ_N02.09"/></Product_Info>
<Product_Image_Characteristics>
<Special_Values><SPECIAL_VALUE_TEXT>NODATA</SPECIAL_VALUE_TEXT><SPECIAL_VALUE_INDEX>0</SPECIAL_VALUE_INDEX></Special_Values>
<Special_Values><SPECIAL_VALUE_TEXT>SATURATED</SPECIAL_VALUE_TEXT><SPECIAL_VALUE_INDEX>65535</SPECIAL_VALUE_INDEX></Special_Values>
<{boa}QUANTIFICATION_VALUE unit="none">{quantification}</{boa}QUANTIFICATION_VALUE><List>{listed}</List>
</Product_Image_Characteristics></n1:General_Info></n1:Level-{level[1:]}_User_Product>"""


def offsets_of(level: str) -> dict[int, int]:
    """The -1000 that a product since baseline 04.00 lists for each band."""
    return dict.fromkeys((number for number in range(13) if level == "L1C" or number != 10), -1000)


def write_jp2(path: Path, pixels: NDArray[np.generic], resolution: float, east_m: float = 0.0) -> Path:
    """A lossless JPEG 2000 of `(band, row, column)` so far east of the origin of `north_up`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"count": pixels.shape[0], "height": pixels.shape[1], "width": pixels.shape[2], "dtype": pixels.dtype.name}
    options = {"QUALITY": "100", "REVERSIBLE": "YES", "YCBCR420": "NO", "USE_SRC_CODESTREAM": "NO"}
    place = {"crs": UTM, "transform": north_up(resolution, 500_000 + east_m)}
    with rasterio.Env(GDAL_PAM_ENABLED="NO"), rasterio.open(path, "w", driver="JP2OpenJPEG", **shape, **place, **options) as target:
        target.write(pixels)
    return path


def write_safe(folder: Path, level: str, *, added: int = 0, xml: str | None = None, name: str | None = None, east_m: float = 0.0) -> Path:
    """A `.SAFE` folder whose numbers are reflectance · 10000 + `added`, with the images that nobody trains on beside the bands.

    L2A has coarser copies of its bands, a scene classification (cloud in the first 20 m row, else vegetation), a picture and a mask.
    """
    time = TIMES[level]
    product = folder / (name or f"S2A_MSI{level}_{time}_N0209_R029_T33XWJ_20200717T234135.SAFE")
    (product / "GRANULE" / f"{level}_T33XWJ_A026649_{time}").mkdir(parents=True)
    images = product / "GRANULE" / f"{level}_T33XWJ_A026649_{time}" / "IMG_DATA"
    (product / f"MTD_MSI{level}.xml").write_text(xml or metadata(level, offsets_of(level) if added else None), encoding="utf-8")
    (product / "manifest.safe").write_text("<x/>")
    for band, instrument in BANDS.items():
        step = int(instrument.resolution_m)
        if level == "L2A" and band == "B10":
            continue
        numbers = (np.rint(reflectance(band, level) * 1e4) + added).astype(np.uint16)
        if level == "L1C":
            write_jp2(images / f"T33XWJ_{time}_{band}.jp2", numbers[None], step, east_m)
            continue
        write_jp2(images / f"R{step}m" / f"T33XWJ_{time}_{band}_{step}m.jp2", numbers[None], step, east_m)
        if step == 10:
            write_jp2(images / "R20m" / f"T33XWJ_{time}_{band}_20m.jp2", numbers[None, ::2, ::2], 20, east_m)
    if level == "L2A":
        classes = np.full((1, SIZE // 2, SIZE // 2), 4, np.uint8)
        classes[0, 0] = 9
        write_jp2(images / "R20m" / f"T33XWJ_{time}_SCL_20m.jp2", classes, 20, east_m)
        write_jp2(images / "R60m" / f"T33XWJ_{time}_SCL_60m.jp2", classes[:, :32, :32], 60, east_m)
        write_jp2(images / "R10m" / f"T33XWJ_{time}_TCI_10m.jp2", np.full((3, SIZE, SIZE), 7, np.uint8), 10, east_m)
        write_jp2(images.parent / "QI_DATA" / "MSK_CLDPRB_20m.jp2", classes, 20, east_m)
    return product


def zipped(product: Path, archive: Path) -> Path:
    """A zip of a product as it is downloaded: the product's folder at the top."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for file in sorted(product.rglob("*")):
            target.write(file, f"{product.name}/{file.relative_to(product).as_posix()}")
    return archive
