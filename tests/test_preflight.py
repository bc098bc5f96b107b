"""Every value that an operator may get wrong, and right: what the role preflight says of it."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from types import ModuleType
from typing import Any

import pytest

ROLE = pathlib.Path(__file__).parents[1] / "roles" / "preflight"


def load(path: pathlib.Path) -> ModuleType:
    """Import a plugin from its file."""
    spec = importlib.util.spec_from_file_location(f"kit_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


plugin = load(ROLE / "filter_plugins" / "preflight.py")

NAMES = {
    "instance_name": "site_instance",
    "public_name": "site_name",
    "database_url": "site_database_url",
    "s3_endpoint": "site_s3_endpoint",
    "bucket": "site_bucket",
    "allow": "site_allow",
}
GOOD: dict[str, Any] = {
    "instance_name": "mlflow",
    "public_name": "mlflow.example.org",
    "passwords": [{"variable": "vault_password", "value": "Abcdef12"}],
    "ports": [
        {"variable": "site_https_port", "port": 443, "units": ["nginx.service"]},
        {"variable": "site_database_port", "port": 5432, "units": []},
    ],
    "paths": [{"variable": "site_state", "path": "/var/lib/mlflow"}],
    "allow": [{"cidr": "192.0.2.0/24", "description": "office"}],
    "database_url": "",
    "database_dialects": ["postgresql", "postgresql+psycopg2"],
    "database_password_variable": "vault_database_password",
    "database_connections": {"needed": 97, "available": 97, "variables": ["site_workers", "site_max_connections"]},
    "s3_endpoint": "",
    "bucket": "mlflow-artifacts",
    "reserved_buckets": ["api", "health"],
    "variable_names": NAMES,
}


def faults(**values: Any) -> list[dict[str, str]]:
    """The faults of the good site with other `values`."""
    found: list[dict[str, str]] = plugin.preflight_faults({**GOOD, **values})
    return found


def only(**values: Any) -> dict[str, str]:
    """The one fault of the good site with other `values`."""
    found = faults(**values)
    assert len(found) == 1, found
    assert all(found[0][key] for key in ("subject", "found", "expected", "variable"))
    return found[0]


def port(value: object) -> list[dict[str, object]]:
    """A list of one port."""
    return [{"variable": "site_port", "port": value}]


def password(value: object) -> list[dict[str, object]]:
    """A list of one password."""
    return [{"variable": "vault_password", "value": value}]


def path(value: object) -> list[dict[str, object]]:
    """A list of one path."""
    return [{"variable": "site_state", "path": value}]


def test_a_good_site_has_no_faults() -> None:
    assert faults() == []


@pytest.mark.parametrize("value", ["m", "MLflow-2_prod", "a" * 64])
def test_instance_names_that_pass(value: str) -> None:
    assert faults(instance_name=value) == []


@pytest.mark.parametrize(
    "value", ["", "2mlflow", "-a", "_a", "a b", "a.b", "a/b", "ä", "a" * 65, "a\n", 5, None, ["a"]]
)
def test_instance_names_that_are_refused(value: object) -> None:
    assert only(instance_name=value)["variable"] == "site_instance"


@pytest.mark.parametrize(
    "value", ["h", "a.example.org", "a.example.org.", "192.0.2.7", "2001:db8::7", "xn--bcher-kva.example"]
)
def test_public_names_that_pass(value: str) -> None:
    assert faults(public_name=value) == []


@pytest.mark.parametrize(
    "value",
    ["", "https://a.example.org", "a.example.org:443", "a/b", "-a.org", "a-.org", "a..b", "a_b.org", "192.0.2.300"]
    + ["[2001:db8::7]", "a b", "a" * 64, f"{'a' * 63}." * 4 + "org", 7, None, {"a": 1}],
)
def test_public_names_that_are_refused(value: object) -> None:
    assert only(public_name=value)["variable"] == "site_name"


@pytest.mark.parametrize("value", ["Abcdef12", "abcdef1!", "ABCDEF1 ", "äÖ123456", "a" * 90 + "B2"])
def test_passwords_that_pass(value: str) -> None:
    assert faults(passwords=password(value)) == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("", "nothing"),
        (None, "nothing"),
        ("Abcde1!", "7 characters of 4 classes (lower, upper, digit, other)"),
        ("geheimnis", "9 characters of 1 class (lower)"),
        ("geheimnis7", "10 characters of 2 classes (lower, digit)"),
        ("GEHEIM-NIS", "10 characters of 2 classes (upper, other)"),
        (12345678, "a int"),
        ("Abcdef12\n", "a line break or another control character"),
        ("Abc\0def12", "a line break or another control character"),
    ],
)
def test_passwords_that_are_refused_untold(value: object, found: str) -> None:
    fault = only(passwords=password(value))
    assert fault["found"] == found
    assert fault["variable"] == "vault_password"
    assert not value or str(value) not in str(fault)


@pytest.mark.parametrize("value", [1, 443, 65535, "8443"])
def test_ports_that_pass(value: object) -> None:
    assert faults(ports=port(value)) == []


@pytest.mark.parametrize("value", ["abc", "", None, 0, -1, 65536, 1.5, True, "80 ", "0x50", "８０", [80], "9" * 5000])
def test_ports_that_are_refused(value: object) -> None:
    fault = only(ports=port(value))
    assert fault["variable"] == "site_port"
    assert fault["expected"] == "a whole number from 1 to 65535"
    assert len(fault["found"]) < 120  # noqa: PLR2004


def test_a_clash_names_all_who_want_the_port() -> None:
    entries = [{"variable": v, "port": p} for v, p in (("a", 80), ("b", "80"), ("c", 81), ("a", 80))]
    fault = only(ports=entries)
    assert fault["found"] == "80 in a (2 times) and b"
    assert fault["variable"] == "a or b"


@pytest.mark.parametrize("value", ["/var/lib/mlflow", "/srv/a-b_c.d@1/", "/srv/Ärger"])
def test_paths_that_pass(value: str) -> None:
    assert faults(paths=path(value)) == []


@pytest.mark.parametrize(
    "value",
    [
        "var/lib",
        "~/mlflow",
        "./a",
        "",
        None,
        5,
        "/",
        "//",
        "/a/../b",
        "/a b",
        "/a\nb",
        "/a%b",
        "/a$b",
        '/a"',
        "/a\\b",
        "C:\\x",
    ],
)
def test_paths_that_are_refused(value: object) -> None:
    assert only(paths=path(value))["variable"] == "site_state"


@pytest.mark.parametrize(
    "value",
    [
        "postgresql://mlflow@db.example.org/mlflow",
        "postgresql+psycopg2://mlflow@db.example.org:5432/mlflow?sslmode=verify-full",
        "postgresql+psycopg2://mlflow@/mlflow?host=a:5432&host=b:5432&target_session_attrs=read-write",
        "postgresql+psycopg2:///mlflow?host=/run/postgresql",
        "postgresql://mlflow@[2001:db8::5]:5432/mlflow",
        "postgresql://mlflow@127.0.0.1/mlflow",
        "postgresql://mlflow@a:5432,b:5432/mlflow",
    ],
)
def test_database_urls_that_pass(value: str) -> None:
    assert faults(database_url=value) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("mysql+pymysql://mlflow@db/mlflow", "the service is not run on mysql"),
        ("sqlite:////var/lib/mlflow.db", "the service is not run on sqlite"),
        ("mssql+pyodbc://mlflow@db/mlflow", "the service is not run on mssql"),
        ("postgres://mlflow@db/mlflow", "SQLAlchemy knows no «postgres://»"),
        ("postgresql+psycopg://mlflow@db/mlflow", "the environment has psycopg2"),
    ],
)
def test_database_dialects_that_are_refused_with_what_to_use(value: str, expected: str) -> None:
    fault = only(database_url=value)
    assert expected in fault["expected"]
    assert "postgresql+psycopg2://USER@HOST:5432/DATABASE" in fault["expected"]
    assert fault["variable"] == "site_database_url"


def test_a_dialect_may_be_admitted() -> None:
    assert faults(database_url="mysql+pymysql://m@db/m", database_dialects=["postgresql", "mysql+pymysql"]) == []


@pytest.mark.parametrize(
    "value",
    [
        "postgresql://mlflow:SeCr3t-p@db/mlflow",
        "postgresql://mlflow:SeCr3t-p@x/y@db:5432/mlflow",
        "postgresql://mlflow:SeCr3t-p%40@[2001:db8::1]:5432/mlflow",
        "postgresql://mlflow:5432SeCr3t-p#?/@db/mlflow",
        "postgresql://:SeCr3t-p@db/mlflow",
        "postgresql://mlflow@db/mlflow?password=SeCr3t-p&sslmode=require",
        "postgresql://mlflow@db/mlflow?sslpassword=SeCr3t-p@x&y",
        "postgresql://mlflow@a:5432,b:5432/mlflow?password=SeCr3t-p",
    ],
)
def test_a_password_in_a_database_url_is_refused_masked(value: str) -> None:
    fault = only(database_url=value)
    assert fault["found"].startswith("a password in «postgresql://")
    assert "***" in fault["found"]
    assert fault["expected"] == "none there: it belongs, vaulted, in vault_database_password"
    assert not any(part in str(fault) for part in ("SeCr3t", "t-p", "x/y"))


@pytest.mark.parametrize(
    "value",
    [
        "mlflow",
        "db.example.org/mlflow",
        "root:SeCr3t-p@db/mlflow",
        "postgresql:mlflow",
        "://a@b/c",
        "postgresql://m@db:0x/c y",
    ]
    + [5, ["postgresql://m@db/m"], {"host": "db"}, True],
)
def test_what_is_no_database_url(value: object) -> None:
    fault = only(database_url=value)
    assert "a URL such as postgresql+psycopg2://USER@HOST:5432/DATABASE" in fault["expected"]
    assert "SeCr3t" not in str(fault)


def test_a_database_url_without_a_database() -> None:
    assert only(database_url="postgresql://m@db:5432/")["found"].startswith("no database in")


def test_a_wrong_dialect_and_a_password_are_two_faults() -> None:
    both = faults(database_url="mysql://root:SeCr3t-p@db/mlflow")
    assert [f["found"].split(" ")[0] for f in both] == ["dialect", "a"]
    assert "SeCr3t" not in str(both)


@pytest.mark.parametrize(
    "value",
    [
        "https://s3.example.org",
        "http://minio:9000",
        "https://s3.example.org:8443/",
        "https://[2001:db8::9]:9000",
        "http://10.0.0.5",
    ],
)
def test_s3_endpoints_that_pass(value: str) -> None:
    assert faults(s3_endpoint=value) == []


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "127.8.9.1", "2130706433", "0x7f.1", "0.0.0.0", "0", "[::1]", "[::]", "[::ffff:127.0.0.1]"]
    + [
        "[0:0:0:0:0:0:0:1]",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "s3.localhost",
        "localhost.localdomain",
        "ip6-localhost",
    ],
)
def test_s3_on_loopback_is_refused_in_every_spelling(host: str) -> None:
    fault = only(s3_endpoint=f"http://{host}:9000")
    assert fault["found"].startswith("loopback in ")
    assert fault["variable"] == "site_s3_endpoint"


@pytest.mark.parametrize(
    "value",
    ["s3.example.org", "s3://bucket", "ftp://s3.example.org", "https://", "https://s3.example.org:99999", "https://a:b"]
    + [
        "https://s3.example.org/bucket",
        "https://s3.example.org?x=1",
        "https://s3_x.example.org",
        "https://a b",
        9000,
        ["x"],
    ],
)
def test_s3_endpoints_that_are_refused(value: object) -> None:
    assert only(s3_endpoint=value)["variable"] == "site_s3_endpoint"


@pytest.mark.parametrize("value", ["https://AKIAKEY:SeCr3t-p@s3.example.org", "https://k:SeCr3t-p/x@s3.example.org"])
def test_keys_in_an_s3_endpoint_are_refused_masked(value: str) -> None:
    assert "SeCr3t" not in str(only(s3_endpoint=value))


@pytest.mark.parametrize("value", ["abc", "mlflow-artifacts", "a.b.c", "1bucket9", "a" * 63])
def test_buckets_that_pass(value: str) -> None:
    assert faults(bucket=value) == []


@pytest.mark.parametrize(
    "value",
    [
        "",
        "ab",
        "a" * 64,
        "MLflow",
        "a_b",
        "-abc",
        "abc-",
        ".abc",
        "a..b",
        "a.-b",
        "a-.b",
        "192.168.0.1",
        "xn--abc",
        "a b",
        "a/b",
    ]
    + ["sthree-x", "abc-s3alias", "abc--ol-s3", "abc\n", "bücher", "api", "health", None, 123, ["abc"]],
)
def test_buckets_that_are_refused(value: object) -> None:
    assert only(bucket=value)["variable"] == "site_bucket"


def test_a_bucket_on_a_path_of_the_service_says_so() -> None:
    assert "the service's own" in only(bucket="api")["expected"]


@pytest.mark.parametrize(
    ("needed", "available", "found"),
    [
        (98, 97, "98 needed of 97 available"),
        ("many", 97, "«many» needed of 97 available"),
        (None, 97, "nothing needed of 97 available"),
        (4, True, "4 needed of True available"),
    ],
)
def test_pools_over_the_connections_of_the_database(needed: object, available: object, found: str) -> None:
    budget = {"needed": needed, "available": available, "variables": ["site_workers", "site_max_connections"]}
    fault = only(database_connections=budget)
    assert fault["found"] == found
    assert fault["variable"] == "site_workers or site_max_connections"


@pytest.mark.parametrize("budget", [{}, None, {"needed": 5, "available": "5", "variables": ["a"]}])
def test_pools_that_fit(budget: object) -> None:
    assert faults(database_connections=budget) == []


@pytest.mark.parametrize("cidr", ["192.0.2.0/24", "192.0.2.7/32", "192.0.2.7", "2001:db8::/32", "::1", "0.0.0.0/0"])
def test_networks_that_pass(cidr: str) -> None:
    assert faults(allow=[{"cidr": cidr}]) == []


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"cidr": "192.0.2.7/24", "description": "office"}, "192.0.2.0/24 for the network, or 192.0.2.7 for the one"),
        ({"cidr": "2001:db8::7/64"}, "2001:db8::/64 for the network"),
        ({"cidr": "192.0.2.0/33"}, "a network in CIDR notation"),
        ({"cidr": "192.0.2.0-192.0.2.9"}, "a network in CIDR notation"),
        ({"cidr": "office"}, "a network in CIDR notation"),
        ({"cidr": ""}, "a network in CIDR notation"),
        ({"cidr": 7}, "a network in CIDR notation"),
        ({"description": "office"}, "a network in CIDR notation"),
        ("192.0.2.0/24", "an entry such as"),
        (None, "an entry such as"),
    ],
)
def test_networks_that_are_refused_by_name(entry: object, expected: str) -> None:
    fault = only(allow=[{"cidr": "192.0.2.0/24"}, entry])
    assert fault["expected"].startswith(expected)
    assert fault["subject"].startswith("allowlist entry 2")
    assert fault["variable"] == "site_allow"
    if isinstance(entry, dict) and "description" in entry:
        assert fault["subject"] == "allowlist entry 2 (office)"


@pytest.mark.parametrize("value", ["192.0.2.0/24", {"cidr": "192.0.2.0/24"}, 7])
def test_an_allowlist_that_is_no_list(value: object) -> None:
    assert only(allow=value)["expected"].startswith("a list of entries")


def test_all_faults_come_at_once_in_a_list_to_read() -> None:
    found = faults(
        instance_name="9lives",
        public_name="",
        passwords=password("short"),
        ports=[*port("abc"), *port(80), {"variable": "other_port", "port": 80}],
        paths=path("var"),
        database_url="mysql://a:SeCr3t-p@b/c",
        s3_endpoint="http://localhost:9000",
        bucket="A",
        database_connections={"needed": 2, "available": 1, "variables": ["w"]},
        allow=[{"cidr": "x"}],
    )
    message = plugin.preflight_message(found, "The end.")
    lines = message.splitlines()
    assert lines[0] == "12 things to put right before anything is changed:"
    assert lines[-1] == "The end."
    assert len(lines) == len(found) + 2
    assert all(line.startswith("- ") and "; expected " in line and "; change " in line for line in lines[1:-1])
    assert lines[1] == (
        "- instance name: found «9lives»; expected a letter first, then letters, digits, «-» or «_», "
        "64 characters at most; change site_instance."
    )
    assert "SeCr3t" not in message
    assert "short" not in message


def test_without_the_operators_names_the_roles_own_are_told() -> None:
    assert only(instance_name="", variable_names={})["variable"] == "preflight_instance_name"


def test_a_message_stays_on_one_line_and_short() -> None:
    fault = only(bucket="x" * 500 + "\n\x1b[31m")
    assert "\n" not in fault["found"]
    assert "\x1b" not in fault["found"]
    assert len(fault["found"]) < 120  # noqa: PLR2004
