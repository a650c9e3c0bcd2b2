"""Reading a config file: plain YAML typed by OmegaConf's rules, nothing replaced, nothing executed, every value with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from mae_core.settings import flatten

NO_INTERPOLATION = "${...} is not replaced in settings; write the value itself"


class ConfigError(Exception):
    """A config file cannot be read. Each argument is a line that names the file and, where known, the line in it."""


@dataclass(frozen=True)
class ConfigFile:
    """What a config file says.

    Attributes:
        values: All values, nested.
        origins: `FILE:LINE` of every dotted key.
        verb: The verb that the header names with `pipelines/VERB.py`; empty if it names none.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    verb: str


def read_config(file: str) -> ConfigFile:
    """The settings in a YAML file; keys may be nested or dotted.

    Raises:
        ConfigError: The file is missing, is no YAML, is no mapping, or wants values replaced.
    """
    text = _text(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if isinstance(node, yaml.MappingNode) else None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_yaml_problem(file, error)) from None
    except GrammarParseError as error:
        raise ConfigError(f"{file}: {error.full_key}: {NO_INTERPOLATION}") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a config file: {error}") from None
    if not isinstance(node, yaml.MappingNode | None):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{file}: the top level must be a mapping of settings, such as `train:`; it is {kind}")
    lines = _lines(node) if node else {}
    if node and (interpolated := _interpolated(node)):
        raise ConfigError(*(f"{file}:{_line(lines, key)}: {key}: {NO_INTERPOLATION}" for key in interpolated))
    values: dict[str, Any] = {}
    for key, value in loaded.items() if isinstance(loaded, dict) else ():
        put(values, key, value)
    header = re.search(r"^#.*?pipelines/(\w+)\.py", text, re.MULTILINE)
    return ConfigFile(values, {key: f"{file}:{_line(lines, key)}" for key in flatten(values)}, header[1] if header else "")


def typed(text: str) -> Any:
    """The value of an argument by OmegaConf's YAML rules; the text itself where it is not YAML, such as `*.tif`."""
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError):
        return text
    return plain["value"] if isinstance(plain, dict) else text


def put(tree: dict[str, Any], key: Any, value: Any) -> None:
    """Sets a dotted key in a nested dictionary; sections are merged, everything else is replaced."""
    name, dot, rest = key.partition(".") if isinstance(key, str) else (key, "", "")
    if dot:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        put(tree[name], rest, value)
    elif isinstance(value, dict) and isinstance(tree.get(name), dict):
        for inner, item in value.items():
            put(tree[name], inner, item)
    else:
        tree[name] = value


def without_holes(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """The tree less what OmegaConf's `???` marks as still to be given."""
    return {name: without_holes(value) if isinstance(value, dict) else value for name, value in tree.items() if value != "???"}


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such config file (looked for {Path(file).absolute()})") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read as a config file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not a text file in UTF-8, so no config file") from None


def _yaml_problem(file: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{file}:{mark.line + 1}" if mark else file
    context = f" {error.context}" if error.context else ""
    return f"{place}: not YAML: {error.problem}{context}"


def _lines(node: yaml.Node, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{prefix}{name.value}"
        lines[key] = name.start_mark.line + 1
        lines |= _lines(value, f"{key}.")
    return lines


def _line(lines: Mapping[str, int], key: str) -> int:
    """The line of a key, or of what holds it."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def _interpolated(node: yaml.Node, key: str = "") -> list[str]:
    if isinstance(node, yaml.MappingNode):
        return [found for name, value in node.value for found in _interpolated(value, f"{key}.{name.value}".lstrip("."))]
    if isinstance(node, yaml.SequenceNode):
        return list(dict.fromkeys(found for value in node.value for found in _interpolated(value, key)))
    return [key] if "${" in node.value else []
