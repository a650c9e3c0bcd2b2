"""What a settings model says in words: its settings with types and defaults, and its errors with key, value and nearest name."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mae_core.settings import flatten

Model = type[BaseModel]
Origin = Callable[[str], str]
"""From a dotted key to where its value comes from; an empty text where it was not given."""

SIMPLE = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null", Any: "anything"}
PLURAL = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}
LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
SAID_BY_WORDS = ("less_than", "greater_than", "literal", "enum", "union_tag", "too_", "multiple_of", "int_from_float", "string_")
OWN_WORDS = ("value_error", "assertion_error")


@dataclass(frozen=True)
class Setting:
    """One line of the table of settings.

    Attributes:
        key: Dotted name.
        words: What is allowed: type, choices and range.
        required: True if it has to be given.
        default: Its value if it is not given.
        description: What it means.
        when: Which choice of a closed union it belongs to, such as `reader.kind=mri`; empty if it always counts.
        hole: What stands for its value in a usage line, such as `PATH`.
        hidden: How many settings stand behind this line of an outline; 0 for a setting itself.
    """

    key: str
    words: str
    required: bool
    default: Any
    description: str
    when: str = ""
    hole: str = "VALUE"
    hidden: int = 0


def table(model: Model, defaults: Mapping[str, Any], prefix: str = "", when: str = "") -> Iterator[Setting]:
    """All settings of a model, sections and closed unions flattened, in the order of declaration.

    Args:
        model: The settings model, or the section that `prefix` names.
        defaults: Values that stand in for the defaults of the model, nested like it.
        prefix: Put before every key.
        when: The choice under which these settings count.
    """
    told = documented(model)
    for name, field in model.model_fields.items():
        key, meaning = f"{prefix}{name}", field.description or told.get(name, "")
        models = sections(field.annotation)
        own = defaults.get(name)
        if not isinstance(own, Mapping):
            own = declared.model_dump(mode="json") if isinstance(declared := _default(field), BaseModel) else {}
        if not models:
            required = field.is_required() and name not in defaults
            default = defaults.get(name, None if field.is_required() else _default(field))
            yield Setting(key, _words_of(field), required, default, meaning, when, _hole(field))
        elif len(models) == 1:
            optional = _is_optional(field.annotation)
            if optional:
                yield Setting(key, "section or null", required=False, default=None, description=meaning, when=when)
            yield from table(models[0], own, f"{key}.", f"{key} is given" if optional else when)
        else:
            tag = discriminator(models)
            choices = " | ".join(_tags(item, tag)[0] for item in models)
            yield Setting(f"{key}.{tag}", choices, tag not in own, own.get(tag), meaning, when, choices.replace(" ", ""))
            for item in models:
                choice = _tags(item, tag)[0]
                chosen = own if own.get(tag) == choice else {}
                inner = table(item, chosen, f"{key}.", f"{key}.{tag}={choice}")
                yield from (setting for setting in inner if setting.key != f"{key}.{tag}")


def outline(settings: Sequence[Setting]) -> list[Setting]:
    """The settings, those of each section and closed union inside a member of a closed union being one line that says how many they are.

    The line of a union is that of its `kind`, with the kinds.
    """
    whens: dict[str, str] = {}
    groups: dict[tuple[str, str], list[Setting]] = {}
    order: list[Setting | tuple[str, str]] = []
    for item in settings:
        whens[item.key] = item.when
        when = item.when
        while whens.get(holder := _holder(when)):  # up to the outermost union that it lies in
            when = whens[holder]
        union = _holder(when).rpartition(".")[0] if "=" in when else ""
        first, dot, _ = item.key.removeprefix(f"{union}.").partition(".")
        if not union or not dot:
            order.append(item)
            continue
        group = (when, f"{union}.{first}")
        if group not in groups:
            order.append(group)
        groups.setdefault(group, []).append(item)
    found: list[Setting] = []
    for entry in order:
        if isinstance(entry, Setting):
            found.append(entry)
            continue
        inner = groups[entry]
        heads = [item for item in inner if any(other.when.startswith(f"{item.key}=") for other in inner)]
        line = Setting(entry[1], "section", required=False, default=None, description="", when=entry[0])
        if found and found[-1].key == entry[1]:
            line = found.pop()
        elif heads and heads[0].key.rpartition(".")[0] == entry[1]:
            line = heads[0]
        found.append(replace(line, when=entry[0], hidden=len({item.key for item in inner})))
    return found


def _holder(when: str) -> str:
    """The setting that decides whether others count."""
    return when.removesuffix(" is given").partition("=")[0]


def documented(model: Model) -> dict[str, str]:
    """What the `Attributes:` of a model's docstring, and of those it inherits from, say of each field."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        _, _, block = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
        names: tuple[str, ...] = ()
        for line in block.splitlines():
            entry = re.match(r" {4}(\w+(?:, \w+)*): (.+)", line)
            if entry:
                names = tuple(entry[1].split(", "))
                found |= dict.fromkeys(names, entry[2])
            elif line.startswith(" " * 8):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            elif line.strip():
                break
    return found


def sections(annotation: Any) -> tuple[Model, ...]:
    """The models that a field of this annotation holds one of; empty if it holds a plain value."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return sections(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(model for part in get_args(annotation) for model in sections(part))
    return (annotation,) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ()


def discriminator(models: tuple[Model, ...]) -> str:
    """The field that tells the models of a closed union apart: the first that is a Literal in each of them."""
    for name in models[0].model_fields:
        if all(name in model.model_fields and get_origin(model.model_fields[name].annotation) is Literal for model in models):
            return name
    raise TypeError(f"{', '.join(model.__name__ for model in models)} have no field that tells them apart; give each `kind: Literal[...]`")


def own_defaults(model: Model) -> dict[str, Any]:
    """The defaults of sections, written out, so that giving one value of a section leaves the others as declared.

    Sections that must be given are there too, empty, so that what is missing in them can be named.
    """
    tree: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        models = sections(field.annotation)
        default = _default(field)
        if isinstance(default, BaseModel):
            tree[name] = default.model_dump(mode="json")
        elif field.is_required() and len(models) == 1 and not _is_optional(field.annotation):
            tree[name] = own_defaults(models[0])
    return tree


def without_replaced(base: Mapping[str, Any], later: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """`base` less the sections for which `later` chooses another member of the closed union."""
    kept = dict(base)
    for name, field in model.model_fields.items():
        models = sections(field.annotation)
        old, new = base.get(name), later.get(name)
        if not models or not isinstance(old, Mapping) or not isinstance(new, Mapping):
            continue
        if len(models) == 1:
            kept[name] = without_replaced(old, new, models[0])
        elif new.get(discriminator(models), old.get(discriminator(models))) != old.get(discriminator(models)):
            del kept[name]
    return kept


def problems(error: ValidationError, model: Model, given: Mapping[str, Any], origin: Origin) -> list[str]:
    """A line per wrong setting: key, value, where it comes from, what is allowed.

    Args:
        error: What validating `given` raised.
        model: What it was validated against.
        given: All values together, nested.
        origin: Where a value comes from.
    """
    known = list(table(model, own_defaults(model)))
    lines: dict[str, None] = {}
    for item in error.errors(include_url=False):
        key = key_of(model, item["loc"])
        if item["type"] == "extra_forbidden":
            leaves = flatten({key: item["input"]})
            lines |= {f"{_quoted(leaf, value, origin)}: {_unknown(leaf, known, given)}": None for leaf, value in leaves.items()}
        elif item["type"] in ("missing", "union_tag_not_found"):
            lines |= dict.fromkeys(_missing(key, item, known))
        else:
            lines[_wrong(key, item, known, given, origin)] = None
    return list(lines)


def key_of(model: Model, loc: tuple[int | str, ...]) -> str:
    """Dotted key of the setting that a pydantic location lies in: names of union members and places in a list are left out."""
    names: list[str] = []
    models: tuple[Model, ...] = (model,)
    for part in loc:
        if len(models) > 1:
            chosen = tuple(item for item in models if part in _tags(item, discriminator(models)))
            models = chosen or models[:1]
        elif models:
            names.append(str(part))
            field = models[0].model_fields.get(str(part))
            models = sections(field.annotation) if field else ()
    return ".".join(names)


def shown(value: Any) -> str:
    """A value in one short line, without the user and password of a URI."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    text = redacted(text.replace("\n", "\\n"))
    return text if len(text) <= 100 else f"{text[:97]}..."


def redacted(text: str) -> str:
    """The text with `***` for the user and password of every URI in it."""
    return re.sub(r"://(?:[^/\s:@]*:[^\s@]*|[^/\s?#@]*)@(?:[^/\s?#@]*@)*", "://***@", text)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of some dotted names, compared as a whole and by the last part; None if none is similar."""

    def likeness(other: str) -> float:
        whole = SequenceMatcher(None, name, other).ratio()
        last = SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return max(whole, 0.95 * last if last > 0.8 else 0.0) + 0.001 * whole

    best = max(names, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def _unknown(key: str, known: list[Setting], given: Mapping[str, Any]) -> str:
    values = flatten(given)
    chosen = [item for item in known if not item.when or _holds(item.when, values)]
    other = [item.when for item in known if item.key == key]
    if other:
        return f"unknown setting here; it belongs to {' or '.join(other)}"
    outer = [item for item in chosen if key.startswith(f"{item.key}.")]
    if outer:
        return f"unknown setting; {outer[0].key} has no parts, it is {outer[0].words}"
    name = nearest(key, [item.key for item in chosen])
    return f"unknown setting; did you mean {name}?" if name else "unknown setting; --help lists all of them"


def _holds(when: str, values: Mapping[str, Any]) -> bool:
    key, _, choice = when.partition("=")
    return not choice or str(values.get(key)) == choice


def _missing(key: str, item: ErrorDetails, known: list[Setting]) -> list[str]:
    if item["type"] == "union_tag_not_found":
        key = f"{key}.{item['ctx']['discriminator'].strip(chr(39))}"
    settings = [setting for setting in known if setting.key == key]
    settings = settings or [setting for setting in known if setting.key.startswith(f"{key}.") and setting.required and not setting.when]
    return [f"{setting.key}: missing; give --{setting.key} {setting.hole}" for setting in settings] or [f"{key}: missing"]


def _wrong(key: str, item: ErrorDetails, known: list[Setting], given: Mapping[str, Any], origin: Origin) -> str:
    if item["type"] == "union_tag_invalid":
        key = f"{key}.{item['ctx']['discriminator'].strip(chr(39))}"
    whole = _value(given, key, item["input"])
    words = sorted({setting.words for setting in known if setting.key == key})
    section = isinstance(whole, Mapping) and not words
    head = (f"{key} ({origin(key)})" if origin(key) else key) if section or not key else _quoted(key, whole, origin)
    if item["type"] in OWN_WORDS:
        text = redacted(str(item.get("ctx", {}).get("error", "")) or item["msg"])
        return f"{head}: {text}" if head else text
    if not words:
        return f"{head}: must be a section with settings of its own" if item["type"].startswith("model") else f"{head}: {item['msg']}"
    told = f"{head}: must be {' or '.join(_article(text) for text in words)}"
    if not item["type"].startswith(SAID_BY_WORDS) and not item["type"].endswith(("_type", "_parsing")):
        told += f" ({item['msg'][:1].lower()}{item['msg'][1:]})"
    if item["type"] in ("string_type", "path_type") and isinstance(item["input"], int | float):
        told += "; put it in quotes"
    choices = words[0].removesuffix(" or null").split(" | ")
    name = nearest(whole, choices) if len(choices) > 1 and isinstance(whole, str) else None
    return f"{told}; did you mean {name}?" if name else told


def _value(given: Mapping[str, Any], key: str, fallback: Any) -> Any:
    value: Any = given
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return fallback
        value = value[name]
    return value


def _quoted(key: str, value: Any, origin: Origin) -> str:
    place = origin(key)
    return f"{key} = {shown(value)}" + (f" ({place})" if place else "")


def _default(field: FieldInfo) -> Any:
    if field.is_required() or (field.default_factory and field.default_factory_takes_validated_data):
        return None
    return field.get_default(call_default_factory=True)


def _tags(model: Model, tag: str) -> tuple[str, ...]:
    return tuple(str(choice) for choice in get_args(model.model_fields[tag].annotation))


def _is_optional(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _words_of(field: FieldInfo) -> str:
    return _words(field.annotation, field.metadata)


def _article(words: str) -> str:
    if " | " in words:
        return f"one of {words.replace(' | ', ', ')}"
    return f"a {words}" if words.startswith(("list", "number", "path", "section", "whole")) else words


def _hole(field: FieldInfo) -> str:
    words = _words_of(field)
    if " | " in words:
        return words.removesuffix(" or null").replace(" ", "")
    holes = {"path": "PATH", "list": "'[...]'", "whole": "NUMBER", "number": "NUMBER"}
    return holes.get(words.partition(" ")[0], "VALUE")


def _words(annotation: Any, metadata: Iterable[Any] = (), *, many: bool = False) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__value__"):
        return _words(annotation.__value__, metadata, many=many)
    if origin is Annotated:
        inner = [item for extra in arguments[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return _words(arguments[0], [*inner, *metadata], many=many)
    if origin in (Union, UnionType):
        parts = [part for part in arguments if part is not type(None)]
        text = " or ".join(_words(part, metadata) for part in parts)
        return f"{text} or null" if len(parts) < len(arguments) else text
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(choice.value) for choice in annotation)
    limits = _limits(metadata, counted=origin in (tuple, list, dict))
    if origin in (tuple, list):
        fixed = origin is tuple and Ellipsis not in arguments
        count = f"{len(arguments)} " if fixed else ""
        items = dict.fromkeys(_words(part, many=True) for part in arguments if part is not Ellipsis)
        return f"list of {count}{' and '.join(items)}{limits and f',{limits}'}"
    if origin is dict:
        return f"section of {_words(arguments[0])}: {_words(arguments[1])}{limits}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    name = (PLURAL.get(annotation) if many else None) or SIMPLE.get(annotation) or getattr(annotation, "__name__", str(annotation))
    return f"{name}{limits}"


def _limits(metadata: Iterable[Any], *, counted: bool) -> str:
    found: list[str] = []
    for item in metadata:
        found += [f"{sign} {getattr(item, name)}" for name, sign in LIMITS.items() if getattr(item, name, None) is not None]
        unit = "length" if counted else "characters"
        if getattr(item, "min_length", None):
            found.append(f"{unit} >= {item.min_length}")
        if getattr(item, "max_length", None) is not None:
            found.append(f"{unit} <= {item.max_length}")
        if getattr(item, "multiple_of", None) is not None:
            found.append(f"multiple of {item.multiple_of}")
        if getattr(item, "pattern", None):
            found.append(f"like {item.pattern}")
    return f" {' and '.join(found)}" if found else ""
