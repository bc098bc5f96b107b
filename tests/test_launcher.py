"""An instance's process, apart from MLflow."""

from __future__ import annotations

import gc
import importlib.util
import pathlib

LAUNCHER = pathlib.Path(__file__).parents[1] / "roles/mlflow/files/usr/local/lib/mlflow-kit/launcher.py"


def test_garbage_is_collected_again_once_an_instance_serves() -> None:
    """It is not while MLflow is imported; an instance that stayed so would grow for as long as it runs."""
    found = importlib.util.spec_from_file_location("launcher", LAUNCHER)
    assert found and found.loader
    launcher = importlib.util.module_from_spec(found)
    found.loader.exec_module(launcher)
    thresholds = gc.get_threshold()
    gc.disable()
    try:
        launcher._settle()
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
        gc.set_threshold(*thresholds)
