"""The packages of kit.channel, without a container."""

from __future__ import annotations

import json
import pathlib
import shutil
import zipfile

import pytest
from kit import channel


def test_platforms_are_condas_names() -> None:
    """Any machine type that Debian has is known by conda's name, another is refused."""
    assert channel.subdir("x86_64") == "linux-64"
    assert channel.subdir("aarch64") == "linux-aarch64"
    with pytest.raises(channel.ChannelError, match="vax"):
        channel.subdir("vax")


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs zstd")
def test_a_package_and_its_index_agree(tmp_path: pathlib.Path) -> None:
    """What the index says of a package is what the package is."""
    root, out = tmp_path / "root", tmp_path / "channel"
    (root / "bin").mkdir(parents=True)
    (root / "bin/tool").write_text(f"#!{channel.PLACEHOLDER}/bin/python\n")
    (root / "bin/alias").symlink_to("tool")
    index = {"name": "tool", "version": "1", "build": "0", "subdir": channel.subdir(), "license": "MIT", "timestamp": 0}
    name, entry = channel._pack(root, out, index, "zstd")
    package = out / channel.subdir() / name
    assert entry["size"] == package.stat().st_size
    with zipfile.ZipFile(package) as archive:
        assert sorted(archive.namelist()) == ["info-tool-1-0.tar.zst", "metadata.json", "pkg-tool-1-0.tar.zst"]
    channel.write_repodata(out, {name: entry})
    assert (
        json.loads((package.parent / "repodata.json").read_text())["packages.conda"][name]["sha256"] == entry["sha256"]
    )
    assert json.loads((out / "noarch/repodata.json").read_text())["packages.conda"] == {}
    described = {e["_path"]: e for e in channel._describe(root) if not e["_path"].startswith("info/")}
    assert described["bin/tool"]["prefix_placeholder"] == channel.PLACEHOLDER
    assert described["bin/alias"]["path_type"] == "softlink"


def test_folders_change_places_in_one_step(tmp_path: pathlib.Path) -> None:
    """A channel is never half there."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    channel._swap(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/new").exists() and (tmp_path / "new/old").exists()
