"""A Sentinel-2 product (SAFE folder, or a zip of one): which files are its bands, and what its metadata say of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from modalities import archive
from modalities.product import Statement
from modalities.scene import SceneError, iso_time

METADATA = re.compile(r"MTD_MSI(L1C|L2A)\.xml")
MAX_XML_BYTES = 8 << 20
"""Real product metadata are some 50 KB."""

BAND_IDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
"""The band that a `band_id` or `bandId` stands for."""


def product_of(path: Path, folder: Path, metadata: set[Path]) -> Path | None:
    """The product folder that a file lies in, if it is inside `folder`; `metadata` are the known metadata files."""
    for parent in path.parents:
        if parent.suffix.upper() == ".SAFE" or any(parent / f"MTD_MSI{level}.xml" in metadata for level in ("L1C", "L2A")):
            return parent
        if parent == folder:
            return None
    return None


def is_image(path: Path, product: Path) -> bool:
    """True for the images of the measurement, false for previews, masks and other files of a product."""
    parts = path.relative_to(product).parts
    return "IMG_DATA" in parts[:-1] and "QI_DATA" not in parts


def granule_of(path: Path, product: Path) -> str:
    """Name of the granule that an image belongs to."""
    parts = path.relative_to(product).parts
    return parts[1] if len(parts) > 2 and parts[0] == "GRANULE" else ""


def read_product(product: Path, metadata: set[Path]) -> Statement:
    """What the product's own metadata file says.

    Raises:
        SceneError: There is none, or it cannot be trusted. The message does not name the product.
    """
    found = [product / f"MTD_MSI{level}.xml" for level in ("L1C", "L2A") if product / f"MTD_MSI{level}.xml" in metadata]
    if len(found) != 1:
        what = "both MTD_MSIL1C.xml and MTD_MSIL2A.xml" if found else "neither MTD_MSIL1C.xml nor MTD_MSIL2A.xml"
        raise SceneError(f"its product has {what}, so quantification and offset are unknown; fetch the product anew")
    path = found[0]
    try:
        with archive.stream(path) as stream:
            text = stream.read(MAX_XML_BYTES + 1)
    except OSError as error:
        raise SceneError(f"{path.name} of its product cannot be read ({error}); fetch the product anew") from error
    try:
        return parse_metadata(text, path)
    except SceneError as error:
        raise SceneError(f"{path.name} of its product {error}; fetch the product anew") from error


def parse_metadata(text: bytes, path: Path) -> Statement:
    """The statement of the text of an `MTD_MSIL1C.xml` or `MTD_MSIL2A.xml`.

    Offsets are those in the file for each band, and zero only where it has no list of them at all (before baseline 04.00).

    Raises:
        SceneError: It is damaged, declares a document type, is too large, or something is missing, twice there or absurd.
    """
    if len(text) > MAX_XML_BYTES:
        raise SceneError(f"has more than {MAX_XML_BYTES >> 20} MiB")
    try:
        root = fromstring(text, forbid_dtd=True)
    except DefusedXmlException as error:
        raise SceneError(f"declares a document type or entities ({type(error).__name__}), which real ones never do") from error
    except (ParseError, ValueError) as error:
        raise SceneError(f"is no readable XML ({error})") from error
    found = re.fullmatch(r"Level-(1C|2A)_User_Product", _local(root))
    if not found:
        raise SceneError(f"describes a {_local(root)[:40]!r}, not a Level-1C or Level-2A product")
    level = f"L{found[1]}"
    prefix, offset_tag = ("", "RADIO_ADD_OFFSET") if level == "L1C" else ("BOA_", "BOA_ADD_OFFSET")
    quantification = _one(root, f"{prefix}QUANTIFICATION_VALUE", f"L2A_{prefix}QUANTIFICATION_VALUE")
    if quantification <= 0:
        raise SceneError(f"says that the quantification is {quantification:g}")
    _check_band_ids(root)
    offsets = _offsets(root, offset_tag)
    special = {_text(item, "SPECIAL_VALUE_TEXT"): _number(_text(item, "SPECIAL_VALUE_INDEX")) for item in _all(root, "Special_Values")}
    if not {"NODATA", "SATURATED"} <= set(special):
        raise SceneError("does not say which numbers mean NODATA and SATURATED")
    start = iso_time(_text(root, "PRODUCT_START_TIME"))
    if not start:
        raise SceneError("has no PRODUCT_START_TIME that is a time")
    tiles = {match[1] for item in _all(root, "Granule") if (match := re.search(r"_T(\d{2}[A-Z]{3})_", item.get("granuleIdentifier", "")))}
    orbit = _text(root, "SENSING_ORBIT_NUMBER")
    return Statement(
        source=path.name,
        level=level,
        time=start,
        baseline=_text(root, "PROCESSING_BASELINE"),
        tile=tiles.pop() if len(tiles) == 1 else "",
        orbit=int(orbit) if orbit.isdigit() else None,
        scaling={band: (1 / quantification, offset / quantification) for band, offset in offsets.items()},
        nodata=special["NODATA"],
        saturated=special["SATURATED"],
        documents=(path,),
    )


def _offsets(root: Element, tag: str) -> dict[str, float]:
    entries = list(_all(root, tag))
    if not entries:
        return dict.fromkeys(BAND_IDS, 0.0)
    offsets: dict[str, float] = {}
    for entry in entries:
        number = entry.get("band_id", "")
        if not number.isdigit() or int(number) >= len(BAND_IDS) or BAND_IDS[int(number)] in offsets:
            raise SceneError(f"has a {tag} of band_id {number!r}, which is no band or is there twice")
        offsets[BAND_IDS[int(number)]] = _number((entry.text or "").strip())
    missing = [band for band in BAND_IDS if band not in offsets and not (band == "B10" and tag == "BOA_ADD_OFFSET")]
    if missing:
        raise SceneError(f"has a {tag} for some bands but none for {', '.join(missing)}")
    return offsets


def _check_band_ids(root: Element) -> None:
    """The file's own list of bands, where it has one, must be in the order that `band_id` is understood by."""
    for item in _all(root, "Spectral_Information"):
        number, band = item.get("bandId", ""), re.sub(r"^B(\d)$", r"B0\1", item.get("physicalBand", ""))
        if not number.isdigit() or int(number) >= len(BAND_IDS) or BAND_IDS[int(number)] != band:
            raise SceneError(f"says that bandId {number!r} is {band!r}, which is not the order of the instrument")


def _one(root: Element, *tags: str) -> float:
    values = Counter((entry.text or "").strip() for tag in tags for entry in _all(root, tag))
    if len(values) != 1:
        raise SceneError(f"has {len(values) or 'no'} {'different ' if values else ''}{tags[0]}")
    return _number(next(iter(values)))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SceneError(f"has {text[:40]!r} where a number belongs")
    return value


def _text(root: Element, tag: str) -> str:
    return next(((entry.text or "").strip() for entry in _all(root, tag)), "")


def _all(root: Element, tag: str) -> Iterator[Element]:
    return (entry for entry in root.iter() if _local(entry) == tag)


def _local(entry: Element) -> str:
    return str(entry.tag).rpartition("}")[2]
