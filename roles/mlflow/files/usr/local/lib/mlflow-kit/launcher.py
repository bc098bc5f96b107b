"""Run one instance of the MLflow server, or migrate its database, in this very process.

Versions from 2.22 on are served: the FastAPI application where there is one, else the Flask application alone.

`mlflow server` keeps a whole second interpreter alive as the parent of its workers and hands its settings to
them in their environment, where `ps` shows them. Here the settings come from the unit's EnvironmentFile, the
secrets from systemd credentials, and both stay in this process.

There are two lanes. `serve` has everything that MLflow serves; `rest` has the tracking and registry API alone, by the
Flask application that answers it in both, without an event loop and a second framework before it.

Usage: launcher.py serve INSTANCE | rest INSTANCE | migrate | upgrade | schema SINCE | rewrap | routes
       | check-settings FILE
"""

from __future__ import annotations

import contextvars
import gc
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import typing
import uuid

# Names that Python, its libraries and libpq read, and that no list of MLflow or botocore holds.
ELSEWHERE = {"TMPDIR", "HOME", "PATH", "LANG", "LC_ALL", "TZ", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_"}
ELSEWHERE |= {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PGPASSFILE"}
ELSEWHERE |= {"PGSSLROOTCERT", "PGSSLMODE", "PGAPPNAME", "PGCONNECT_TIMEOUT", "PGTARGETSESSIONATTRS"}
ELSEWHERE |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
# The launcher's own.
OURS = {"MLFLOW_KIT_SHUTDOWN_SECONDS", "MLFLOW_KIT_AUTH_DATABASE_URI"}
OURS |= {"MLFLOW_KIT_REST_PORT", "MLFLOW_KIT_REST_THREADS", "MLFLOW_KIT_REST_PATHS", "MLFLOW_KIT_SHORTCUTS"}
# What the kit sets for every version, whether the installed one reads it or not.
OURS |= {"MLFLOW_CRYPTO_KEK_VERSION", "MLFLOW_CRYPTO_KEK_PASSPHRASE", "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"}
OURS |= {"MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "MLFLOW_SERVER_X_FRAME_OPTIONS"}
OURS |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "MLFLOW_DISABLE_TELEMETRY"}
OURS |= {"MLFLOW_ENABLE_MULTIPART_UPLOAD", "MLFLOW_ENABLE_MULTIPART_DOWNLOAD"}
# What the command line of the server hands to its workers: public name to the internal one.
HANDED = {
    "MLFLOW_BACKEND_STORE_URI": "BACKEND_STORE_URI_ENV_VAR",
    "MLFLOW_READ_REPLICA_BACKEND_STORE_URI": "READ_REPLICA_BACKEND_STORE_URI_ENV_VAR",
    "MLFLOW_REGISTRY_STORE_URI": "REGISTRY_STORE_URI_ENV_VAR",
    "MLFLOW_DEFAULT_ARTIFACT_ROOT": "ARTIFACT_ROOT_ENV_VAR",
    "MLFLOW_ARTIFACTS_DESTINATION": "ARTIFACTS_DESTINATION_ENV_VAR",
    "MLFLOW_SERVE_ARTIFACTS": "SERVE_ARTIFACTS_ENV_VAR",
    "MLFLOW_ARTIFACTS_ONLY": "ARTIFACTS_ONLY_ENV_VAR",
    "MLFLOW_EXPOSE_PROMETHEUS": "PROMETHEUS_EXPORTER_ENV_VAR",
}
# What computes and draws: MLflow goes without it where it is not installed, and no answer of its server needs it.
UNNEEDED = {"scipy", "sklearn", "matplotlib", "pyarrow"}
# Data frames: half of a process's memory, and nothing that the tracking API needs.
FRAMES = {"pandas"}
# What MLflow's own questions of a large experiment want and its schema lacks: name, table, what is indexed. Its
# migrations neither know nor mind them: columns that change take their indexes along.
INDEXES = (
    # The list of runs, newest first, in the very words of its ORDER BY: otherwise all runs are sorted for each page.
    (
        "mlflow_kit_runs_newest",
        "runs (experiment_id, lifecycle_stage, (CASE WHEN start_time IS NULL THEN 1 ELSE 0 END), start_time DESC, "
        "run_uuid)",
    ),
    # Runs whose metric is below or above something.
    ("mlflow_kit_latest_metrics_value", "latest_metrics (key, value) INCLUDE (run_uuid, is_nan)"),
)
log = logging.getLogger("mlflow-kit")
# Which request of the gateway's log a thread or task is at.
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")


def _true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


def load_secrets() -> list[dict[str, typing.Any]]:
    """Put the unit's credentials into this process: `secrets` (a JSON object) and `pgpass`.

    Returns further passphrases of secrets in the database (passphrase and version), if one is being rotated.

    They are set in the interpreter only, so that /proc/PID/environ and `ps e` do not show them. libpq wants a
    file that nobody else may read, which a credential's access list does not look like to it: hence the copy
    in the unit's private runtime directory.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return []
    held = pathlib.Path(folder)
    if (held / "secrets").exists():
        os.environ.update(json.loads((held / "secrets").read_text()))
    if (held / "pgpass").exists():
        copy = pathlib.Path(os.environ["RUNTIME_DIRECTORY"]) / "pgpass"
        copy.unlink(missing_ok=True)
        with os.fdopen(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write((held / "pgpass").read_text())
        os.environ["PGPASSFILE"] = str(copy)
    further = held / "kek_further.json"
    found: list[dict[str, typing.Any]] = json.loads(further.read_text()) if further.exists() else []
    return found


def accept_further(further: list[dict[str, typing.Any]]) -> None:
    """Let secrets in the database be read by `further` passphrases, too.

    MLflow itself knows one at a time, so that it would have to stand still while the secrets are wrapped anew. The
    function that opens a secret's own key is asked again with the other keys when the current one does not fit.
    Raises SystemExit when the installed version has no such function.
    """
    if not further:
        return
    if importlib.util.find_spec("mlflow.utils.crypto") is None:
        return  # a version without secrets in its database
    from mlflow.exceptions import MlflowException
    from mlflow.utils import crypto

    if not hasattr(crypto, "unwrap_dek"):
        sys.exit("the installed MLflow has no mlflow.utils.crypto.unwrap_dek: no passphrase can be rotated with it")
    plain = crypto.unwrap_dek
    # Deriving a key takes a good part of a second: once, not for each secret.
    keys = [crypto.KEKManager(one["passphrase"], one["version"]).get_kek() for one in further]

    def unwrap_dek(wrapped: bytes, key: bytes) -> bytes:
        for one in [key, *keys]:
            try:
                return bytes(plain(wrapped, one))
            except MlflowException:
                continue
        return bytes(plain(wrapped, key))

    unwrap_dek.plain = plain  # type: ignore[attr-defined]
    crypto.unwrap_dek = unwrap_dek


def rewrap(further: list[dict[str, typing.Any]]) -> None:
    """Wrap the secrets in the database with the current passphrase that are wrapped with an older one of `further`.

    MLflow's own command does it, in one transaction. Nobody may change a secret between its reading and its writing:
    where somebody does, PostgreSQL refuses the whole, and it is done again. Afterwards each secret is opened with the
    current passphrase and with each older one, and the counts are left in the state directory. Raises SystemExit.
    """
    version = int(os.environ.get("MLFLOW_CRYPTO_KEK_VERSION", "1"))
    report = {"version": version, "rewrapped": 0, "opened": 0, "refused": 0}
    place = pathlib.Path(os.environ["STATE_DIRECTORY"]) / "rewrapped.json"
    if importlib.util.find_spec("mlflow.utils.crypto") is None:
        place.write_text(json.dumps(report))
        return
    # libpq reads it when it connects.
    os.environ["PGOPTIONS"] = "-c default_transaction_isolation=repeatable\\ read"
    from mlflow.cli.crypto import rotate_kek
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking.dbmodels.models import SqlGatewaySecret
    from mlflow.tracking import _get_store
    from mlflow.utils import crypto

    passphrase, uri = os.environ["MLFLOW_CRYPTO_KEK_PASSPHRASE"], os.environ["MLFLOW_BACKEND_STORE_URI"]
    older = [one for one in further if one["version"] == version - 1]
    store = _get_store(uri)

    def versions() -> list[int]:
        with store.ManagedSessionMaker() as session:
            return [int(row[0]) for row in session.query(SqlGatewaySecret.kek_version)]

    for one in older:
        report["rewrapped"] += versions().count(one["version"])
        os.environ["MLFLOW_CRYPTO_KEK_PASSPHRASE"] = one["passphrase"]
        os.environ["MLFLOW_CRYPTO_KEK_VERSION"] = str(one["version"])
        for attempt in range(5):
            try:
                rotate_kek.callback(passphrase, uri, True)
                break
            except MlflowException as error:
                if attempt == 4 or "could not serialize" not in str(error):
                    raise
                log.info("a secret was changed meanwhile: once more")
    os.environ["MLFLOW_CRYPTO_KEK_PASSPHRASE"], os.environ["MLFLOW_CRYPTO_KEK_VERSION"] = passphrase, str(version)

    strange = [found for found in versions() if found != version]
    if strange:
        sys.exit(
            f"{len(strange)} secrets are of passphrase version {sorted(set(strange))}, not {version}: keep the old"
        )
    unwrap = getattr(crypto.unwrap_dek, "plain", crypto.unwrap_dek)
    current = crypto.KEKManager(passphrase, version).get_kek()
    old = [crypto.KEKManager(one["passphrase"], one["version"]).get_kek() for one in older]
    with store.ManagedSessionMaker() as session:
        for (wrapped,) in session.query(SqlGatewaySecret.wrapped_dek):
            unwrap(wrapped, current)
            report["opened"] += 1
            report["refused"] += not any(_opens(unwrap, wrapped, key) for key in old)
    if report["refused"] != report["opened"]:
        sys.exit("an old passphrase still opens a secret")
    place.write_text(json.dumps(report))


def _opens(unwrap: typing.Callable[[bytes, bytes], bytes], wrapped: bytes, key: bytes) -> bool:
    try:
        unwrap(wrapped, key)
    except Exception:
        return False
    return True


def _folder(package: str) -> pathlib.Path:
    """The folder of an installed package, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        sys.exit(f"{sys.prefix} holds no {package}")
    return pathlib.Path(found.origin).parent


def _source(package: str, *places: str) -> str:
    """The text of those files of an installed package, given by their paths in it, that this version has."""
    paths = [_folder(package) / place for place in places]
    return "\n".join(path.read_text() for path in paths if path.exists())


# Where the internal names stand: in a module of their own from 3.5 on.
INTERNAL = ("server/constants.py", "server/__init__.py")


def internal_names() -> dict[str, str]:
    """Public name to the name that the installed version hands to its workers.

    Raises SystemExit when the version does not know one that is set.
    """
    found = dict(re.findall(r'^([A-Z_]+) = "([^"]+)"', _source("mlflow", *INTERNAL), re.MULTILINE))
    missing = sorted(public for public, constant in HANDED.items() if constant not in found and os.environ.get(public))
    if missing:
        sys.exit(f"the installed MLflow has nothing that {', '.join(missing)} could be handed to")
    return {public: found[constant] for public, constant in HANDED.items() if constant in found}


def known_names() -> set[str]:
    """Every environment name that the installed MLflow and botocore, or what they stand on, read.

    Taken from their sources: importing them would take seconds at every change of a setting.
    """
    names = ELSEWHERE | OURS | set(HANDED)
    settings = _source("mlflow", "environment_variables.py")
    names |= set(re.findall(r'Variable\(\s*"(_?MLFLOW_[A-Z0-9_]+)"', settings))
    names |= set(re.findall(r"^(MLFLOW_[A-Z0-9_]+) = ", settings, re.MULTILINE))
    options = _source("mlflow", "cli/__init__.py", "cli.py", "utils/cli_args.py")
    names |= set(re.findall(r'envvar="([A-Z0-9_]+)"', options))
    names |= set(re.findall(r'"(MLFLOW_[A-Z_]+)"', _source("mlflow", *INTERNAL)))
    return names | set(re.findall(r"'(AWS_[A-Z0-9_]+)'", _source("botocore", "configprovider.py")))


def unread(names: typing.Iterable[str]) -> list[str]:
    """Those of `names` that look like settings of MLflow, S3 or AWS and that nothing reads, sorted."""
    looks = re.compile(r"^(MLFLOW_|AWS_|S3_|GUNICORN_|BOTO)")
    return sorted({name for name in names if looks.match(name)} - known_names())


def names_in(path: pathlib.Path) -> list[str]:
    """The names that an environment file sets."""
    return re.findall(r"^([A-Za-z_][A-Za-z0-9_]*)=", path.read_text(), re.MULTILINE)


def notify(state: str) -> None:
    """Tell systemd `state` (see sd_notify(3)); does nothing outside a unit of Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            channel.sendall(state.encode())


def revisions(*folders: str) -> tuple[set[str], str]:
    """The revisions of a schema that the installed MLflow knows, and the newest of them.

    Read from the migrations' own files in `folders` of the package: importing MLflow would take seconds. The
    newest is empty when this version keeps no such schema. Raises SystemExit when there is not exactly one.
    """
    known: set[str] = set()
    earlier: set[str] = set()
    for path in _folder("mlflow").joinpath(*folders).glob("*.py"):
        text = path.read_text()
        for name, value in re.findall(r"^(revision|down_revision)(?::[^=]+)? = (.+)$", text, re.MULTILINE):
            (known if name == "revision" else earlier).update(re.findall(r"[\"']([0-9a-z_]+)[\"']", value))
    newest = known - earlier
    if len(newest) > 1:
        sys.exit(f"the installed MLflow's migrations in {'/'.join(folders)} have {len(newest)} ends instead of one")
    return known, "".join(newest)


def _found_revision(uri: str, table: str) -> str:
    """The revision that a database says it has in `table`; empty for a database without tables."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    with engine.connect() as connection:
        if not sqlalchemy.inspect(connection).has_table(table):
            return ""
        rows = connection.execute(sqlalchemy.text(f"SELECT version_num FROM {table}")).fetchall()
    return ",".join(sorted(row[0] for row in rows))


def schemas() -> list[dict[str, typing.Any]]:
    """Each database of the service: `name`, `found` and `wanted` revision, and whether this MLflow knows `found`."""
    uri, users = os.environ["MLFLOW_BACKEND_STORE_URI"], os.environ.get("MLFLOW_KIT_AUTH_DATABASE_URI", "")
    places = [("tracking", uri, "alembic_version", ("store", "db_migrations", "versions"))]
    if users:
        places.append(("users", users, "alembic_version_auth", ("server", "auth", "db", "migrations", "versions")))
    told = []
    for name, where, table, folders in places:
        known, wanted = revisions(*folders)
        found = _found_revision(where, table)
        if not found and where != uri:  # as versions before 3.10 name it, in a database of its own
            found = _found_revision(where, "alembic_version")
        told.append({"name": name, "found": found, "wanted": wanted, "known": not found or found in known})
    return told


def _written_since(uri: str, seconds: float) -> dict[str, int]:
    """How many runs and model versions have begun since a time (seconds since the epoch)."""
    import sqlalchemy

    asked = {"runs": ("runs", "start_time"), "model versions": ("model_versions", "creation_time")}
    found = {}
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    with engine.connect() as connection:
        for words, (table, column) in asked.items():
            count = sqlalchemy.text(f"SELECT count(*) FROM {table} WHERE {column} >= :since")
            if sqlalchemy.inspect(connection).has_table(table):
                found[words] = int(connection.execute(count, {"since": int(seconds * 1000)}).scalar_one())
    return found


def schema(since: float) -> None:
    """Print what the installed MLflow is and how its schema stands to that of the database, as JSON. Run by root.

    `since` (seconds since the epoch; 0 for none) adds what was written after that.
    """
    for line in pathlib.Path("/etc/mlflow/mlflow.env").read_text().splitlines():
        name, _, value = line.partition("=")
        if name.startswith("MLFLOW_"):
            os.environ[name] = value.strip('"').replace('\\"', '"').replace("\\\\", "\\")
    os.environ["PGPASSFILE"] = "/etc/mlflow/pgpass"
    os.environ["PGCONNECT_TIMEOUT"] = "10"
    version = re.findall(r'^VERSION\b[^"]*"([^"]+)"', _source("mlflow", "version.py"), re.MULTILINE)[0]
    told = schemas()
    print(
        json.dumps(
            {
                "version": version,
                "prefix": sys.prefix,
                "schemas": told,
                # What a database without tables has is not a change.
                "changes": any(one["found"] and one["found"] != one["wanted"] for one in told),
                "known": all(one["known"] for one in told),
                "found": "/".join(one["found"] for one in told),
                "wanted": "/".join(one["wanted"] for one in told),
                "written": _written_since(os.environ["MLFLOW_BACKEND_STORE_URI"], since) if since else {},
            }
        )
    )


def refuse_a_change() -> None:
    """End this process when the database holds another schema than the installed version's.

    A deployment migrates new databases only; what holds data is migrated by the upgrade, with its way back.
    """
    behind = [one for one in schemas() if one["found"] and one["found"] != one["wanted"]]
    for one in behind:
        log.error(
            "the %s database has the schema %s, this MLflow wants %s: run playbooks/upgrade.yml, which saves the "
            "database first and has a way back",
            one["name"],
            one["found"],
            one["wanted"],
        )
    if behind:
        sys.exit(1)


def wait_for_go(seconds: int = 900) -> None:
    """Import what a migration needs, and wait for the file `go` in the unit's runtime directory.

    The imports take seconds in which nobody need wait. Raises SystemExit when no word comes.
    """
    import alembic.command  # noqa: F401
    import mlflow.cli  # noqa: F401
    import mlflow.store.db.utils  # noqa: F401
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    go, end = pathlib.Path(os.environ["RUNTIME_DIRECTORY"]) / "go", time.monotonic() + seconds
    while not go.exists():
        if time.monotonic() > end:
            sys.exit(f"no word to begin came within {seconds} s")
        time.sleep(0.05)


def migrate() -> None:
    """Bring the database to the installed version's schema, one host at a time.

    The lock is PostgreSQL's own: MLflow takes none that spans hosts. What was done is remembered in the state
    directory, so that the next deployment need not start an interpreter to find nothing to do.
    """
    import mlflow.cli
    import sqlalchemy

    uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
    lock = None
    if uri.startswith("postgresql"):
        lock = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool).connect()
        lock.execute(sqlalchemy.text("SELECT pg_advisory_lock(hashtext('mlflow-kit'))"))
    log.info("migrating the schema to MLflow %s", mlflow.__version__)
    from mlflow.store.db import utils

    if not hasattr(utils, "_is_empty_database") and not _found_revision(uri, "alembic_version"):
        # Earlier versions' command leaves the first tables to the server.
        utils._initialize_tables(utils.create_sqlalchemy_engine_with_retry(uri))
    mlflow.cli.cli(["db", "upgrade", uri], standalone_mode=False)
    # Instances that start on a new database at once would all make the first experiment, and all but one fail.
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifact_root())
    if lock is not None:
        index(uri)
    users = os.environ.get("MLFLOW_KIT_AUTH_DATABASE_URI", "")
    if users:
        from mlflow.server import auth

        log.info("migrating the database of users, and making the first of them")
        if hasattr(auth, "bootstrap_admin_user"):
            auth.bootstrap_admin_user()
        else:
            auth.create_app()
    if lock is not None:
        lock.close()
    # Which login it was done by does not matter: rotations change that.
    stamp = re.sub(r"//[^/@]*@", "//", f"{pathlib.Path(sys.prefix).resolve()} {uri} {users}")
    (pathlib.Path(os.environ["STATE_DIRECTORY"]) / "migrated").write_text(
        hashlib.sha256(stamp.encode()).hexdigest() + "\n"
    )


def index(uri: str) -> None:
    """Make those of INDEXES that a PostgreSQL lacks. They are for speed: one that cannot be made is only told of."""
    import sqlalchemy

    with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool).connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        # Whoever works on the table is not to wait for long behind this, which waits for others.
        connection.execute(sqlalchemy.text("SET lock_timeout = '5s'"))
        for name, what in INDEXES:
            try:
                connection.execute(sqlalchemy.text(f"CREATE INDEX IF NOT EXISTS {name} ON {what}"))
            except sqlalchemy.exc.DBAPIError as error:
                log.warning("no index %s: %s", name, str(error.orig).strip())


def artifact_root() -> str:
    """Where experiments keep their artifacts when they name no place of their own."""
    from mlflow.utils.server_cli_utils import resolve_default_artifact_root

    named = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT", "")
    uri = os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
    return named or str(resolve_default_artifact_root(_true("MLFLOW_SERVE_ARTIFACTS"), "", uri))


def _start_jobs(handed: dict[str, str], address: str) -> None:
    from mlflow.server.jobs.utils import _check_requirements, _launch_job_execution_runner

    uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
    _check_requirements(uri)
    _launch_job_execution_runner(
        {**handed, "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_TRACKING_URI": address}, os.getpid()
    )


def _prepare(kind: str) -> dict[str, str]:
    """Set up the environment that the command line would hand to a worker of `kind`, and return what it hands over."""
    notify("STATUS=importing")
    # Imports make many objects and next to no garbage: looking for it is a fifth of the time that a start takes.
    gc.disable()
    artifacts = _true("MLFLOW_SERVE_ARTIFACTS")
    os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = artifact_root()
    os.environ["MLFLOW_SERVE_ARTIFACTS"] = "true" if artifacts else ""
    os.environ["MLFLOW_ARTIFACTS_ONLY"] = "true" if _true("MLFLOW_ARTIFACTS_ONLY") else ""
    os.environ.setdefault("MLFLOW_REGISTRY_STORE_URI", os.environ.get("MLFLOW_BACKEND_STORE_URI", ""))
    handed = {inner: os.environ[name] for name, inner in internal_names().items() if os.environ.get(name)}
    handed |= {"_MLFLOW_SERVER_BOOT_ID": uuid.uuid4().hex, "_MLFLOW_SGI_NAME": kind}
    if _true("MLFLOW_SERVER_ENABLE_JOB_EXECUTION"):
        # The instances of a host share one queue; the first of them runs what works it off.
        queue = pathlib.Path(os.environ["STATE_DIRECTORY"]) / "jobs"
        queue.mkdir(exist_ok=True)
        handed["_MLFLOW_HUEY_STORAGE_PATH"] = str(queue)
    if not os.environ.get("MLFLOW_KIT_AUTH_DATABASE_URI"):
        # A search would import it, and data frames with it, to find that nobody is asked who they are.
        sys.modules["mlflow.server.auth"] = None  # type: ignore[assignment]
    # The migration has made the first user, under its lock.
    handed["_MLFLOW_AUTH_ADMIN_BOOTSTRAPPED"] = "true"
    os.environ.update(handed)
    return handed


def _open_stores() -> None:
    """Open both stores; their own errors are raised when they do not answer."""
    from mlflow.server import handlers

    # Refused when the settings are written; after a way back to an older version it serves all the same.
    stray = unread(os.environ)
    if stray:
        log.error("the installed MLflow reads no %s: correct mlflow_environment", ", ".join(stray))
    if not _true("MLFLOW_ARTIFACTS_ONLY"):
        if _true("MLFLOW_KIT_SHORTCUTS"):
            import shortcuts

            shortcuts.take()
        notify("STATUS=opening the stores")
        uri = os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
        handlers.initialize_backend_stores(
            uri, os.environ["MLFLOW_REGISTRY_STORE_URI"], os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"]
        )


class Absent:
    """Lets the imports of some packages fail as if they were not installed, for as long as a `with` lasts.

    What a rare request imports later on, it gets.
    """

    def __init__(self, names: set[str]) -> None:
        """Take the packages' names."""
        self.names = names

    def __enter__(self) -> None:
        """Begin."""
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        """End."""
        sys.meta_path.remove(self)  # type: ignore[arg-type]

    def find_spec(self, name: str, path: typing.Any = None, target: typing.Any = None) -> None:
        """Refuse the packages by the error that an import of a missing one raises."""
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def mark_log() -> None:
    """Let every line of the log name the request that it belongs to, as the gateway's log names it."""
    formatter = logging.Formatter("%(levelname)s %(name)s [%(request)s]: %(message)s")
    plain = logging.getLogRecordFactory()

    def record(*args: typing.Any, **more: typing.Any) -> logging.LogRecord:
        made = plain(*args, **more)
        made.request = request_id.get()
        return made

    logging.setLogRecordFactory(record)
    for logger in (logging.getLogger(), *map(logging.getLogger, ("mlflow", "alembic", "uvicorn"))):
        for handler in logger.handlers:
            handler.setFormatter(formatter)


class Marked:
    """An application, WSGI or ASGI, that knows which request it is at."""

    def __init__(self, app: typing.Any) -> None:
        """Wrap `app`."""
        self.app = app

    def wsgi(self, environ: dict[str, typing.Any], start: typing.Any) -> typing.Any:
        """Answer as a WSGI application."""
        request_id.set(environ.get("HTTP_X_REQUEST_ID", "-"))
        return self.app(environ, start)

    async def __call__(self, scope: typing.Any, receive: typing.Any, send: typing.Any) -> None:
        """Answer as an ASGI application."""
        if scope["type"] == "http":
            held = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"-")
            request_id.set(held.decode("latin-1"))
        await self.app(scope, receive, send)


class Answer:
    """What is written to a socket, held back until it is flushed or much."""

    MUCH = 1 << 16

    def __init__(self, sock: socket.socket) -> None:
        """Take the socket."""
        self.sock = sock
        self.held = bytearray()
        self.bytes_written = 0

    def write(self, data: bytes) -> int:
        """Take `data`; returns how much. Raises OSError when the other side is gone."""
        self.held += data
        self.bytes_written += len(data)
        # Who was told to go on sends the rest only then.
        if len(self.held) > self.MUCH or data.startswith(b"HTTP/1.1 100 "):
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Send what is held. Raises OSError when the other side is gone."""
        data, self.held = self.held, bytearray()
        if data:
            self.sock.sendall(data)


def _settle() -> None:
    """Leave what was imported out of every later collection of garbage, which happens less often, too."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10000, 20, 50)
    gc.enable()


def serve(instance: int, further: list[dict[str, typing.Any]], first_port: int = 0) -> None:
    """Serve everything as the `instance`-th on this host (from 1): ports count up from `first_port`, or MLFLOW_PORT.

    `further` is what load_secrets returns.
    systemd learns that the instance is ready only when it listens and both stores have answered. Raises
    SystemExit for settings that the version does not read; the stores' own errors when they do not answer.
    """
    with Absent(UNNEEDED):
        accept_further(further)
        handed = _prepare("uvicorn")
        app: typing.Any
        if os.environ.get("MLFLOW_KIT_AUTH_DATABASE_URI"):
            from mlflow.server.auth import create_app

            app = create_app()
        elif _source("mlflow", "server/fastapi_app.py"):
            from mlflow.server.fastapi_app import app
        else:
            from mlflow.server import app
    import uvicorn

    if type(app).__name__ == "Flask":
        from a2wsgi import WSGIMiddleware

        app = WSGIMiddleware(app, workers=40)
    lost = misled(*routes_of(app), os.environ.get("MLFLOW_KIT_REST_PATHS", ""))
    if lost:
        # Never served by halves: an upgrade to such a version puts itself back.
        sys.exit(
            f"mlflow_rest_paths sends {', '.join(lost)} to the lane that has no such route in the installed MLflow: "
            "correct it, or set mlflow_rest_instances: 0"
        )
    _open_stores()
    mark_log()
    host, port = os.environ["MLFLOW_HOST"], (first_port or int(os.environ["MLFLOW_PORT"])) + instance - 1

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                notify(f"READY=1\nSTATUS=serving on {host} port {port}")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            notify("STOPPING=1\nSTATUS=finishing what is under way")
            await super().shutdown(sockets)

    config = uvicorn.Config(
        Marked(app),
        host=host,
        port=port,
        access_log=False,  # the gateway keeps it, with the user's name
        server_header=False,
        backlog=1024,
        timeout_keep_alive=90,  # longer than the gateway keeps its own: it must be the one that closes
        timeout_graceful_shutdown=int(os.environ.get("MLFLOW_KIT_SHUTDOWN_SECONDS", "30")),
        log_config=None,
    )
    if _true("MLFLOW_SERVER_ENABLE_JOB_EXECUTION") and instance == 1 and not first_port:
        _start_jobs(handed, f"http://{host}:{port}")
    _settle()
    Server(config).run()


def rest(instance: int, further: list[dict[str, typing.Any]]) -> None:
    """Serve the tracking and registry API as the `instance`-th on this host: ports count up from MLFLOW_KIT_REST_PORT.

    An environment from before there were lanes has no server for it: there everything is served. `further` is what
    load_secrets returns. Raises as `serve`.
    """
    first = int(os.environ["MLFLOW_KIT_REST_PORT"])
    if importlib.util.find_spec("cheroot") is None:
        serve(instance, further, first)
        return
    users = bool(os.environ.get("MLFLOW_KIT_AUTH_DATABASE_URI"))
    # MLflow's own users come with the other application, which does not go without data frames.
    with Absent(UNNEEDED if users else UNNEEDED | FRAMES):
        accept_further(further)
        _prepare("gunicorn")  # what MLflow calls servers of its Flask application
        from mlflow.server import app

        if users:
            from mlflow.server.auth import create_app

            create_app(app)
    _open_stores()
    mark_log()
    import cheroot.server
    import cheroot.wsgi

    class Connection(cheroot.server.HTTPConnection):  # type: ignore[misc]
        """Sends an answer's head and body at once, which wakes the gateway once, and gives up Python's lock once."""

        def __init__(self, server: typing.Any, sock: socket.socket, *more: typing.Any) -> None:
            super().__init__(server, sock, *more)
            self.wfile = Answer(sock)

        def communicate(self) -> bool:
            keep = super().communicate()
            try:
                self.wfile.flush()
            except OSError:
                return False  # whoever asked is gone
            return bool(keep)

    host, port = os.environ["MLFLOW_HOST"], first + instance - 1
    server = cheroot.wsgi.Server(
        (host, port),
        Marked(app).wsgi,
        numthreads=int(os.environ.get("MLFLOW_KIT_REST_THREADS", "4")),
        request_queue_size=1024,
        timeout=90,  # longer than the gateway keeps a connection: it must be the one that closes
        shutdown_timeout=int(os.environ.get("MLFLOW_KIT_SHUTDOWN_SECONDS", "30")),
        server_name="",
    )
    server.ConnectionClass = Connection

    def stop(*_: typing.Any) -> None:
        notify("STOPPING=1\nSTATUS=finishing what is under way")
        # It waits for the loop that this very thread is in.
        threading.Thread(target=server.stop).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    server.prepare()
    _settle()
    notify(f"READY=1\nSTATUS=serving on {host} port {port}")
    server.serve()


Route = tuple[str, str]


def routes_of(app: typing.Any) -> tuple[set[Route], set[Route]]:
    """Which (method, path) the application has of its own, and which by the Flask application within it."""
    from mlflow.server import app as flask

    own: set[Route] = set()
    contexts: typing.Any = getattr(app, "routes", [])
    if importlib.util.find_spec("fastapi"):
        from fastapi import routing

        if hasattr(routing, "iter_route_contexts"):  # where routers keep their routes to themselves
            contexts = routing.iter_route_contexts(contexts)
    for one in contexts:
        own |= {(method, one.path) for method in getattr(one, "methods", None) or () if one.path}
    inner = {(method, str(rule)) for rule in flask.url_map.iter_rules() for method in rule.methods or ()}
    return own, inner


def misled(own: set[Route], inner: set[Route], paths: str) -> list[str]:
    """The routes that the regular expression `paths` would lead to a lane which has them not, sorted.

    `own` are those of the full application alone, `inner` those of the Flask application.
    """
    if not paths:
        return []

    def shape(path: str) -> str:
        return re.sub(r"<[^>]*>|\{[^}]*\}", "x", path)

    there = {(method, shape(path)) for method, path in inner}
    lost = {(m, p) for m, p in own if re.search(paths, shape(p)) and (m, shape(p)) not in there}
    return sorted(f"{method} {path}" for method, path in lost)


def routes() -> None:
    """Print every route of the installed MLflow, and which lane has it, as JSON. Needs no database."""
    os.environ.setdefault("MLFLOW_SERVE_ARTIFACTS", "true")
    for name in ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_KIT_AUTH_DATABASE_URI"):
        os.environ.pop(name, None)
    _prepare("uvicorn")
    if _source("mlflow", "server/fastapi_app.py"):
        from mlflow.server.fastapi_app import app
    else:
        from mlflow.server import app
    own, inner = routes_of(app)
    paths = os.environ.get("MLFLOW_KIT_REST_PATHS", "")
    print(json.dumps({"own": sorted(own), "flask": sorted(inner), "misled": misled(own, inner, paths)}))


def stay_in_place() -> None:
    """Go on under the environment's own path, when it was reached by a link.

    What is imported later would else come from wherever the link leads by then: from another version.
    """
    real = os.path.realpath(sys.prefix)
    if real != sys.prefix:
        os.execv(f"{real}/bin/python", [f"{real}/bin/python", *sys.argv])


def main() -> None:
    """Do what the command line says."""
    stay_in_place()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if len(sys.argv) == 3 and sys.argv[1] == "serve":
        serve(int(sys.argv[2]), load_secrets())
    elif len(sys.argv) == 3 and sys.argv[1] == "rest":
        rest(int(sys.argv[2]), load_secrets())
    elif sys.argv[1:] == ["routes"]:
        routes()
    elif sys.argv[1:] == ["rewrap"]:
        further = load_secrets()
        accept_further(further)
        rewrap(further)
    elif sys.argv[1:] in (["migrate"], ["upgrade"]):
        load_secrets()
        if sys.argv[1] == "migrate":
            refuse_a_change()
        else:
            wait_for_go()
        migrate()
    elif len(sys.argv) == 3 and sys.argv[1] == "schema":
        schema(float(sys.argv[2]))
    elif len(sys.argv) == 3 and sys.argv[1] == "check-settings":
        stray = unread(names_in(pathlib.Path(sys.argv[2])))
        if stray:
            sys.exit(f"the installed MLflow reads no {', '.join(stray)}: correct mlflow_environment")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
