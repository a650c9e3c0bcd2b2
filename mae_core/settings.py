"""The ground of all settings: frozen, typed, and an unknown key is an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Settings(BaseModel):
    """Base of every settings model; each is declared beside the part that it sets, with its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def default_kind(kind: str) -> BeforeValidator:
    """For a closed union told apart by `kind`: settings that do not say which are of this one."""

    def fill(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, Mapping) and "kind" not in value else value

    return BeforeValidator(fill)


def to_plain(settings: BaseModel) -> dict[str, Any]:
    """Settings as nested dictionaries of JSON's types; validating them again gives equal settings.

    Ordered collections only: a set has no order that two processes share, so no setting is one.
    """
    return settings.model_dump(mode="json")


def digest(settings: BaseModel, ignore: Collection[str] = ()) -> str:
    """Hexadecimal sha256 of the settings, the same in every process and independent of the order of keys.

    Args:
        settings: What to digest.
        ignore: Dotted keys that do not count; one that names a section takes all below it along.
    """
    counted = sorted((key, value) for key, value in flatten(to_plain(settings)).items() if not _covered(key, ignore))
    text = json.dumps(counted, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """One line per dotted key whose value differs, such as `train.steps: 100 -> 200`, sorted by key.

    Args:
        old: What `to_plain` gave, now or in an earlier run.
        new: What it is compared with.
        ignore: Dotted keys that may differ; one that names a section takes all below it along.
    """
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if not _covered(key, ignore) and _shown(before, key) != _shown(after, key)
    ]


def flatten(plain: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key to value for every leaf of nested mappings; an empty mapping and a list are leaves."""
    leaves: dict[str, Any] = {}
    for name, value in plain.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{key}.")
        else:
            leaves[key] = value
    return leaves


def _covered(key: str, ignore: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in ignore)


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key], ensure_ascii=False, sort_keys=True, default=str) if key in leaves else "absent"
