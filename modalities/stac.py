"""STAC items on disk, and the properties that Earth Engine writes beside an export: which files are bands, and what is said of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from modalities.product import Statement, from_names
from modalities.scene import SceneError, iso_time
from modalities.sentinel2_bands import band_name

MAX_JSON_BYTES = 16 << 20
PICTURES = {"thumbnail", "overview", "visual", "metadata"}
"""Roles of assets that are no measurement."""

_REMOTE = re.compile(r"[A-Za-z][\w.+-]*:|/|\\")
_RESOLUTION = re.compile(r"[_-](10m|20m|60m|jp2)$")


@dataclass(frozen=True)
class Item:
    """A STAC item.

    Attributes:
        path: Its file.
        bands: The band that each local file holds.
        statement: What it says about them.
        scene_classes: File of the scene classification; None for none.
    """

    path: Path
    bands: Mapping[Path, str]
    statement: Statement
    scene_classes: Path | None = None


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where it is none.

    Raises:
        SceneError: It cannot be read, is larger than any item, or nested too deeply.
    """
    try:
        text = path.read_bytes() if path.stat().st_size <= MAX_JSON_BYTES else None
    except OSError as error:
        raise SceneError(f"it cannot be read ({error.strerror}); mend its permissions or leave it out with reader.exclude") from error
    if text is None:
        raise SceneError(f"it has more than {MAX_JSON_BYTES >> 20} MiB, which no STAC item has")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise SceneError("it is nested deeper than any STAC item") from error
    except ValueError:
        return None


def of_earth_engine(content: Any, path: Path) -> Statement | None:
    """What the properties of an Earth Engine image say; None where the JSON is something else.

    They tell level, time and baseline, but not whether the image came from a harmonised collection, so nothing of the offset.
    """
    product = content.get("PRODUCT_ID") if isinstance(content, dict) else None
    if not isinstance(product, str) or "MSI" not in product:
        return None
    named = from_names(product)
    return replace(named, source=path.name, baseline=str(content.get("PROCESSING_BASELINE", named.baseline)), documents=(path,))


def read_item(content: Any, path: Path, folder: Path, files: Set[Path]) -> Item | None:
    """The Sentinel-2 item that a JSON file holds; None where it holds something else.

    An asset is read from the file that its `href` leads to, which must be relative and inside the scanned folder; of a
    remote or absolute one, the file of that name beside the item is taken, where it is. Nothing remote is ever opened.

    Args:
        content: Of the file.
        path: The file.
        folder: That is scanned.
        files: What there is in it.

    Raises:
        SceneError: None of its bands is there, or one lies outside the folder.
    """
    if not isinstance(content, dict) or content.get("type") != "Feature" or "stac_version" not in content:
        return None
    properties, assets = content.get("properties"), content.get("assets")
    if not isinstance(properties, dict) or not isinstance(assets, dict) or not _is_sentinel2(content, properties):
        return None
    found = _Assets()
    applied = [value for key, value in properties.items() if key.endswith(":boa_offset_applied") and isinstance(value, bool)]
    for key, asset in assets.items():
        if isinstance(asset, dict) and isinstance(asset.get("href"), str) and not _is_picture(asset):
            found.take(key, asset, _file_of(asset["href"], path, folder, files), already_subtracted=any(applied))
    if not found.bands:
        first = f", such as {found.missing[0][:120]}" if found.missing else ""
        elsewhere = f"{len(found.missing)} elsewhere{first}"
        raise SceneError(f"none of its bands is a file of this folder ({elsewhere}); fetch them beside it, nothing remote is read")
    statement = Statement(
        path.name,
        _level_of(content, properties),
        iso_time(str(properties.get("datetime") or properties.get("start_datetime") or "")),
        str(properties.get("s2:processing_baseline") or properties.get("processing:version") or ""),
        str(properties.get("s2:mgrs_tile") or properties.get("grid:code") or "").removeprefix("MGRS-"),
        scaling=found.scaling,
        documents=(path,),
    )
    return Item(path, found.bands, statement, found.scene_classes)


def files_of(path: Path, files: frozenset[Path]) -> list[Path]:
    """Those of some files beside or below an item that it says are its bands and classes; none where it is not one that can be read."""
    try:
        item = read_item(read_json(path), path, path.parent, files)
    except SceneError:
        return []
    return [file for file in (*item.bands, item.scene_classes) if file] if item else []


@dataclass
class _Assets:
    bands: dict[Path, str] = field(default_factory=dict)
    scaling: dict[str, tuple[float, float]] = field(default_factory=dict)
    scene_classes: Path | None = None
    missing: list[str] = field(default_factory=list)

    def take(self, key: str, asset: Mapping[str, Any], file: Path | None, *, already_subtracted: bool) -> None:
        """Note the band or scene classification that an asset is; `already_subtracted`: its offset was, whatever `raster:bands` say."""
        band = _band_of(key, asset)
        is_classes = band is None and _RESOLUTION.sub("", key.lower()) == "scl"
        if not band and not is_classes:
            return
        if file is None:
            self.missing.append(asset["href"])
        elif not band:
            self.scene_classes = self.scene_classes or file
        else:
            self.bands[file] = band
            stated = _scaling_of(asset)
            if already_subtracted:
                stated = (stated[0] if stated else 1e-4, 0.0)
            if stated and self.scaling.setdefault(band, stated) != stated:
                raise SceneError(f"it gives two scales or offsets for {band}; correct it")


def _is_picture(asset: Mapping[str, Any]) -> bool:
    roles = asset.get("roles")
    return isinstance(roles, list) and any(isinstance(role, str) and role in PICTURES for role in roles)


def _is_sentinel2(content: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
    words = " ".join(str(part).lower() for part in (content.get("collection"), properties.get("constellation"), properties.get("platform")))
    named = re.match(r"S2[A-D]_", str(content.get("id", "")))
    return bool("sentinel-2" in words or "sentinel2" in words or named) and "hls" not in words


def _level_of(content: Mapping[str, Any], properties: Mapping[str, Any]) -> str:
    said = [properties.get(key) for key in ("s2:product_type", "processing:level", "product:type")]
    for text in [*said, content.get("collection"), content.get("id")]:
        found = re.search(r"(?:^|[^0-9a-z])(?:s2msi|msi|l|msil)?(1c|2a)(?:$|[^0-9a-z])", str(text or "").lower())
        if found:
            return f"L{found[1].upper()}"
    return ""


def _entries(asset: Mapping[str, Any], *keys: str) -> Iterator[Mapping[str, Any]]:
    for key in keys:
        listed = asset.get(key)
        if isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], dict):
            yield listed[0]


def _band_of(key: str, asset: Mapping[str, Any]) -> str | None:
    if any(isinstance(asset.get(name), list) and len(asset[name]) > 1 for name in ("eo:bands", "bands")):
        return None
    for entry in _entries(asset, "eo:bands", "bands"):
        for word in ("name", "eo:common_name", "common_name"):
            band = band_name(str(entry.get(word) or ""))
            if band:
                return band
    return band_name(_RESOLUTION.sub("", key))


def _scaling_of(asset: Mapping[str, Any]) -> tuple[float, float] | None:
    """Scale and offset of the numbers of an asset; None where it gives no scale, or 1, as catalogues do that know none."""
    for entry in (*_entries(asset, "raster:bands", "bands"), asset):
        scale, offset = (entry.get(f"raster:{word}", entry.get(word)) for word in ("scale", "offset"))
        if scale is None:
            continue
        numbers = (scale, 0.0 if offset is None else offset)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers) or scale <= 0:
            raise SceneError(f"it gives scale {scale!r} and offset {offset!r} for {asset.get('href')}, which are no numbers to reckon with")
        return None if scale == 1 else (float(numbers[0]), float(numbers[1]))
    return None


def _file_of(href: str, item: Path, folder: Path, files: Set[Path]) -> Path | None:
    if _REMOTE.match(href):
        beside = item.parent / PurePosixPath(unquote(urlsplit(href).path.replace("\\", "/"))).name
        return beside if beside in files else None
    parts: list[str] = []
    for part in (*item.parent.relative_to(folder).parts, *PurePosixPath(href).parts):
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise SceneError(f"its asset {href[:120]} lies outside the scanned folder; put it inside, or scan the folder above")
    file = folder.joinpath(*parts)
    return file if file in files else None
