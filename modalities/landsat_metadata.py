"""What the metadata file (MTL) of a Landsat Collection 2 product says, in any of its three forms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from modalities.scene import SceneError, utc

MAX_BYTES = 1 << 20
"""A metadata file has some 25 KB."""

ROOT = "LANDSAT_METADATA_FILE"


@dataclass(frozen=True)
class LandsatMetadata:
    """The groups of a metadata file; every value is text.

    Attributes:
        file: Its name, for messages.
        groups: Group name to its entries. Names of entries repeat between groups: those of Level 1 stand in the file of Level 2 too.
    """

    file: str
    groups: Mapping[str, Mapping[str, str]]

    def text(self, group: str, key: str) -> str:
        """An entry.

        Raises:
            SceneError: There is none. The message names file, group and key.
        """
        found = self.groups.get(group, {}).get(key)
        if found is None:
            raise SceneError(f"{self.file} has no {key} in {group}; download the product's metadata anew")
        return found

    def number(self, group: str, key: str) -> float:
        """An entry that is a finite number.

        Raises:
            SceneError: There is none, or it is no number.
        """
        text = self.text(group, key)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SceneError(f"{self.file} says {key} = {text!r} in {group}, which is no number; download the product's metadata anew")
        return value

    @property
    def time(self) -> str:
        """When the middle of the scene was acquired, as `Scene.times` has it."""
        text = f"{self.text('IMAGE_ATTRIBUTES', 'DATE_ACQUIRED')}T{self.text('IMAGE_ATTRIBUTES', 'SCENE_CENTER_TIME')}"
        try:
            return utc(datetime.fromisoformat(text[:19] + "+00:00"))
        except ValueError as error:
            raise SceneError(f"{self.file} gives {text!r} as its time, which is none; download the product's metadata anew") from error


def read_metadata(folder: Path, product: str) -> LandsatMetadata | None:
    """The metadata of a product from the file beside its bands, JSON before XML before text; None where there is none.

    No path that stands in the file is followed: bands are found by their names.

    Raises:
        SceneError: The file is damaged, too large, or that of another product.
    """
    for ending, parse in (("json", _json), ("xml", _xml), ("txt", _odl)):
        path = folder / f"{product}_MTL.{ending}"
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > MAX_BYTES:
                raise SceneError(f"{path.name} has {path.stat().st_size} bytes, more than {MAX_BYTES}; it is no metadata of Landsat")
            found = LandsatMetadata(path.name, parse(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ParseError, DefusedXmlException, RecursionError) as error:
            if isinstance(error, SceneError):
                raise
            raise SceneError(f"{path.name} cannot be read as {ending.upper()}: {type(error).__name__} {error}") from error
        said = found.text("PRODUCT_CONTENTS", "LANDSAT_PRODUCT_ID")
        if said != product:
            raise SceneError(f"{path.name} is the metadata of {said}, not of {product}; put the product's own beside its bands")
        return found
    return None


def _json(text: str) -> dict[str, dict[str, str]]:
    document = json.loads(text)
    root = document.get(ROOT) if isinstance(document, dict) else None
    groups = {name: group for name, group in root.items() if isinstance(group, dict)} if isinstance(root, dict) else {}
    if not groups:
        raise ValueError(f"there is no {ROOT} in it")
    return {name: {key: str(value) for key, value in group.items()} for name, group in groups.items()}


def _xml(text: str) -> dict[str, dict[str, str]]:
    root = fromstring(text.encode(), forbid_dtd=True)
    if root.tag != ROOT:
        raise ValueError(f"it begins with {root.tag}, not with {ROOT}")
    return {group.tag: {entry.tag: (entry.text or "").strip() for entry in group} for group in root}


def _odl(text: str) -> dict[str, dict[str, str]]:
    """Lines `KEY = value` between `GROUP = name` and `END_GROUP = name`."""
    groups: dict[str, dict[str, str]] = {}
    opened: list[str] = []
    for line in text.splitlines():
        key, equals, value = (part.strip() for part in line.partition("="))
        if key == "GROUP":
            opened.append(value)
        elif key == "END_GROUP":
            if not opened or opened.pop() != value:
                raise ValueError(f"END_GROUP = {value} closes no group")
        elif equals and len(opened) == 2:
            groups.setdefault(opened[1], {})[key] = value.strip('"')
    if not groups or opened:
        raise ValueError(f"there is no whole GROUP = {ROOT} in it")
    return groups
