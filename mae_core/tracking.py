"""One MLflow run per job over all its attempts, written by rank 0 only: what is told goes into a spool, and from there to MLflow."""

from __future__ import annotations

import getpass
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mae_core.delivery import Delivery, connect, redacted
from mae_core.export import WEIGHTS, Description
from mae_core.publisher import Publisher, UnusableError
from mae_core.sealed import sha256
from mae_core.settings import flatten
from mae_core.spool import FOLDER, Known, Spool, new_key, new_spool, progress_of, spools_in
from mae_core.stopping import Stopped, TakenOverError
from mae_core.system_metrics import Sampler
from mae_core.tracking_store import OFFLINE, Registered, TrackingError, TrackingSettings, artifact_folder, fetch_model, tracking_uri

__all__ = ["Registered", "Tracker", "TrackingError", "TrackingSettings", "artifact_folder", "fetch_model", "redacted", "tracking_uri"]

if TYPE_CHECKING:
    from mlflow import MlflowClient

os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"  # whatever was set: nothing is told to anybody
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

START_WAIT_S, STOP_WAIT_S, QUIET_WAIT_S = 20.0, 10.0, 3.0
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class Tracker:
    """One MLflow run. Every metric carries its step; a resumed job goes on in the run it began.

    What it is told goes into a spool in the run's folder, from where a thread tells it to MLflow whenever that can be reached: no method
    waits for a server or fails with it, but for the start, which waits some seconds, and the end, which waits up to `tracking.wait_s`.

    Args:
        settings: Where, and what.
        out: Folder of the run.
        of_patients: Whether a picture can show a patient, so that there is none unless it is asked for.
        folder: Where the spool goes (default: `tracking` in `out`).
        passing: Whether nobody goes on with the run, so that its spool is deleted once all of it has been published.
        say: Told when tracking is lost, when it is back and what is left.

    Raises:
        TrackingError: The address is none.
    """

    def __init__(
        self,
        settings: TrackingSettings,
        out: Path,
        *,
        of_patients: bool = True,
        folder: Path | None = None,
        passing: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings = settings
        self.images = not of_patients if settings.log_images is None else settings.log_images
        self.uri = tracking_uri(settings, out)
        self.folder = folder or out / FOLDER
        self._passing = passing
        self._facts: dict[str, Any] = {}
        self._default = settings.uri is None and not os.environ.get("MLFLOW_TRACKING_URI")
        self._say = say
        self._known = Known()
        self._gated = False
        self._spool: Spool | None = None
        self._publisher: Publisher | None = None
        self._children: list[Publisher] = []
        self._told_full = False

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; as long as MLflow has not made it, the key of the spool, which the run will carry as a tag."""
        if self._spool is None:
            return ""
        progress = progress_of(self._spool) if self._publisher is None else self._publisher.progress
        return progress.run_id or self._known.key

    @property
    def client(self) -> MlflowClient:
        """For looking at what was recorded.

        Raises:
            TrackingError: The tracking store cannot be used.
        """
        try:
            return connect(self.uri)
        except UnusableError as error:
            raise TrackingError(str(error)) from error

    @contextmanager
    def run(
        self, name: str, run_id: str | None, config: Mapping[str, Any], tags: Mapping[str, str], *, step: int | None = None
    ) -> Iterator[Tracker]:
        """The run, new or gone on with: FINISHED at the end, KILLED when stopped or interrupted, FAILED on any other exception.

        Where another job has taken it over, it is that one's, and left as it is.
        Inside another tracker's run it is a child of that run.

        Args:
            name: Of a new run.
            run_id: That `run_id` gave in an attempt before; None for a new run, or one that was killed before it could be noted.
            config: Settings.
            tags: Of the run, `source` among them.
            step: Step of the checkpoint that is gone on from, 0 where there is none; None for a run that writes no checkpoints.
                With a step, metrics and pictures are published when a checkpoint covers them.

        Raises:
            TrackingError: `run_id` is given and this tracking store does not know it, or the store cannot be used.
        """
        parent = _running.get()
        self._begin(parent, name, run_id, config, tags, step)
        token = _running.set(self)
        try:
            with ExitStack() as stack:
                if self.settings.system_metrics and parent is None:
                    first = max((at for key, at in self._known.steps.items() if key.startswith("system/")), default=-1) + 1
                    stack.enter_context(Sampler(self._sample, first))
                yield self
        except (Stopped, KeyboardInterrupt):
            self._end(parent, "KILLED", {}, STOP_WAIT_S)
            raise
        except TakenOverError:
            self._leave()
            raise
        except BaseException as error:
            at = max((at for key, at in self._known.steps.items() if not key.startswith("system/")), default=0)
            self._end(parent, "FAILED", {"failure": type(error).__name__, "failure_step": str(at)}, self.settings.wait_s)
            raise
        finally:
            _running.reset(token)
        self._end(parent, "FINISHED", {}, self.settings.wait_s)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Tell values at a step; what the run was told before it was killed is not told again."""
        new = {key: float(value) for key, value in values.items() if step > self._known.steps.get(key, -1)}
        if new:
            self._append("metrics", values=new, step=step, gated=self._gated)
            self._known.steps |= dict.fromkeys(new, step)
            self._known.values |= new

    def covered(self, step: int) -> None:
        """A checkpoint of this step is on disk for good: what was told up to it may be published. Called from any thread."""
        if self._gated:
            self._append("covered", step=step, durable=True)

    def image(self, key: str, picture: NDArray[np.uint8], step: int) -> None:
        """Tell a picture at a step, if pictures are wanted."""
        if not self.images or (key, step) in self._known.pictures:
            return
        self._known.pictures.add((key, step))
        self._keep(f"{new_key()}.npz", partial(np.savez_compressed, picture=picture), "image", key=key, step=step, gated=self._gated)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Tell a file, as it is now."""
        self._keep(f"{new_key()}/{path.name}", partial(shutil.copyfile, path), "artifact", folder=folder)

    def table(self, file: str, columns: Mapping[str, Sequence[str]]) -> None:
        """Tell a table as a JSON artifact of columns and rows, laid out as MLflow's own tables are."""
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self._append("table", file=file, content={"columns": list(columns), "data": rows})

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        if values:
            self._append("tags", values=dict(values))

    def dataset(self, name: str, digest: str, context: str, facts: Mapping[str, str]) -> None:
        """Tell a tile store as the run's input by name and digest; no path is told."""
        self._append("dataset", name=name, digest=digest, context=context, facts=dict(facts))

    def used_model(self, version: Registered) -> None:
        """Record a registered version as an input of the run."""
        self._append("used_model", uri=version.uri, model_id=version.model_id)

    def register(self, folder: Path, description: Description, parent: Registered | None) -> Registered | None:
        """Have a model folder logged as a pyfunc model, registered, and the alias `candidate` moved to the new version.

        The version, when the tracking store has made it within `tracking.wait_s`; None where that is left to `terravox sync`.
        """
        assert self._spool is not None
        name = self.settings.register_as or f"terravox-{description.modality}-{description.kind}"
        digest = sha256(folder / WEIGHTS)
        if (name, digest) not in self._known.models:
            self._known.models[name, digest] = self._append(
                "register",
                key=self._known.key,
                name=name,
                model_kind=description.kind,
                digest=digest,
                folder=os.path.relpath(folder.resolve(), self._spool.base.resolve()),
                parent=None if parent is None else {"uri": parent.uri, "model_id": parent.model_id},
            )
        self._drain(self.settings.wait_s)
        return self.registered

    def finished_part(self, folder: Path) -> None:
        """Publish what is left of a part of this run that an attempt before has finished; `folder` holds its spool.

        It is finished even where a kill kept it from saying so.
        """
        for spool in spools_in(folder)[-1:]:
            if spool.known().status != "FINISHED":
                spool.open()
                spool.append("end", status="FINISHED", tags={}, durable=True)
                spool.close()
            if self._publisher is not None and progress_of(spool).offset < spool.size():
                publisher = Publisher(spool, partial(Delivery, self.uri, spool), self._say)
                publisher.start()
                publisher.wake()
                self._children.append(publisher)

    @property
    def registered(self) -> Registered | None:
        """The version that the registry has made of the last model that was handed over; None where there is none yet."""
        return None if self._spool is None else registered_of(self._spool)

    @property
    def pending(self) -> bool:
        """Whether something that was told, by this run or a part of it, has not reached the tracking store."""
        return self._spool is not None and any(
            progress_of(spool).offset < spool.size() for spool in (self._spool, *(part.spool for part in self._children))
        )

    def facts(self) -> dict[str, Any]:
        """Where the run and its model are recorded, for `result.json`; `pending` where `terravox sync` is to finish that."""
        assert self._spool is not None
        if self._facts:
            return self._facts
        return {"uri": redacted(self.uri), **facts_of(self._spool)} | ({"pending": True} if self.pending else {})

    def told_metrics(self) -> dict[str, float]:
        """Last value of every metric that was told by step, in this attempt or before."""
        return {key: value for key, value in self._known.values.items() if not key.startswith("system/")}

    def _begin(
        self, parent: Tracker | None, name: str, run_id: str | None, config: Mapping[str, Any], tags: Mapping[str, str], step: int | None
    ) -> None:
        params = {key: str(value)[:6000] for key, value in flatten(config).items()}
        spool, known = self._find(name, run_id, params)
        is_new = not known.key
        if is_new:
            known.key = new_key()
            hidden = {"mlflow.user": _pseudonym(), "mlflow.source.name": tags["source"], "mlflow.source.type": "LOCAL", **_commit()}
            spool.append(
                "begin",
                key=known.key,
                name=name,
                experiment=self.settings.experiment,
                uri=None if self._default else redacted(self.uri),
                run_id=run_id,
                parent=None if parent is None or parent._spool is None else os.path.relpath(parent._spool.folder, spool.base),  # noqa: SLF001
                params={} if run_id else params,
                tags={**tags, **hidden},
            )
        number = known.attempts + 1
        from_step = 0 if step is None else step
        facts = {"attempt": str(number), **({} if step is None else {"resumed_from_step": str(step)})}
        job = next((f"{key.partition('_')[0].lower()} {os.environ[key]}" for key in JOBS if os.environ.get(key)), "")
        about = ", ".join(part for part in (f"from step {from_step}" if step is not None else "", job) if part)
        facts |= ({"job": job} if job else {}) | {f"attempt.{number}": about or "begun"}
        end = spool.append("attempt", durable=True, number=number, from_step=from_step, tags={**tags, **facts})
        self._spool, self._known, self._gated = spool, spool.known(), step is not None
        if self.uri == OFFLINE:
            return
        self._publisher = Publisher(spool, partial(Delivery, self.uri, spool), self._say)
        self._publisher.start()
        if parent is None or parent._publisher is None or not parent._publisher.lost:  # noqa: SLF001
            try:
                self._publisher.begun(end, START_WAIT_S)
            except UnusableError as error:
                spool.close()
                if is_new:
                    shutil.rmtree(spool.folder, ignore_errors=True)
                raise TrackingError(str(error)) from error

    def _find(self, name: str, run_id: str | None, params: Mapping[str, str]) -> tuple[Spool, Known]:
        """The spool of the run that is gone on with, ready to be added to, or a new one."""
        for spool in reversed(spools_in(self.folder)):
            known = spool.known()
            same = (known.key, progress_of(spool).run_id).count(run_id) if run_id else (known.name, known.params) == (name, params)
            if same and (run_id or known.status != "FINISHED"):
                return spool, spool.open()
        spool = new_spool(self.folder)
        return spool, spool.open()

    def _append(self, kind: str, **content: Any) -> int:
        """Add a line, the number of bytes behind it; an error of the disk ends no training, it is told once."""
        assert self._spool is not None
        try:
            end = self._spool.append(kind, **content)
        except OSError as error:
            self._lose(error)
            return 0
        if self._publisher is not None:
            self._publisher.wake()
        return end

    def _keep(self, name: str, write: Callable[[Path], object], kind: str, **content: Any) -> None:
        """Write a file beside the spool and add a line that names it."""
        assert self._spool is not None
        path = self._spool.folder / "files" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            self._lose(error)
            path.unlink(missing_ok=True)
            return
        self._append(kind, file=str(path.relative_to(self._spool.base)), **content)

    def _lose(self, error: OSError) -> None:
        if not self._told_full:
            self._say(f"[yellow]what is to be tracked cannot be written down[/] ({error.strerror}); it is lost until that is mended")
        self._told_full = True

    def _sample(self, values: dict[str, float], step: int) -> None:
        self._append("metrics", values=values, step=step)

    def _drain(self, limit_s: float) -> bool:
        """Wait until all is published, told on the console if it takes long."""
        if self._publisher is None:
            return False
        quick = min(limit_s, QUIET_WAIT_S)
        if self._publisher.drain(quick):
            return True
        if self._publisher.lost or quick == limit_s:
            return self._publisher.drain(limit_s - quick)
        self._say(f"the tracking store is slow; it is given up to {limit_s:.0f} s")
        return self._publisher.drain(limit_s - quick)

    def _end(self, parent: Tracker | None, status: str, tags: Mapping[str, str], limit_s: float) -> None:
        """Tell how it ended, and wait for what is not published; a part leaves that to the whole."""
        assert self._spool is not None
        self._append("end", status=status, tags=dict(tags), durable=True)
        self._spool.close()
        if self._publisher is None:
            return
        if parent is not None:
            parent._children += [*self._children, self._publisher]  # noqa: SLF001
            return
        until = time.monotonic() + limit_s
        self._drain(limit_s)
        for publisher in self._children:
            publisher.drain(max(0.0, until - time.monotonic()))
        for publisher in (self._publisher, *self._children):
            publisher.stop()
        if self._passing and not self.pending:
            self._facts = self.facts()
            self._tidy()

    def _tidy(self) -> None:
        """Delete what was told, now that it has been published: nobody goes on with such a run."""
        assert self._spool is not None
        shutil.rmtree(self._spool.folder, ignore_errors=True)
        with suppress(OSError):  # another run's spool lies beside it
            self.folder.rmdir()

    def _leave(self) -> None:
        """Neither tell nor publish anything more."""
        assert self._spool is not None
        self._spool.close()
        for publisher in (self._publisher, *self._children):
            if publisher is not None:
                publisher.stop()


def facts_of(spool: Spool) -> dict[str, Any]:
    """Where a run and its model are recorded; as long as no store has made the run, its id is the spool's key and there is no address."""
    progress = progress_of(spool)
    version = registered_of(spool)
    facts: dict[str, Any] = {"uri": progress.uri} if progress.uri else {}
    facts["run_id"] = progress.run_id or spool.known().key
    if version is not None:
        facts |= {"model": version.uri, "model_id": version.model_id, "alias": f"models:/{version.name}@candidate"}
    return facts | ({"refused": progress.refused} if progress.refused else {})


def registered_of(spool: Spool) -> Registered | None:
    """The version that the registry has made of the last model of a spool; None where there is none yet."""
    notes = progress_of(spool).models
    last = notes[max(notes, key=int)] if notes else {}
    return Registered(last["name"], int(last["version"]), last["model_id"]) if "version" in last else None


_running: ContextVar[Tracker | None] = ContextVar("running", default=None)


def _pseudonym() -> str:
    """A name that tells users apart and does not name them."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    return "user-" + hashlib.blake2b(user.encode(), digest_size=4).hexdigest()


def _commit() -> dict[str, str]:
    """Tag of the commit of our code; none where it is no checkout or there is no git."""
    package = Path(__file__).resolve().parents[1]
    if not (package / ".git").exists():
        return {}
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=package, capture_output=True, text=True, check=False)  # noqa: S607
    except OSError:
        return {}
    return {"mlflow.source.git.commit": found.stdout.strip()} if found.returncode == 0 else {}
