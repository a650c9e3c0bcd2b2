"""A verb that tells, by a small file of each rank, which process it is and where in the run it is, so that others know when to strike.

    python tests/faults/told.py FOLDER CLOCK VERB [its arguments]

CLOCK is `true`, or the step at which the wall clock jumps a day back and the time zone changes. VERB is `pretrain`, or
`pretrain!` for one that kills itself with SIGKILL where it is about to move the alias of a registered model.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
DAY_S = 86_400.0


def jumping_clock() -> dict[str, float]:
    """A wall clock that is late by what is in here; everything that is imported after this reads it."""
    late = {"s": 0.0}
    true, true_ns = time.time, time.time_ns
    time.time = lambda: true() - late["s"]
    time.time_ns = lambda: true_ns() - int(late["s"] * 1e9)
    return late


def main(folder: Path, clock: str, verb: str, argv: list[str]) -> int:
    late = jumping_clock()
    from mae_core.pulse import Pulse
    from pipelines.pretrain import main as pretrain

    handle = os.open(folder / f"rank-{os.environ.get('RANK', '0')}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    beat = Pulse.beat

    def told(self: Pulse, step: int, phase: Any) -> None:
        beat(self, step, phase)
        os.pwrite(handle, f"{os.getpid():10d} {step:8d} {phase:10s}".encode(), 0)
        if clock != "true" and step >= int(clock):
            late["s"], os.environ["TZ"] = DAY_S, "Pacific/Auckland"
            time.tzset()

    setattr(Pulse, "beat", told)  # noqa: B010 - mypy knows that a method is no variable
    if verb.endswith("!"):
        from mlflow import MlflowClient

        MlflowClient.set_registered_model_alias = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return pretrain(argv)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
