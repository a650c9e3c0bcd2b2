"""The one grammar of all verbs: files and `section.key=value` become frozen settings, or every error at once and exit code 2."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeVar

import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError

from mae_core.settings import Settings, flatten, to_plain
from mae_core.stopping import REQUEUE, Stopped, stop_requests
from pipelines.config_files import NO_INTERPOLATION, ConfigError, put, read_config, typed, without_holes
from pipelines.requeue import forget_stop, tell_stop
from pipelines.settings_words import (
    Setting,
    key_of,
    nearest,
    outline,
    own_defaults,
    problems,
    redacted,
    shown,
    table,
    without_replaced,
)
from pipelines.withheld import ADVICE, SOURCES, discreet, is_private, kind_of, trace_of

S = TypeVar("S", bound=Settings)

FLAGS = {"--help": "help", "-h": "help", "--print-config": "print-config", "--check": "check"}
OPTIONS = """\
  --config FILE   settings from a YAML file; repeatable, a later file wins over an earlier one
  KEY=VALUE       one setting by its dotted name, such as section.key=value; --KEY VALUE and --KEY=VALUE say the same.
                  The command line wins over files, files over defaults, whatever the order of arguments
  --print-config  print all settings as YAML, each with where it comes from, and stop
  --check         look for everything that could be wrong, do nothing, and stop
  --help          print this and stop; --help PREFIX, such as --help reader: every setting that begins with it"""
CAUSES = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}
COMMAND_LINE = "command line"


@dataclass
class Given:
    """What files and command line say, before it is validated.

    Attributes:
        tree: All values, nested.
        origins: Where the value of each dotted key comes from.
        raw: Values of the command line as they were typed.
        problems: What could not be read, a line each.
        flags: The stops that were asked for, such as `help`.
        prefix: What settings begin with for which help was asked; empty for an outline of all.
        verbs: The verb that a file's header names, by file; empty if it names none.
        unread: True if a file could not be read, so that what seems missing may stand in it.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    prefix: str = ""
    verbs: dict[str, str] = field(default_factory=dict)
    unread: bool = False

    def origin(self, key: str) -> str:
        """Where the value of a key comes from: its own origin, else that of what holds it, else of what it holds; empty for a default."""
        name = key
        while name:
            if name in self.origins:
                return self.origins[name]
            name = name.rpartition(".")[0]
        inside = dict.fromkeys(place for name, place in self.origins.items() if name.startswith(f"{key}."))
        return ", ".join(inside)


def run(  # noqa: PLR0913 - the one place where all that a verb is comes together, by name
    verb: str,
    settings_type: type[S],
    main: Callable[[S], int | None],
    *,
    description: str,
    check: Callable[[S], list[str]] | None = None,
    defaults: Mapping[str, Any] | None = None,
    expected: tuple[type[Exception], ...] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """Exit code of a verb that is run with the arguments of a command line.

    Args:
        verb: Its name, as in `pipelines/VERB.py`.
        settings_type: The model that all settings together must meet.
        main: Does the work; None counts as 0.
        description: For `--help`.
        check: Problems that only the outside world can tell (paths, free space), for `--check`; empty if all is well.
        defaults: Values, nested or by dotted key, that this verb puts in place of the model's own defaults.
        expected: Errors that speak to the user: printed without a traceback, exit code 1.
        argv: Arguments after the name of the program; those of this process if None.

    Returns:
        0 done; 1 an error that was expected; 2 wrong settings, or `--check` found problems; 75 stopped on a signal, to be run again;
        130 interrupted.
    """
    base = _base(settings_type, defaults or {})
    given = parse(sys.argv[1:] if argv is None else argv)
    if "help" in given.flags:
        return _help(verb, settings_type, base, description, given.prefix)
    settings = _validated(given, base, settings_type)
    private = is_private(kind_of(_merged(base, given.tree, settings_type) if settings is None else to_plain(settings)))
    if settings is None:
        given.problems = _without_places(given, settings_type) if private else given.problems
        _complain(verb, [*given.problems, *_written_for_another(verb, given)])
        return 2
    if "print-config" in given.flags:
        _say(settings_to_yaml(settings, given.origin, SOURCES if private else ()))
        return 0
    try:
        with discreet(private=private), stop_requests(ends_process=True):
            return _called(verb, settings, main, check, stop="check" in given.flags)
    except expected as error:
        _say("\n".join([f"terravox {verb}: error: {error}", *getattr(error, "__notes__", ())]), sys.stderr)
        return 1
    except Stopped as stopped:
        tell_stop(verb, settings, stopped)
        return REQUEUE
    except KeyboardInterrupt:
        _say(f"terravox {verb}: interrupted", sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CAUSES:
            _say(f"terravox {verb}: error: {CAUSES[error.errno] if private else _cause(error)}", sys.stderr)
        elif private:
            _say(f"terravox {verb}: an error that was not expected; {ADVICE}\n{trace_of(error)}", sys.stderr)
        else:
            raise
        return 1


def _called(verb: str, settings: S, main: Callable[[S], int | None], check: Callable[[S], list[str]] | None, *, stop: bool) -> int:
    """Exit code of what the verb does, or of its look for problems where it is to stop there."""
    if not stop:
        forget_stop(settings)
        return main(settings) or 0
    found = check(settings) if check else []
    _complain(verb, found) if found else _say(f"terravox {verb}: the settings are valid, nothing was done")
    return 2 if found else 0


def parse(argv: Sequence[str]) -> Given:
    """What the arguments and the files that they name say: files in order, then the command line."""
    given = Given()
    files: list[str] = []
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in FLAGS:
            given.flags.add(FLAGS[word])
            if FLAGS[word] == "help" and rest and re.fullmatch(r"[A-Za-z][\w.]*", rest[0]):
                given.prefix = rest.pop(0).rstrip(".")
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        if word.startswith("--") and not equals:
            if not rest or rest[0].startswith("--"):
                given.problems.append(f"{word}: a value is missing; write {word} VALUE")
                continue
            text = rest.pop(0)
        elif not equals or not name or (word.startswith("-") and not word.startswith("--")):
            given.problems.append(f"{shown(word)}: not an argument; write section.key=value, --key VALUE or --config FILE")
            continue
        if word.startswith("--config") and name == "config":
            files.append(text)
        elif "${" in text:
            given.problems.append(f"{name} = {shown(text)} ({COMMAND_LINE}): {NO_INTERPOLATION}")
        else:
            put(values, name, typed(text))
            given.raw[name] = text
    given.origins = dict.fromkeys(flatten(values), COMMAND_LINE)
    _read_files(files, values, given)
    return given


def _read_files(files: Sequence[str], values: dict[str, Any], given: Given) -> None:
    from_command_line = given.origins
    given.origins = {}
    layers: list[dict[str, Any]] = []
    for file in files:
        try:
            config = read_config(file)
        except ConfigError as error:
            given.problems += error.args
            given.unread = True
            continue
        layers.append(config.values)
        given.origins |= config.origins
        given.verbs[file] = config.verb
    given.origins |= from_command_line
    merged = OmegaConf.merge(*layers, values)
    plain = OmegaConf.to_container(merged, resolve=False)
    given.tree = without_holes(plain) if isinstance(plain, dict) else {}


def _base(settings_type: type[Settings], defaults: Mapping[str, Any]) -> dict[str, Any]:
    verb: dict[str, Any] = {}
    for key, value in defaults.items():
        put(verb, key, value)
    return _merged(own_defaults(settings_type), verb, settings_type)


def _merged(base: Mapping[str, Any], later: Mapping[str, Any], settings_type: type[Settings]) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.merge(without_replaced(base, later, settings_type), dict(later)), resolve=False)
    return {str(name): value for name, value in plain.items()} if isinstance(plain, dict) else {}


def _validated(given: Given, base: Mapping[str, Any], settings_type: type[S]) -> S | None:
    """The settings; or None, and `given.problems` says all that is wrong."""
    settings = None
    tree = _merged(base, given.tree, settings_type)
    try:
        try:
            settings = settings_type.model_validate(tree)
        except ValidationError as error:
            settings = settings_type.model_validate(_as_typed(tree, error, given, settings_type))
    except ValidationError as error:
        lines = problems(error, settings_type, tree, given.origin)
        given.problems += [line for line in lines if not (given.unread and ": missing" in line)]
    return None if given.problems else settings


def _as_typed(tree: Mapping[str, Any], error: ValidationError, given: Given, settings_type: type[Settings]) -> dict[str, Any]:
    """The tree with the typed text where YAML read something else into what must be text, such as `name=2024`."""
    texts: dict[str, Any] = deepcopy(dict(tree))
    for item in error.errors(include_url=False):
        key = key_of(settings_type, item["loc"])
        if (
            item["type"] in ("string_type", "path_type", "literal_error", "enum")
            and given.raw.get(key)
            and not isinstance(item["input"], list)
        ):
            put(texts, key, given.raw[key])
    return texts


def _without_places(given: Given, settings_type: type[Settings]) -> list[str]:
    """The problems without what was given as a place, or under a name that no setting has."""
    known = {item.key for item in table(settings_type, {})}
    values = [str(value) for key, value in flatten(given.tree).items() if isinstance(value, str) and (os.sep in value or key not in known)]
    values += [line.partition(": not an argument")[0] for line in given.problems if ": not an argument" in line]
    lines = given.problems
    for value in sorted({*values, *map(shown, values)}, key=len, reverse=True):
        lines = [line.replace(value, "(withheld)") for line in lines] if value else lines
    return lines


def _written_for_another(verb: str, given: Given) -> list[str]:
    unknown = "\n".join(line for line in given.problems if "unknown setting" in line)
    return [
        f"{file} is written for `python pipelines/{other}.py`, this is {verb}"
        for file, other in given.verbs.items()
        if other not in ("", verb) and f"({file}" in unknown
    ]


def settings_to_yaml(settings: Settings, origin: Callable[[str], str] | None = None, withheld: Collection[str] = ()) -> str:
    """The settings as YAML that `--config` reads again, a line per value; user and password of URIs are left out.

    Args:
        settings: What to write.
        origin: Where the value of a dotted key comes from, written behind it as a comment; none if None.
        withheld: Settings that are left out, with a comment in their place.
    """
    plain = to_plain(settings)
    gone = [f"# {name}: given, and withheld: a place in an archive of patients" for name in withheld if plain.get(name) is not None]
    return "\n".join([*gone, *_yaml_lines({name: value for name, value in plain.items() if name not in withheld}, origin, "", 0)])


def _yaml_lines(plain: Mapping[str, Any], origin: Callable[[str], str] | None, prefix: str, depth: int) -> list[str]:
    lines: list[str] = []
    for name, value in plain.items():
        key = f"{prefix}{name}"
        head = f"{'  ' * depth}{_yaml(name)}:"
        if isinstance(value, dict) and value:
            lines += [head, *_yaml_lines(value, origin, f"{key}.", depth + 1)]
        else:
            lines.append(f"{head} {_yaml(value)}" + (f"  # {origin(key) or 'default'}" if origin else ""))
    return lines


def _yaml(value: Any) -> str:
    """A value on one line, quoted where OmegaConf would read the plain text as something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml(name)}: {_yaml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if isinstance(value, str):
        text = redacted(value)
        if re.fullmatch(r"[A-Za-z_/][\w./-]*", text) and typed(text) == text:
            return text
        return yaml.dump(text, Dumper=yaml.SafeDumper, default_style='"', allow_unicode=True, width=2**31).strip()
    return yaml.dump(value, Dumper=yaml.SafeDumper).removesuffix("...\n").strip()


def help_text(verb: str, settings_type: type[Settings], defaults: Mapping[str, Any], description: str) -> str:
    """What `--help` prints: description, usage and a table of all settings."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    settings = list(table(settings_type, defaults))
    required = "".join(f" --{item.key} {item.hole}" for item in settings if item.required and not item.when)
    lines = [
        textwrap.fill(f"terravox {verb}: {description}", width),
        "",
        f"usage: python pipelines/{verb}.py{required} [--config FILE]... [KEY=VALUE | --KEY VALUE]...",
        "",
        OPTIONS,
        "",
        "settings (name, type, default, meaning):",
    ]
    return "\n".join(lines + setting_lines(outline(settings), width))


def _help(verb: str, settings_type: type[Settings], defaults: Mapping[str, Any], description: str, prefix: str) -> int:
    """Print the outline of all settings, or all that begin with a prefix; the exit code."""
    if not prefix:
        _say(help_text(verb, settings_type, defaults, description))
        return 0
    settings = list(table(settings_type, defaults))
    chosen = [item for item in settings if item.key == prefix or item.key.startswith(f"{prefix}.")]
    chosen = chosen or [item for item in settings if item.key.startswith(prefix)]
    if not chosen:
        sections = {item.key[:place] for item in settings for place, letter in enumerate(item.key) if letter == "."}
        name = nearest(prefix, [*(item.key for item in settings), *sorted(sections)])
        _complain(verb, [f"--help {prefix}: no setting begins so" + (f"; did you mean {name}?" if name else "; --help lists all")])
        return 2
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    _say("\n".join([f"terravox {verb}: settings that begin with {prefix}", *setting_lines(chosen, width)]))
    return 0


def setting_lines(settings: Sequence[Setting], width: int) -> list[str]:
    """Settings as lines: name, type, default, then what it means; under a heading those that count for one choice only."""
    lines: list[str] = []
    column = max((len(item.key) for item in settings if len(item.key) <= 32), default=8) + 2
    when = ""
    for item in settings:
        if item.when and item.when != when:
            lines.append(f"  if {item.when}:")
        when = item.when
        default = "required" if item.required else f"default {_yaml(_plain(item.default))}"
        margin = "    " if when else "  "
        section = item.key if item.words.startswith("section") else item.key.rpartition(".")[0]
        told = item.words if item.hidden and item.words == "section" else f"{item.words}; {default}"
        lines.append(f"{margin}{item.key:<{column - 1}} {told}")
        meaning = f"{item.description} ({item.hidden} settings: --help {section})" if item.hidden else item.description
        indent = margin + " " * column
        lines += textwrap.wrap(" ".join(meaning.split()), width, initial_indent=indent, subsequent_indent=indent)
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return value if isinstance(value, (bool, int, float)) or value is None else str(getattr(value, "value", value))


def _cause(error: OSError) -> str:
    file = error.filename2 or error.filename
    cause = CAUSES[error.errno or 0]
    return f"{os.fsdecode(file) if isinstance(file, (str, bytes)) else file}: {cause}" if file is not None else cause


def _complain(verb: str, lines: Sequence[str]) -> None:
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    _say("\n".join([f"terravox {verb}: {count} with the settings; nothing was done", *(f"  {line}" for line in lines)]), sys.stderr)


def _say(text: str, stream: TextIO | None = None) -> None:
    """Prints, with `?` for what the stream's encoding cannot say."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream)
