"""The object store's keys are read anew when their file was replaced, and kept when it is faulty."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from typing import Any

import pytest

SOURCE = "roles/object_store/files/usr/local/lib/object-store/object_store_filters.py"


class Auth:
    """What stands in for Swift's tempauth: says which keys it knows."""

    def __init__(self) -> None:
        self.users: dict[str, Any] = {}
        self.errors: list[str] = []
        self.logger = self

    def error(self, text: str, *words: object) -> None:
        self.errors.append(text % words)

    def __call__(self, env: dict[str, Any], start_response: Any) -> list[bytes]:
        return [f"{name}={user['key']}".encode() for name, user in sorted(self.users.items())]


def live(path: pathlib.Path) -> tuple[Any, Auth]:
    """The filter over the keys at `path`, and what it wraps."""
    spec = importlib.util.spec_from_file_location("object_store_filters", pathlib.Path(__file__).parents[1] / SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    auth = Auth()
    return module.LiveKeys(auth, str(path)), auth


def replace(path: pathlib.Path, text: str) -> None:
    """As the role does: a new file takes the name."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def test_another_file_counts_from_the_next_request_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"mlflow:a": "one"}))
    keys, auth = live(path)
    assert keys({}, None) == [b"mlflow:a=one"]
    assert auth.users["mlflow:a"] == {"key": "one", "url": "$HOST/v1/AUTH_mlflow", "groups": [".admin"]}
    replace(path, json.dumps({"mlflow:a": "one", "mlflow:b": "two"}))
    assert keys({}, None) == [b"mlflow:a=one", b"mlflow:b=two"]
    replace(path, json.dumps({"mlflow:b": "two"}))
    assert keys({}, None) == [b"mlflow:b=two"]


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_faulty_file_changes_nothing_and_is_told_of_once(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"mlflow:a": "one"}))
    keys, auth = live(path)
    replace(path, text)
    assert keys({}, None) == keys({}, None) == [b"mlflow:a=one"]
    assert len(auth.errors) == 1
    replace(path, json.dumps({"mlflow:b": "two"}))
    assert keys({}, None) == [b"mlflow:b=two"]


def test_no_server_starts_without_keys(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match="keys.json"):
        live(tmp_path / "keys.json")
