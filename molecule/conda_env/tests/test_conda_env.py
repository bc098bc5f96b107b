"""What the role promises, asked of the real builder, the real solver and uv on a machine."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import pathlib
import shlex
import subprocess
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VM = "kit-conda-env-vm"
SCENARIO = pathlib.Path(__file__).parents[1]
ROOT = SCENARIO.parents[1]
BUILDER = "/usr/local/sbin/mlflow-kit-conda-env"
PLAN = "/var/lib/mlflow-kit-conda-env.json"
LIVE = "/opt/mlflow/current"
OFFLINE = "/srv/offline"


@pytest.fixture
def host(host_of: Callable[[str], Any]) -> Any:
    """The machine."""
    return host_of(VM)


def play(entry: str = "main", *args: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run one of the role's entry points as an operator would."""
    argv = ["ansible-playbook", "-i", str(SCENARIO.parent / "_shared/inventory"), "-i", str(SCENARIO / "inventory.yml")]
    argv += ["-e", json.dumps({"entry": entry, **variables}), *args, str(SCENARIO / "entry.yml")]
    return subprocess.run(argv, text=True, capture_output=True, cwd=ROOT, env=os.environ | {"ANSIBLE_NOCOLOR": "1"})


def write(host: Any, path: str, text: str) -> None:
    """Write a file on the machine."""
    done = host.run(f"mkdir -p {pathlib.Path(path).parent} && printf %s {shlex.quote(text)} > {path}")
    assert done.rc == 0, done.stderr


def plan(host: Any, **changes: Any) -> str:
    """Write the live plan with changes to a file of its own and return its path."""
    path = f"/run/plan-{uuid.uuid4().hex}.json"
    script = f"import json; p = json.load(open('{PLAN}')); p |= {changes!r}; json.dump(p, open('{path}', 'w'))"
    host.check_output("python3 -c %s", script)
    return path


def builder(host: Any, verb: str, path: str = PLAN, *, before: str = "") -> dict[str, Any]:
    """Run a verb of the builder and return its answer."""
    done = host.run(f"{before} {BUILDER} {verb} {path}")
    assert done.rc == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def imports(host: Any, prefix: str, before: str = "") -> None:
    """A user without rights starts the environment's Python and uses what is in it."""
    code = "import requests, ssl, sqlite3, ctypes; print(requests.__file__)"
    command = f"{before} setpriv --reuid=65534 --regid=65534 --clear-groups {prefix}/bin/python -c '{code}'"
    assert host.check_output(command).startswith(f"{prefix}/lib/python3")


def test_a_user_without_rights_runs_it_and_changes_nothing(host: Any) -> None:
    """Everybody reads, nobody but root writes, and no bytecode is missing."""
    imports(host, LIVE)
    as_nobody = "cd / && setpriv --reuid=65534 --regid=65534 --clear-groups"
    assert host.check_output(f"{as_nobody} find {LIVE}/ /opt/mlflow ! -readable ! -name .lock") == ""
    assert host.check_output(f"{as_nobody} find -L {LIVE}/ /opt/mlflow -writable") == ""
    # Compiled when it was built: a start has nothing to compile, which it could not keep.
    loaded = host.run(
        f"{LIVE}/bin/python -v -c 'import requests' 2>&1 | grep 'code object from.*site-packages' || true"
    )
    assert ".py\n" not in loaded.stdout


def test_nothing_to_do_takes_less_than_a_second(host: Any) -> None:
    """A build of what is there says so at once."""
    clock = f"import subprocess as s, time; t = time.time(); print(s.check_output(['{BUILDER}', 'build']).decode())"
    out = host.check_output("python3 -c %s", f"{clock}; print(time.time() - t)").split("\n")
    assert json.loads(out[0])["changed"] is False
    assert float(out[-1]) < 1


def test_a_dry_run_says_what_it_would_build(host: Any) -> None:
    """The message names specs and channel; the host stays as it is."""
    before = host.check_output(f"ls -la /opt/mlflow/envs; readlink {LIVE}")
    done = play("main", "--check", conda_env_packages=["pip", "python <4"])
    assert done.returncode == 0, done.stdout
    said = " ".join(done.stdout.split())
    assert "would be built: python 3." in said and "pip python <4 from" in said
    assert host.check_output(f"ls -la /opt/mlflow/envs; readlink {LIVE}") == before


def test_a_failing_solve_says_why(host: Any) -> None:
    """The solver's own words reach the operator, and the live environment stays."""
    live = host.check_output(f"readlink {LIVE}")
    done = play("main", conda_env_packages=["no-such-package"])
    assert done.returncode != 0
    assert "No candidates were found for no-such-package" in done.stdout + done.stderr
    assert host.check_output(f"readlink {LIVE}") == live
    imports(host, LIVE)


def test_credentials_in_a_url_are_refused(host: Any) -> None:
    """The message says where they belong."""
    done = play("main", conda_env_index_url="https://me:hunter2@pypi.invalid/simple")
    assert done.returncode != 0 and "netrc" in done.stdout + done.stderr


def test_tampered_files_are_found_and_a_rebuild_heals(host: Any) -> None:
    """Edited, removed, added and writable files of conda and pip packages are each named."""
    assert play("verify").returncode == 0
    library = host.check_output(f"echo {LIVE}/lib/python3*")
    host.check_output(
        f"cd {library} && echo '# evil' >> site-packages/requests/api.py && rm site-packages/idna/core.py && "
        "echo x > site-packages/evil.pth && echo '#' >> json/decoder.py && chmod o+w site-packages/urllib3/util/url.py"
        " && mkdir site-packages/__pycache__ && touch site-packages/__pycache__/hidden.cpython-313.pyc"
    )
    done = play("verify")
    assert done.returncode != 0
    found = json.loads(host.run(f"{BUILDER} verify").stdout)
    packages = f"lib/{pathlib.Path(library).name}/site-packages"
    assert found["changed"] == [f"lib/{pathlib.Path(library).name}/json/decoder.py", f"{packages}/requests/api.py"]
    assert found["missing"] == [f"{packages}/idna/core.py"]
    assert found["extra"] == [f"{packages}/__pycache__/hidden.cpython-313.pyc", f"{packages}/evil.pth"]
    assert found["unsafe"] == [f"{packages}/urllib3/util/url.py"]
    for name in ("api.py", "core.py", "evil.pth", "decoder.py", "url.py"):
        assert name in done.stdout + done.stderr

    host.check_output(f"rm -f {LIVE}/.mlflow-kit/complete.json /run/conda-env-changed")
    healed = play("main")
    assert healed.returncode == 0, healed.stdout
    assert host.file("/run/conda-env-changed").exists, "what runs from the link was not told"
    assert play("verify").returncode == 0
    imports(host, LIVE)


def test_a_record_rewritten_to_fit_is_found_too(host: Any) -> None:
    """The packages' own lists are vouched for by the marker."""
    record = host.check_output(f"echo {LIVE}/lib/python3*/site-packages/requests-*.dist-info/RECORD")
    host.check_output(f"cp -a {record} /run/record && sed -i '/api.py/d' {record}")
    found = json.loads(host.run(f"{BUILDER} verify").stdout)
    host.check_output(f"cp -a /run/record {record}")
    assert any("RECORD" in line for line in found["changed"])
    assert any(line.endswith("requests/api.py") for line in found["extra"])


@pytest.mark.parametrize(
    ("sign", "packages"), [("conda-meta", ["python <5"]), (".mlflow-kit/requirements.txt", ["python <6"])]
)
def test_a_killed_build_leaves_the_live_one_and_is_healed(host: Any, sign: str, packages: list[str]) -> None:
    """kill -9 in the conda part and in the pip part; then two builds at once."""
    live, path = host.check_output(f"readlink {LIVE}"), plan(host, packages=packages)
    prefix = builder(host, "status", path)["prefix"]
    kill = (
        f"{BUILDER} build {path} >/dev/null 2>&1 & builder=$!; "
        f"for i in $(seq 3000); do [ -e {prefix}/{sign} ] && break; sleep 0.01; done; kill -9 $builder; wait $builder"
    )
    assert host.run(f"bash -c {shlex.quote(kill)}").rc == 137
    assert host.file(f"{prefix}/{sign}").exists
    state = builder(host, "status", path)
    assert not state["complete"] and prefix not in state["kept"]
    assert host.run(f"{BUILDER} switch {path}").rc == 1, "half an environment went live"
    assert host.check_output(f"readlink {LIVE}") == live
    imports(host, LIVE)
    # Both at once: one builds, the other waits for it and finds nothing to do.
    both = f"{BUILDER} build {path} & {BUILDER} build {path}; wait"
    answers = [json.loads(line) for line in host.check_output(f"bash -c {shlex.quote(both)}").splitlines()]
    assert sorted(a["changed"] for a in answers) == [False, True]
    imports(host, prefix)


def test_old_environments_are_pruned_and_the_last_ones_kept(host: Any) -> None:
    """Going back is a switch to a name that is kept."""
    first = host.check_output(f"readlink {LIVE}").rpartition("/")[2]
    plans = [plan(host, packages=[spec], keep=1) for spec in ("python <5", "python <6")]
    names = []
    for path in plans:
        builder(host, "build", path)
        names.append(builder(host, "switch", path)["name"])
    state = builder(host, "status", plans[-1])
    assert state["live"] == names[1] and state["kept"] == sorted(names)
    back = host.run(f"{BUILDER} switch {plans[0]} --to {first}")
    assert back.rc == 1 and "build it first" in back.stderr
    answer = builder(host, f"switch --to {names[0]}", plans[0])
    assert answer["changed"] and answer["previous"] == names[1]
    done = play("main")
    assert done.returncode == 0, done.stdout
    assert host.check_output(f"readlink {LIVE}").endswith(first)
    imports(host, LIVE)


def test_a_package_that_is_not_what_the_index_says_is_refused(host: Any) -> None:
    """Packages of local channels are hashed as well."""
    host.check_output(
        "rm -rf /srv/forged && cp -r /srv/conda-channel /srv/forged && echo >> /srv/forged/noarch/pip-*.conda"
    )
    path = plan(host, channels=["file:///srv/forged"])
    done = host.run(f"{BUILDER} build {path}")
    assert done.rc == 1 and "its sha256 differs" in done.stderr
    assert not builder(host, "status", path)["complete"]


def test_without_any_network(host: Any) -> None:
    """Tools, conda part and Python packages come from one folder; caches and tools of before are out of reach."""
    lock = f"import json; p = json.load(open('{PLAN}')); print('\\n'.join(p['tools'] + p['requirements']))"
    pip = "PYTHONPATH=$(echo /usr/share/python-wheels/pip-*.whl) python3 -m pip"
    host.check_output(
        f"mkdir -p {OFFLINE}/wheels && cp -r /srv/conda-channel {OFFLINE}/channel && cd {OFFLINE} && "
        f"python3 -c {shlex.quote(lock)} > lock.txt && "
        f"{pip} download -q --no-deps --only-binary=:all: --require-hashes -d wheels -r lock.txt"
    )
    cut_off = {"root": "/srv/cut/envs", "link": "/srv/cut/current", "cache": "/srv/cut/cache"}
    path = plan(host, offline_directory=OFFLINE, channels=["conda-forge"], **cut_off)
    alone = "unshare --net"
    assert host.run(f"{alone} ping -c1 -W1 127.0.0.1 || {alone} bash -c '</dev/tcp/1.1.1.1/443'").rc != 0
    assert builder(host, "build", path, before=alone)["changed"]
    assert builder(host, "switch", path, before=alone)["changed"]
    imports(host, "/srv/cut/current", before=alone)


@pytest.fixture(scope="module")
def private_authority() -> tuple[str, str]:
    """PEM texts: an authority's certificate, and a server's chain with its key for localhost."""
    now, name = datetime.datetime.now(datetime.UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Kit test")])
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]

    def certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey, authority: bool) -> x509.Certificate:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(name).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        made = made.not_valid_after(now + datetime.timedelta(days=2))
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        made = made.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(keys[0], hashes.SHA256())

    root = certificate(name, keys[0], True)
    server = certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), keys[1], False)
    pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    chain = server.public_bytes(pem) + keys[1].private_bytes(pem, pkcs8, plain)
    return root.public_bytes(pem).decode(), chain.decode()


def test_mirrors_of_a_site_with_its_own_authority(host: Any, private_authority: tuple[str, str]) -> None:
    """One https server is channel mirror and Python index; its authority is known by conda_env_ca_file alone."""
    for path, text in zip(("/srv/mirror/ca.pem", "/srv/mirror/server.pem"), private_authority, strict=True):
        write(host, path, text)
    serve = (
        "import functools, http.server as h, ssl; c = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH); "
        "c.load_cert_chain('/srv/mirror/server.pem'); "
        "s = h.ThreadingHTTPServer(('127.0.0.1', 8443), "
        "functools.partial(h.SimpleHTTPRequestHandler, directory='/srv/mirror/www')); "
        "s.socket = c.wrap_socket(s.socket, server_side=True); s.serve_forever()"
    )
    index = (
        "import pathlib, re\n"
        f"for w in pathlib.Path('{OFFLINE}/wheels').glob('*.whl'):\n"
        "    d = pathlib.Path('/srv/mirror/www/simple', re.sub('[-_.]+', '-', w.name.split('-')[0]).lower())\n"
        "    d.mkdir(parents=True, exist_ok=True)\n"
        "    (d / w.name).write_bytes(w.read_bytes())\n"
    )
    host.check_output("python3 -c %s", index)
    host.check_output("cp -r /srv/conda-channel /srv/mirror/www/kit-forge")
    host.check_output("systemd-run --collect --unit=kit-mirror python3 -c %s", serve)
    place: dict[str, Any] = {
        "root": "/srv/mirrored/envs",
        "link": "/srv/mirrored/current",
        "cache": "/srv/mirrored/cache",
    }
    place |= {
        "channels": ["kit-forge"],
        "channel_alias": "https://localhost:8443",
        "index_url": "https://localhost:8443/simple",
    }
    # An http proxy or another index that the machine knows must not help.
    alone = "env UV_INDEX=https://pypi.invalid/simple"
    refused = host.run(f"{alone} {BUILDER} build {plan(host, **place)}")
    assert refused.rc == 1 and "certificate" in refused.stderr.lower()
    path = plan(host, ca_file="/srv/mirror/ca.pem", **place)
    assert builder(host, "build", path, before=alone)["changed"]
    builder(host, "switch", path)
    imports(host, "/srv/mirrored/current")
    assert host.check_output("journalctl -u kit-mirror | grep -c 'kit-forge.*conda'") != "0"


def test_a_conda_that_is_there_makes_the_conda_part(host: Any) -> None:
    """The call that conda documents, answered by a stand-in: there is no conda to be had where tests run."""
    tools = host.check_output("ls -d /opt/mlflow/envs/.tools/*/bin/python")
    script = (pathlib.Path(__file__).parent / "standin_conda.py").read_text()
    write(host, "/srv/conda/standin.py", script)
    write(host, "/srv/conda/bin/conda", f'#!/bin/sh\nexec {tools} /srv/conda/standin.py "$@"\n')
    host.check_output("chmod 755 /srv/conda/bin/conda")
    path = plan(host, existing_conda="/srv/conda")
    answer = builder(host, "build", path)
    assert answer["changed"]
    assert "stand-in" in host.file(f"{answer['prefix']}/conda-meta/history").content_string
    imports(host, answer["prefix"])
    missing = host.run(f"{BUILDER} build {plan(host, existing_conda='/srv/none')}")
    assert missing.rc == 1 and "conda_env_existing_conda" in missing.stderr
