"""Whether runs can be recorded: a database that can be read and written, or a server that answers in time and is new enough."""

from __future__ import annotations

import http.client
import ipaddress
import os
import sqlite3
import ssl
from base64 import b64encode
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.version import InvalidVersion, Version

from mae_core.file_systems import is_network, kind_of
from pipelines.doctor_disk import existing
from pipelines.findings import Finding, fine, problem, warning

LEAST_SERVER = "3.15"
TIMEOUT_S = 3.0
TABLES = {"alembic_version", "experiments", "runs", "metrics"}
SUBJECT = "tracking"


def tracking_findings(uri: str, environment: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """What stands in the way of recording runs at an address.

    Args:
        uri: Of a tracking store.
        environment: Where user and password may stand.
        timeout_s: Longest time that a server has for an answer.
    """
    if uri == "offline":
        return [fine(SUBJECT, "offline: only in the run's folder, until terravox sync tells it")]
    if uri.startswith("sqlite:///"):
        return database_findings(Path(uri.removeprefix("sqlite:///")))
    if uri.startswith(("http://", "https://")):
        return server_findings(uri, environment, timeout_s)
    kind = uri.partition("://")[0] if "://" in uri else "a bare folder"
    return [warning(SUBJECT, f"{kind}: it is not looked at here", "use sqlite:///PATH/mlflow.db or an http address")]


def database_findings(file: Path) -> list[Finding]:
    """Of an SQLite database, which need not be there yet; it is only read."""
    place = existing(file)
    if place.is_dir() and file.exists():
        return [problem(SUBJECT, f"{file} is a folder", "give the name of a file")]
    kind = kind_of(existing(file.parent))
    if is_network(kind):
        advice = "locks cannot be trusted there: give a path on a local disk, or the http address of a server"
        return [problem(SUBJECT, f"an SQLite database on a network file system ({kind})", advice)]
    folder = file.parent if file.exists() else place
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        return [problem(SUBJECT, f"{folder} may not be written to", "SQLite writes beside its database: choose another place")]
    if not file.exists():
        return [fine(SUBJECT, f"{file} will be made")]
    if not os.access(file, os.R_OK | os.W_OK):
        return [problem(SUBJECT, f"{file} may not be read and written", "have it given to you, or choose another")]
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_S)) as database:
            tables = {str(row[0]) for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            runs = int(database.execute("SELECT count(*) FROM runs").fetchone()[0]) if tables >= TABLES else 0
    except sqlite3.DatabaseError as error:
        return [problem(SUBJECT, f"{file} cannot be read: {error}", "restore it from a copy, or choose another")]
    if tables and not tables >= TABLES:
        return [problem(SUBJECT, f"{file} is no database of MLflow", "choose another")]
    return [fine(SUBJECT, f"{file}, {runs} runs" if tables else f"{file}, still empty")]


def server_findings(uri: str, environment: Mapping[str, str], timeout_s: float) -> list[Finding]:
    """Of a server: whether it answers, how old it is, and whether what it is told can be read on the way."""
    address = urlsplit(uri)
    where = f"{address.scheme}://{address.hostname}" + (f":{address.port}" if address.port else "")
    found = []
    if address.scheme == "http" and not _is_loopback(address.hostname or ""):
        found.append(warning(SUBJECT, f"{where} without TLS", "names, figures and the password can be read on the way: put TLS before it"))
    user = unquote(address.username or "") or environment.get("MLFLOW_TRACKING_USERNAME", "")
    password = unquote(address.password or "") or environment.get("MLFLOW_TRACKING_PASSWORD", "")
    headers = {"Authorization": "Basic " + b64encode(f"{user}:{password}".encode()).decode()} if user else {}
    try:
        status, _ = _get(uri, "/health", headers, timeout_s)
        told, text = _get(uri, "/version", headers, timeout_s)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        advice = "training will not wait for it, but nobody sees the run until it is back; start it, or say tracking.uri=offline"
        return [*found, problem(SUBJECT, f"{where} cannot be reached: {reason}", advice)]
    if 403 in (status, told):
        return [
            *found,
            problem(SUBJECT, f"{where} refuses us (403)", "list its name in its --allowed-hosts, or ask for the right"),
        ]
    if 401 in (status, told):
        return [*found, problem(SUBJECT, f"{where} wants a password (401)", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")]
    if status != 200:
        return [*found, problem(SUBJECT, f"{where}/health answers {status}", "look whether that is an MLflow server, and at its log")]
    try:
        number = Version(text.strip()) if told == 200 else None
    except InvalidVersion:
        number = None
    if number is None:
        return [
            *found,
            warning(SUBJECT, f"{where} does not say its version", f"look whether it is MLflow {LEAST_SERVER} or later"),
        ]
    if number < Version(LEAST_SERVER):
        advice = f"earlier ones than {LEAST_SERVER} let strangers read files: update the server"
        return [*found, problem(SUBJECT, f"{where} is MLflow {number}", advice)]
    return [*found, fine(SUBJECT, f"{where}, MLflow {number}")]


def _get(uri: str, path: str, headers: Mapping[str, str], timeout_s: float) -> tuple[int, str]:
    """Status and beginning of the answer; no redirection is followed."""
    address = urlsplit(uri)
    host, port = address.hostname or "", address.port
    if address.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=timeout_s, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    with closing(connection):
        connection.request("GET", address.path.rstrip("/") + path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read(200).decode("utf-8", "replace")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
