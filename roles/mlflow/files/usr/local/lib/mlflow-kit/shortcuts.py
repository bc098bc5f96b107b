"""Shorter ways through MLflow's own store on PostgreSQL, for what training runs write and pages read most.

What MLflow does by objects and up to two dozen round trips, one statement does here. A shortcut stands for certain
functions of MLflow, and is taken only where the installed version has them word for word as they were when it was
written: another version goes MLflow's own way until somebody has compared them. And whatever is out of the ordinary
(an unknown or deleted run, a changed parameter, a name that is not allowed, a database that does not answer) is left
to MLflow's own function, which decides and answers by its own errors.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import math
import select
import time
import typing
import weakref

# What the shortcuts stand for, by the beginning of the SHA-256 of those functions' sources: for 3.17.
WRITES, READS = "2243a134f5194d39", "ede15e0a3756a86e"
# For so long a connection that was asked whether it still stands is believed as long as the other side is silent.
FRESH_SECONDS = 5.0
# By `run` alone a run is changed that is active, and whose parameters are not to be changed.
RUN = """run AS MATERIALIZED (
  SELECT run_uuid FROM runs WHERE run_uuid = %(run)s AND lifecycle_stage = 'active'"""
UNCHANGED = """ AND NOT EXISTS (
    SELECT FROM unnest(%(param_keys)s::text[], %(param_values)s::text[]) AS given (key, value)
    JOIN params p ON p.run_uuid = %(run)s AND p.key = given.key WHERE p.value IS DISTINCT FROM given.value
  )"""
# In the order of their keys, whoever writes: nobody waits in a circle.
METRICS = """given AS (
  SELECT * FROM unnest(%(keys)s::text[], %(values)s::float8[], %(timestamps)s::bigint[], %(steps)s::bigint[],
    %(nans)s::boolean[]) WITH ORDINALITY AS given (key, value, timestamp, step, is_nan, number)
), history AS (
  INSERT INTO metrics (run_uuid, key, value, timestamp, step, is_nan)
  SELECT run_uuid, key, value, timestamp, step, is_nan FROM run, given
  ORDER BY key COLLATE "C", step, timestamp, value, is_nan
  ON CONFLICT DO NOTHING
), latest AS (
  INSERT INTO latest_metrics AS held (run_uuid, key, value, timestamp, step, is_nan)
  SELECT DISTINCT ON (key COLLATE "C") run_uuid, key, value, timestamp, step, is_nan FROM run, given
  ORDER BY key COLLATE "C", step DESC, timestamp DESC, value DESC, number
  ON CONFLICT (key, run_uuid) DO UPDATE
  SET value = excluded.value, timestamp = excluded.timestamp, step = excluded.step, is_nan = excluded.is_nan
  WHERE (excluded.step, excluded.timestamp, excluded.value) > (held.step, held.timestamp, held.value)
)"""
# No ON CONFLICT: whoever writes the same parameter at the same time is to be compared with.
PARAMS = """fresh AS (
  INSERT INTO params (run_uuid, key, value)
  SELECT run_uuid, key, value FROM run, unnest(%(param_keys)s::text[], %(param_values)s::text[]) AS given (key, value)
  WHERE NOT EXISTS (SELECT FROM params p WHERE p.run_uuid = run.run_uuid AND p.key = given.key)
  ORDER BY key COLLATE "C"
)"""
TAGS = """marked AS (
  INSERT INTO tags (run_uuid, key, value)
  SELECT run_uuid, key, value FROM run, unnest(%(tag_keys)s::text[], %(tag_values)s::text[]) AS given (key, value)
  ORDER BY key COLLATE "C"
  ON CONFLICT (key, run_uuid) DO UPDATE SET value = excluded.value
)"""
# The list of runs hides behind a question, so that nobody estimates each of them three times.
CHILDREN = """WITH asked AS MATERIALIZED (SELECT %(runs)s::text[] AS runs)
SELECT run_uuid, 0, key, NULL, value, is_nan, timestamp, step FROM latest_metrics
WHERE run_uuid = ANY ((SELECT runs FROM asked)::text[])
UNION ALL SELECT run_uuid, 1, key, value, NULL, NULL, NULL, NULL FROM params
WHERE run_uuid = ANY ((SELECT runs FROM asked)::text[])
UNION ALL SELECT run_uuid, 2, key, value, NULL, NULL, NULL, NULL FROM tags
WHERE run_uuid = ANY ((SELECT runs FROM asked)::text[])
"""
# Where a session keeps the children that were read with others', until their runs are asked for.
STASH = "mlflow-kit: children of runs"
log = logging.getLogger("mlflow-kit")
Children = tuple[list["Child"], list["Child"], list["Child"]]


def same(expected: str, what: typing.Sequence[typing.Any]) -> bool:
    """Whether functions and classes, None for a missing one, have the sources that `expected` is the fingerprint of."""
    found = "" if None in what else hashlib.sha256("".join(map(inspect.getsource, what)).encode()).hexdigest()[:16]
    if found != expected:
        log.info("the fingerprint is %s, not %s", found or "that of nothing, since something is missing", expected)
    return found == expected


@functools.cache
def statement(metrics: bool, params: bool, tags: bool) -> str:
    """The SQL that writes what is given to an active run, and tells by a 1 that it has, by a 0 that it may not."""
    parts = [RUN + (UNCHANGED if params else "") + "\n)"]
    parts += [part for given, part in ((metrics, METRICS), (params, PARAMS), (tags, TAGS)) if given]
    return f"WITH {', '.join(parts)}\nSELECT count(*) FROM run"


def write(
    store: typing.Any,
    run: str,
    metrics: typing.Sequence[typing.Any] = (),
    params: typing.Sequence[typing.Any] = (),
    tags: typing.Sequence[typing.Any] = (),
) -> bool:
    """Write entities of MLflow, which it has validated, to the run of that id, all or none of them.

    Returns whether they are written; raises what the database says.
    """
    values: dict[str, typing.Any] = {"run": run}
    if metrics:
        rows: dict[tuple[typing.Any, ...], None] = {}
        for one in metrics:
            nan, value = store.sanitize_metric_value(one.value)
            rows[one.key, float(value), one.timestamp, one.step, nan] = None
        columns = ("keys", "values", "timestamps", "steps", "nans")
        values |= zip(columns, map(list, zip(*rows, strict=True)), strict=True)
    if params:
        values |= {"param_keys": [one.key for one in params], "param_values": [one.value for one in params]}
    if tags:
        last = {one.key: one.value for one in tags}
        values |= {"tag_keys": list(last), "tag_values": list(last.values())}
    return execute(store.engine, statement(bool(metrics), bool(params), bool(tags)), values) == 1


def execute(engine: typing.Any, sql: str, values: dict[str, typing.Any]) -> typing.Any:
    """Run one statement, which is its own transaction, and return the first value of its answer.

    By psycopg2's connection from the engine's pool: SQLAlchemy's own way to a statement without BEGIN and COMMIT asks
    the server to forget its isolation level afterwards, by a round trip, and costs three times the statement's time.
    Raises what the database says; a broken connection does not return to the pool.
    """
    pooled = engine.raw_connection()
    try:
        connection = pooled.dbapi_connection
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql, values)
                return cursor.fetchone()[0]
        finally:
            connection.autocommit = False
    except Exception as error:
        if engine.dialect.is_disconnect(error, connection, None):
            pooled.invalidate(error)
        raise
    finally:
        pooled.close()


def shorten_writes() -> bool:
    """Let the store write metrics, parameters and tags of a run by one statement; returns whether it does."""
    from mlflow.store.tracking import sqlalchemy_store as module
    from mlflow.store.tracking.dbmodels import models
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

    store = module.SqlAlchemyStore
    names = "log_metric _log_metrics _log_metrics_once _update_latest_metrics_if_necessary sanitize_metric_value "
    names += "_get_run _check_run_is_active log_param _log_params set_tag _set_tags log_batch"
    stood_for = [getattr(store, name, None) for name in names.split()]
    stood_for += [getattr(models, name, None) for name in ("SqlMetric", "SqlLatestMetric", "SqlParam", "SqlTag")]
    if not same(WRITES, stood_for):
        return False

    def usual(self: typing.Any, metrics: typing.Any = (), tags: typing.Any = ()) -> bool:
        # A subclass keeps workspaces apart; a model's metrics and a run's name go to further tables.
        return (
            type(self) is store
            and self.engine.dialect.name == "postgresql"
            and all(one.model_id is None for one in metrics)
            and all(one.key != MLFLOW_RUN_NAME for one in tags)
        )

    def shortcut(plain: typing.Callable[..., typing.Any], way: typing.Callable[..., bool]) -> typing.Any:
        @functools.wraps(plain)
        def taken(self: typing.Any, *args: typing.Any, **more: typing.Any) -> typing.Any:
            try:
                if way(self, *args, **more):
                    return None
            except Exception as error:
                log.debug("%s goes MLflow's own way: %s", plain.__name__, error)
            return plain(self, *args, **more)

        return taken

    def log_metric(self: typing.Any, run_id: str, metric: typing.Any) -> bool:
        module._validate_metric(metric.key, metric.value, metric.timestamp, metric.step)
        return usual(self, [metric]) and write(self, run_id, [metric])

    def log_param(self: typing.Any, run_id: str, param: typing.Any) -> bool:
        return usual(self) and write(self, run_id, params=[module._validate_param(param.key, param.value)])

    def set_tag(self: typing.Any, run_id: str, tag: typing.Any) -> bool:
        return usual(self, (), [tag]) and write(self, run_id, tags=[module._validate_tag(tag.key, tag.value)])

    def log_batch(self: typing.Any, run_id: str, metrics: typing.Any, params: typing.Any, tags: typing.Any) -> bool:
        module._validate_run_id(run_id)
        checked = module._validate_batch_log_data(metrics, params, tags)
        module._validate_batch_log_limits(*checked)
        module._validate_param_keys_unique(checked[1])
        return usual(self, metrics, tags) and any(checked) and write(self, run_id, *checked)

    for way in (log_metric, log_param, set_tag, log_batch):
        setattr(store, way.__name__, shortcut(getattr(store, way.__name__), way))
    return True


class Child:
    """An entity in the place of the row that it would be made from."""

    __slots__ = ("entity",)

    def __init__(self, entity: typing.Any) -> None:
        """Take the entity."""
        self.entity = entity

    def to_mlflow_entity(self) -> typing.Any:
        """Return the entity."""
        return self.entity


class Run:
    """A row of the table of runs whose children were read elsewhere."""

    def __init__(self, row: typing.Any, children: Children) -> None:
        """Take the row, and its metrics, parameters and tags."""
        self.row = row
        self.latest_metrics, self.params, self.tags = children

    def __getattr__(self, name: str) -> typing.Any:
        """Have what the row has."""
        return getattr(self.row, name)


def shorten_reads() -> bool:
    """Read the children of all runs that a session has found at once, and no objects of them; returns whether so."""
    import sqlalchemy
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.store.tracking.dbmodels import models
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    kinds = [getattr(models, name, None) for name in ("SqlRun", "SqlLatestMetric", "SqlParam", "SqlTag")]
    names = ("_get_eager_run_query_options", "get_run", "_search_runs")
    stood_for = [*kinds, *(getattr(SqlAlchemyStore, name, None) for name in names)]
    if not same(READS, stood_for):
        return False
    row, plain = models.SqlRun, models.SqlRun.to_mlflow_entity

    def children(session: typing.Any) -> dict[str, Children]:
        session.flush()
        held = [one.run_uuid for one in session.identity_map.values() if isinstance(one, row)]
        found: dict[str, Children] = {one: ([], [], []) for one in held}
        rows = session.connection(bind_arguments={"mapper": row}).exec_driver_sql(CHILDREN, {"runs": held})
        for run, kind, key, text, value, nan, timestamp, step in rows:
            if kind == 0:
                entity = Metric(key, math.nan if nan else value, timestamp, step)
            else:
                entity = (Param if kind == 1 else RunTag)(key, text)
            found[run][kind].append(Child(entity))
        return found

    @functools.wraps(plain)
    def to_mlflow_entity(self: typing.Any) -> typing.Any:
        session = sqlalchemy.orm.object_session(self)
        if (
            session is None
            or session.get_bind(row).dialect.name != "postgresql"
            or not sqlalchemy.inspect(self).persistent
            or any(name in self.__dict__ for name in ("latest_metrics", "params", "tags"))
        ):
            return plain(self)
        stash = session.info.setdefault(STASH, {})
        if self.run_uuid not in stash:
            stash.update(children(session))
        return plain(Run(self, stash.pop(self.run_uuid)))

    def forget(session: typing.Any, _: typing.Any) -> None:
        session.info.pop(STASH, None)

    row.to_mlflow_entity = to_mlflow_entity
    SqlAlchemyStore._get_eager_run_query_options = staticmethod(list)
    sqlalchemy.event.listen(sqlalchemy.orm.Session, "after_flush", forget)
    return True


def shorten_answers() -> bool:
    """Write JSON without indentation, which Python has no fast way for; returns whether the version lets us."""
    from mlflow.server import handlers

    plain = handlers.message_to_json
    if "pretty" not in inspect.signature(plain).parameters:
        return False
    handlers.message_to_json = functools.partial(plain, pretty=False)
    return True


def shorten_pings() -> bool:
    """Ask a connection that was asked a moment ago by its socket alone; returns whether SQLAlchemy lets us.

    SQLAlchemy asks each connection whether it still stands whenever it is taken from the pool. A server that went
    away has closed it, which the socket tells without a round trip.
    """
    from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2 as dialect

    plain = getattr(dialect, "do_ping", None)
    if plain is None:
        return False
    asked: weakref.WeakKeyDictionary[typing.Any, float] = weakref.WeakKeyDictionary()

    @functools.wraps(plain)
    def do_ping(self: typing.Any, connection: typing.Any) -> typing.Any:
        now = time.monotonic()
        if now - asked.get(connection, -math.inf) < FRESH_SECONDS:
            poll = select.poll()
            poll.register(connection.fileno(), select.POLLIN)
            if not poll.poll(0):
                return True
        answer = plain(self, connection)
        asked[connection] = now
        return answer

    dialect.do_ping = do_ping
    return True


def take() -> dict[str, bool]:
    """Take every shortcut that fits the installed versions; returns which, and logs which does not."""
    taken = {}
    for way in (shorten_writes, shorten_reads, shorten_answers, shorten_pings):
        name = way.__name__.removeprefix("shorten_")
        try:
            taken[name] = way()
        except ImportError:
            taken[name] = False
        if not taken[name]:
            log.info("no shortcut for %s: the installed version is another than it was made for", name)
    return taken
