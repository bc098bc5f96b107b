"""Two lanes answer as one server does: each route, and a client's whole round, beside `mlflow server` as it comes."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from journey import Site
from kit import vm

pytestmark = pytest.mark.xdist_group("quickstart")
PYTHON, SHORTCUTS = "/opt/mlflow/current/bin/python", "/usr/local/lib/mlflow-kit"
LAUNCHER = f"{SHORTCUTS}/launcher.py"
PLAIN = "http://127.0.0.1:5999"
# With the site's own database and S3, and settings and secrets as people hand them over: by the environment.
PLAIN_SERVER = """
import json, os, pathlib
for line in pathlib.Path("/etc/mlflow/mlflow.env").read_text().splitlines():
    name, _, value = line.partition("=")
    if name.startswith(("MLFLOW_", "AWS_")):
        os.environ[name] = value.strip('"')
os.environ |= json.loads(pathlib.Path("/etc/mlflow/secrets.json").read_text())
os.environ |= {"PGPASSFILE": "/etc/mlflow/pgpass", "HOME": "/root/plain"}
python = "/opt/mlflow/current/bin/python"
os.execv(python, [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "5999", "--workers", "1"])
"""
# What makes data or asks other hosts, whatever it is asked.
LEFT_OUT = ("/ajax-api/3.0/mlflow/demo/",)
# Asks every route of the table of both servers, and prints those that are answered differently.
ASK = """
import base64, json, os, re, ssl, sys, urllib.error, urllib.request
table, left_out = json.load(open("/root/routes.json")), tuple(json.load(open("/root/left-out.json")))
user = os.environ["MLFLOW_TRACKING_USERNAME"] + ":" + os.environ["MLFLOW_TRACKING_PASSWORD"]
tls = ssl.create_default_context(cafile="/root/ca-bundle.crt")

def ask(base, method, path, headers):
    body = None if method == "GET" else b"{}"
    asked = urllib.request.Request(base + path, body, {"Content-Type": "application/json", **headers}, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=10, context=tls if base.startswith("https") else None) as answer:
            status, kind, data = answer.status, answer.headers.get_content_type(), answer.read()
    except urllib.error.HTTPError as error:
        status, kind, data = error.code, error.headers.get_content_type(), error.read()
    except TimeoutError:
        return ["no answer in time"]
    try:
        told = json.loads(data)
        words = sorted(told) if isinstance(told, dict) else type(told).__name__
        if isinstance(told, dict) and "error_code" in told:
            words = [told["error_code"], told.get("message", "")[:60]]
    except ValueError:
        words = "no JSON"
    return [status, kind, words]

seen, different = 0, []
for method, path in sorted({(m, p) for m, p in map(tuple, table["own"] + table["flask"])}):
    if method in ("HEAD", "OPTIONS") or path.startswith(left_out):
        continue
    plain_path = re.sub(r"<[^>]*>|\\{[^}]*\\}", "x", path)
    mine = ask(os.environ["MLFLOW_TRACKING_URI"], method, plain_path,
               {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()})
    theirs = ask("http://127.0.0.1:5999", method, plain_path, {})
    seen += 1
    if mine != theirs:
        different.append([method, path, mine, theirs])
print(json.dumps({"seen": seen, "different": different}))
"""
# A client's round: what it wrote, as it reads it back.
ROUND = """
import json, os, pathlib, tempfile, warnings
warnings.simplefilter("ignore")
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
import mlflow
import numpy
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.tracking import MlflowClient

client, told = MlflowClient(), {}
name = f"round {os.urandom(4).hex()}"
experiment = client.create_experiment(name, tags={"a": "b"})
mlflow.set_experiment(name)
with mlflow.start_run(run_name="first") as run:
    mlflow.log_params({"lr": 0.1, "depth": 3})
    for step in range(5):
        mlflow.log_metric("loss", 1 / (step + 1), step=step)
    mlflow.set_tags({"kind": "test"})
    mlflow.log_dict({"x": [1, 2]}, "some/x.json")
    mlflow.log_text("hello", "some/hello.txt")
    mlflow.log_input(mlflow.data.from_numpy(numpy.arange(6), name="six"), context="training")
second = client.create_run(experiment, run_name="second").info.run_id
client.log_batch(second, [Metric("loss", 9.0, 1, 0)], [Param("lr", "0.5")], [RunTag("kind", "test")])
client.set_terminated(second, "FAILED")
third = client.create_run(experiment).info.run_id
client.delete_run(third)
read = client.get_run(run.info.run_id)
told["run"] = [read.data.params, read.data.metrics, read.data.tags["kind"], read.info.status, read.info.run_name]
told["inputs"] = [[i.dataset.name, i.dataset.source_type] for i in read.inputs.dataset_inputs]
told["history"] = [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, "loss")]
found = client.search_runs([experiment], "metrics.loss < 1 and params.lr = '0.1'", order_by=["metrics.loss ASC"])
told["search"] = [[r.info.run_name, r.data.metrics["loss"]] for r in found]
told["deleted"] = len(client.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY))
told["artifacts"] = sorted(a.path for a in client.list_artifacts(run.info.run_id, "some"))
told["text"] = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/some/hello.txt")

class Twice(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return [2 * one for one in model_input]

with mlflow.start_run():
    logged = mlflow.pyfunc.log_model(name="twice", python_model=Twice(), pip_requirements=[])
mlflow.register_model(logged.model_uri, name)
client.set_registered_model_alias(name, "champion", 1)
client.set_model_version_tag(name, "1", "stage", "gold")
version = client.get_model_version_by_alias(name, "champion")
told["version"] = [version.version, version.tags, version.status, len(client.search_model_versions(f"name='{name}'"))]
told["model"] = list(mlflow.pyfunc.load_model(f"models:/{name}@champion").predict([1, 2]))
told["logged model"] = [client.get_logged_model(logged.model_id).name, len(mlflow.search_logged_models([experiment]))]

@mlflow.trace(name="outer", attributes={"k": "v"})
def outer(x):
    with mlflow.start_span(name="inner") as span:
        span.set_inputs({"x": x})
        span.set_outputs(x + 1)
    return x + 1

outer(4)
mlflow.flush_trace_async_logging()
traces = mlflow.search_traces(locations=[experiment], return_type="list")
told["traces"] = [[sorted(s.name for s in t.data.spans), str(t.info.state), t.info.request_preview] for t in traces]
client.set_trace_tag(traces[0].info.trace_id, "seen", "yes")
told["trace tag"] = mlflow.get_trace(traces[0].info.trace_id).info.tags["seen"]

prompt = mlflow.genai.register_prompt(name=f"p-{os.urandom(4).hex()}", template="Say {{word}} twice", tags={"t": "1"})
told["prompt"] = [prompt.version, mlflow.genai.load_prompt(f"prompts:/{prompt.name}/1").format(word="ha")]
dataset = mlflow.genai.create_dataset(name=f"d-{os.urandom(4).hex()}", experiment_id=[experiment], tags={"t": "1"})
dataset.merge_records([{"inputs": {"q": "1+1"}, "expectations": {"a": "2"}}])
again = mlflow.genai.get_dataset(dataset_id=dataset.dataset_id)
told["dataset"] = [again.tags.get("t"), len(again.to_df()), again.to_df()["inputs"].tolist()]

large = pathlib.Path(tempfile.mkdtemp()) / "large.bin"
large.write_bytes(os.urandom(3_000_000))
client.log_artifact(second, str(large))
back = pathlib.Path(mlflow.artifacts.download_artifacts(run_id=second, artifact_path="large.bin"))
told["bytes"] = back.read_bytes() == large.read_bytes()
print("told", json.dumps(told, sort_keys=True))
"""


@pytest.fixture(scope="module")
def site(quickstart: tuple[Site, str]) -> Iterator[Site]:
    """The quickstart's site, with a plain server of the same environment on its machine."""
    site = quickstart[0]
    vm.execute(site.machine, "mkdir", "-p", "/root/plain")
    vm.write(site.machine, "/root/plain/server.py", PLAIN_SERVER.encode())
    stop_plain(site)
    vm.execute(
        site.machine, "systemd-run", "--quiet", "--unit=plain", "--working-directory=/root/plain", PYTHON, "server.py"
    )
    env = (site.checkout / "client.env").read_text().replace(str(site.checkout), "/root")
    vm.write(site.machine, "/root/client.env", env.encode())
    vm.write(site.machine, "/root/ca-bundle.crt", (site.checkout / "ca-bundle.crt").read_bytes())
    asked = f"{PYTHON} -c 'import urllib.request as u; u.urlopen(\"{PLAIN}/health\")' 2>/dev/null"
    vm.execute(site.machine, "sh", "-c", f"for i in $(seq 240); do {asked} && exit 0; sleep 0.5; done; exit 1")
    yield site
    stop_plain(site)
    vm.execute(site.machine, "rm", "-rf", "/root/plain", "/root/client.env", "/root/ask.py")


def stop_plain(site: Site) -> None:
    """End the plain server, which would not end by itself."""
    stop = "systemctl kill --signal=KILL plain; systemctl stop plain; systemctl reset-failed plain"
    vm.execute(site.machine, "sh", "-c", stop, check=False)


def table(site: Site) -> dict[str, Any]:
    """Every route of the MLflow that is installed."""
    script = (
        f"set -a; . /etc/mlflow/mlflow.env; set +a; STATE_DIRECTORY=/root/plain {PYTHON} -W ignore {LAUNCHER} routes"
    )
    found: dict[str, Any] = json.loads(vm.execute(site.machine, "sh", "-c", script).splitlines()[-1])
    return found


def with_client(site: Site, source: str, *environment: str) -> str:
    """Run Python with MLflow on the machine, as a client of the gateway unless `environment` says otherwise."""
    vm.write(site.machine, "/root/ask.py", source.encode())
    given = "; ".join(["MLFLOW_DISABLE_TELEMETRY=true", *environment])
    script = f"set -a; . /root/client.env; {given}; set +a; exec {PYTHON} -W ignore /root/ask.py"
    return vm.execute(site.machine, "sh", "-c", script)


def test_every_route_answers_as_the_plain_server_does(site: Site) -> None:
    """All that the installed MLflow has, asked of both without a body: status, kind of answer, and words."""
    routes = table(site)
    assert routes["misled"] == []
    assert len(routes["own"]) > 50 and len(routes["flask"]) > 300
    vm.write(site.machine, "/root/routes.json", json.dumps(routes).encode())
    vm.write(site.machine, "/root/left-out.json", json.dumps(LEFT_OUT).encode())
    found = json.loads(with_client(site, ASK).splitlines()[-1])
    assert found["seen"] > 350
    assert found["different"] == []


def test_a_clients_round_ends_as_with_the_plain_server(site: Site) -> None:
    """Experiments, runs, models, traces, artifacts, datasets and prompts read back the same."""
    kit, plain = (
        json.loads(with_client(site, ROUND, *environment).splitlines()[-1].removeprefix("told "))
        for environment in (
            (),
            (f"MLFLOW_TRACKING_URI={PLAIN}", "MLFLOW_TRACKING_USERNAME=", "MLFLOW_TRACKING_PASSWORD="),
        )
    )
    assert kit == plain
    assert kit["bytes"] and kit["model"] == [2, 4]


def test_the_installed_version_takes_every_shortcut(site: Site) -> None:
    """Shortcuts are for one version of MLflow: another one needs a look at its functions, and new fingerprints."""
    script = "import json, shortcuts; print(json.dumps(shortcuts.take()))"
    vm.write(site.machine, "/root/plain/taken.py", f"import sys; sys.path.insert(0, {SHORTCUTS!r})\n{script}".encode())
    out = vm.execute(site.machine, "sh", "-c", f"cd /root/plain && {PYTHON} -W ignore taken.py")
    assert json.loads(out.splitlines()[-1]) == {"writes": True, "reads": True, "answers": True, "pings": True}


def test_shortcuts_end_where_the_plain_server_ends(site: Site) -> None:
    """The same random calls, allowed ones and others, are answered alike and leave the same; many at once lose none."""
    assert "MLFLOW_KIT_SHORTCUTS=true" in site.host(site.machine).file("/etc/mlflow/mlflow.env").content_string
    source = (pathlib.Path(__file__).parent / "both_ways.py").read_text()
    found = json.loads(with_client(site, source, f"PLAIN={PLAIN}").splitlines()[-1])
    assert found["different"] == []
    assert found["calls"] * 0.1 < found["refused"] < found["calls"] * 0.6
    assert found["statuses"] == [200]
    assert found["latest"] == [[7.14, 14]]
    assert found["kept"] == [12, 12, 12, 8 * 15]


def test_after_a_shortcut_a_transaction_can_be_taken_back(site: Site) -> None:
    """A session that wrote by one statement, kept or refused, is again one that MLflow may take a change back in."""
    told = with_client(site, STORE + f"sys.path.insert(0, {SHORTCUTS!r})\n" + TAKEN_BACK).splitlines()
    assert told[-3:] == ["kept", "refused", "before"]


def test_a_session_that_ends_under_a_write_loses_nothing(site: Site) -> None:
    """Sessions of the database end between writes and in their midst: each write is there, and there once."""
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'mlflow'"
    script = f'while :; do runuser -u postgres -- psql -qAtc "{end}"; sleep 0.2; done'
    command = ("--unit=ending", "--working-directory=/", "sh", "-c", script)
    vm.execute(site.machine, "systemd-run", "--quiet", *command)
    try:
        told = site.python(
            "import mlflow\n"
            "mlflow.set_experiment('ended sessions')\n"
            "client, run = mlflow.MlflowClient(), mlflow.start_run().info.run_id\n"
            "for step in range(300):\n"
            "    client.log_metric(run, 'm', step, step=step)\n"
            "print([one.step for one in client.get_metric_history(run, 'm')] == list(range(300)))\n"
        )
    finally:
        vm.execute(site.machine, "systemctl", "stop", "ending")
    ended = "journalctl -u ending -o cat | grep -c '^t$'"
    assert "True" in told.split()
    assert int(vm.execute(site.machine, "sh", "-c", ended)) > 3


def test_the_round_went_through_both_lanes(site: Site) -> None:
    """The gateway's log names instances of either lane."""
    log = site.host(site.machine).check_output("tail -2000 /var/log/nginx/gateway.log")
    ports = {json.loads(line)["upstream"].rpartition(":")[2] for line in log.splitlines()}
    assert {"5001", "5002", "5101", "5102"} <= ports


def test_what_runs_on_the_server_is_for_the_server_alone(site: Site) -> None:
    """MLflow's assistant answers its own machine only: a client behind the gateway is not taken for it."""
    source = (
        "from mlflow.utils.rest_utils import http_request, MlflowHostCreds\n"
        "from mlflow.tracking._tracking_service.utils import _get_store\n"
        "creds, path = _get_store().get_host_creds(), '/ajax-api/3.0/mlflow/assistant/config'\n"
        "print(http_request(creds, path, 'PUT', json={}).status_code)"
    )
    assert site.python(source).split()[-1] == "403"


def test_a_path_that_would_be_lost_is_refused(site: Site) -> None:
    """Where the lanes' paths name a route that only the other instances have, the command that looks says which."""
    script = (
        "set -a; . /etc/mlflow/mlflow.env; MLFLOW_KIT_REST_PATHS='^/v1/'; set +a; "
        f"STATE_DIRECTORY=/root/plain {PYTHON} -W ignore {LAUNCHER} routes"
    )
    found = json.loads(vm.execute(site.machine, "sh", "-c", script).splitlines()[-1])
    assert found["misled"] == ["POST /v1/traces"]


# Something that the server's log tells of: a name that it is not known by.
STRANGE = """
import base64, os, ssl, urllib.error, urllib.request
user = os.environ["MLFLOW_TRACKING_USERNAME"] + ":" + os.environ["MLFLOW_TRACKING_PASSWORD"]
headers = {"Host": "strange.test", "Authorization": "Basic " + base64.b64encode(user.encode()).decode()}
for path in ("/api/2.0/mlflow/runs/get?run_id=x", "/api/3.0/mlflow/server-info"):
    asked = urllib.request.Request(os.environ["MLFLOW_TRACKING_URI"] + path, headers=headers)
    try:
        urllib.request.urlopen(asked, context=ssl.create_default_context(cafile="/root/ca-bundle.crt"))
    except urllib.error.HTTPError as error:
        print(error.code)
"""


def test_one_request_has_one_name_from_the_gateway_to_the_server(site: Site) -> None:
    """A line of the server's log names the request that it belongs to as the gateway's log does, in both lanes."""
    assert with_client(site, STRANGE).split() == ["403", "403"]
    host = site.host(site.machine)
    host.check_output("sleep 2")  # the gateway writes its log by the block
    lines = [json.loads(line) for line in host.check_output("tail -50 /var/log/nginx/gateway.log").splitlines()]
    asked = ("/api/2.0/mlflow/runs/get", "/api/3.0/mlflow/server-info")
    refused = {
        line["upstream"].rpartition(":")[2]: line["request"]
        for line in lines
        if line["status"] == 403 and line["path"] in asked
    }
    for unit, first in (("mlflow-rest@*", "51"), ("mlflow@*", "50")):
        request = next(refused[port] for port in refused if port.startswith(first))
        journal = host.check_output(f"journalctl -u '{unit}' --since -2min -o cat --no-pager")
        assert any(request in line and "strange.test" in line for line in journal.splitlines()), journal[-2000:]


# The server's own store, and no server.
STORE = """
import json, os, pathlib, sys
for line in pathlib.Path("/etc/mlflow/mlflow.env").read_text().splitlines():
    name, _, value = line.partition("=")
    if name.startswith("MLFLOW_"):
        os.environ[name] = value.strip('"')
os.environ["PGPASSFILE"] = "/etc/mlflow/pgpass"
import sqlalchemy
from mlflow.entities import ViewType
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
store = SqlAlchemyStore(os.environ["MLFLOW_BACKEND_STORE_URI"], "/root/plain")
"""
# Lets the store ask as the server does, and PostgreSQL tell how it would answer if it could not read whole tables.
EXPLAIN = """
asked, plans = [], []

@sqlalchemy.event.listens_for(store.engine, "before_cursor_execute")
def note(connection, cursor, statement, parameters, context, many):
    asked.append((statement, parameters))

for search in ({"order_by": ["attributes.start_time DESC"]}, {}, {"filter_string": "metrics.loss < 0.2"}):
    asked.clear()
    store.search_runs(["0"], search.pop("filter_string", ""), ViewType.ACTIVE_ONLY, 100, **search)
    statement, parameters = next(one for one in asked if "FROM runs" in one[0])
    with store.engine.connect() as connection:
        cursor = connection.connection.cursor()
        for way in ("seqscan", "bitmapscan", "nestloop"):
            cursor.execute(f"SET LOCAL enable_{way} = off")
        # A small table is read by any index: for as long as this lasts, MLflow's own are gone.
        cursor.execute("ALTER TABLE latest_metrics DROP CONSTRAINT latest_metric_pk")
        cursor.execute("DROP INDEX IF EXISTS index_latest_metrics_run_uuid")
        cursor.execute("EXPLAIN " + statement, parameters)
        plans.append(" ".join(row[0] for row in cursor))
        connection.connection.rollback()
print(json.dumps(plans))
"""


# Writes through a session and then takes a change back in the same one: the store has no other.
TAKEN_BACK = """
import shortcuts
from mlflow.entities import Param
run = store.create_run("0", "somebody", 0, [], "before").info.run_id
for value in ("1", "x" * 9000):
    try:
        print("kept" if shortcuts.write(store, run, params=[Param("p" + value[:1], value)]) else "left")
    except store.engine.dialect.dbapi.Error:
        print("refused")
with store.engine.connect() as connection:
    connection.exec_driver_sql("UPDATE runs SET name = 'after' WHERE run_uuid = %(run)s", {"run": run})
    connection.rollback()
print(store.get_run(run).info.run_name)
"""


def test_the_servers_questions_find_the_kits_indexes(site: Site) -> None:
    """An index is for a question in MLflow's very words: another version that asks otherwise shows here."""
    newest, usual, metric = json.loads(with_client(site, STORE + EXPLAIN).splitlines()[-1])
    assert "mlflow_kit_runs_newest" in newest
    assert "mlflow_kit_runs_newest" in usual
    assert "mlflow_kit_latest_metrics_value" in metric


def test_the_instances_follow_the_cores(site: Site) -> None:
    """A machine that was given more cores serves with more instances: each is asked, watched, and gone again later."""
    host = site.host(site.machine)

    def running() -> int:
        listed = host.check_output("systemctl list-units --plain --no-legend --state=running 'mlflow-rest@*'")
        return len(listed.splitlines())

    def served() -> set[str]:
        site.python("import mlflow\nfor _ in range(60): mlflow.search_experiments()")
        host.check_output("sleep 2")  # the gateway writes its log by the block
        log = host.check_output("tail -60 /var/log/nginx/gateway.log")
        ports = {json.loads(line)["upstream"].rpartition(":")[2] for line in log.splitlines()}
        return {port for port in ports if port.startswith("51")}

    usual = running()
    megabytes = int(host.check_output("awk '/^MemTotal/ {print $2}' /proc/meminfo")) // 1024
    assert usual == max(2, min(int(host.check_output("nproc")), megabytes // 400))
    more = usual + 2
    try:
        assert site.changed("-e", json.dumps({"site_cores": more})) > 0
        assert running() == more
        assert served() == {str(5101 + number) for number in range(more)}
    finally:
        site.changed()
    assert running() == usual
    assert served() == {str(5101 + number) for number in range(usual)}


@pytest.mark.parametrize(("cores", "memory", "instances"), [(1, 1500, 2), (2, 4000, 2), (16, 4000, 10), (8, 64000, 8)])
def test_each_instance_has_a_core_and_room(site: Site, cores: int, memory: int, instances: int) -> None:
    """One for each core, in half of the memory at 200 MB each; never fewer than can take turns at a restart."""
    argv = ["ansible", "mlflow", "-i", site.inventory, "-m", "ansible.builtin.debug", "-a", "var=mlflow_rest_instances"]
    told = json.dumps({"site_cores": cores, "site_memory_mb": memory})
    assert f"mlflow_rest_instances: {instances}\n" in site.command(*argv, "-e", told) + "\n"
