"""How fast a part of Terravox is on this machine, against what the machine can do at best and against other libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

SUBJECTS = ("step", "prepare", "load", "codec", "checkpoint")
"""What can be measured; the first is the default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb on the subject that the first argument names; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    named = bool(words) and not words[0].startswith("-") and "=" not in words[0]
    name = words.pop(0) if named else SUBJECTS[0]
    if name not in SUBJECTS:
        near = get_close_matches(name, SUBJECTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"subjects are {', '.join(SUBJECTS)}"
        print(f"terravox benchmark: unknown subject {name}; {hint}", file=sys.stderr)
        return 2
    return subject(name)(words)


def subject(name: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a subject, imported only now."""
    match name:
        case "step":
            from pipelines.benchmark_step import main as chosen
        case "prepare":
            from pipelines.benchmark_prepare import main as chosen
        case "load":
            from pipelines.benchmark_load import main as chosen
        case "codec":
            from pipelines.benchmark_codec import main as chosen
        case "checkpoint":
            from pipelines.benchmark_checkpoint import main as chosen
        case _:
            raise ValueError(f"{name} is no subject; subjects are {', '.join(SUBJECTS)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
