"""The licence that a data set states, by its SPDX name out of a closed list: what else stands there may name a person, and is not told."""

from __future__ import annotations

import json
import re
from pathlib import Path

NOT_STATED = "not stated"
OTHER = "stated by the data set in other words"
_CREATIVE = re.compile(r"cc[- ]?(by(?:-nc)?(?:-sa|-nd)?)[- ]?v?([1-4]\.[05])?")
_KNOWN = {
    "cc0": "CC0-1.0",
    "cc0-1.0": "CC0-1.0",
    "creative-commons-zero": "CC0-1.0",
    "public-domain": "CC0-1.0",
    "pd": "CC0-1.0",
    "pddl": "PDDL-1.0",
    "pddl-1.0": "PDDL-1.0",
    "odbl": "ODbL-1.0",
    "odbl-1.0": "ODbL-1.0",
    "odc-by": "ODC-By-1.0",
    "odc-by-1.0": "ODC-By-1.0",
    "mit": "MIT",
    "apache-2.0": "Apache-2.0",
}


def known_licence(text: str) -> str:
    """The SPDX name of a licence that is written in a usual way, else `OTHER`; `NOT_STATED` of an empty text."""
    plain = re.sub(r"[\s_]+", "-", text.strip().lower())
    if not plain:
        return NOT_STATED
    found = _CREATIVE.fullmatch(plain)
    if found:
        return f"CC-{found[1].upper()}-{found[2]}" if found[2] else f"CC-{found[1].upper()}, version not stated"
    return _KNOWN.get(plain, OTHER)


def licence_of(description: Path) -> str:
    """What the `License` field of a BIDS `dataset_description.json` says."""
    try:
        stated = json.loads(description.read_bytes())
    except (OSError, ValueError):
        return NOT_STATED
    text = stated.get("License") if isinstance(stated, dict) else None
    return known_licence(text) if isinstance(text, str) else NOT_STATED
