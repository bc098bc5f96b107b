"""A stand-in for a conda binary: the few documented options of `conda create`, carried out by py-rattler.

It refuses every option that it does not know, so it proves the call and not conda itself.
"""

import argparse
import asyncio
import os
import pathlib
import sys

from rattler import Channel, ChannelConfig, Gateway, VirtualPackage, install, solve


async def create(a: argparse.Namespace) -> None:
    """Solve and install as asked."""
    alias = os.environ.get("CONDA_CHANNEL_ALIAS", "https://conda.invalid/")
    channels = [Channel(name, ChannelConfig(alias)) for name in a.channel]
    packages = pathlib.Path(os.environ["CONDA_PKGS_DIRS"])
    gateway = Gateway(cache_dir=packages / "repodata")
    records = await solve(channels, a.spec, gateway=gateway, virtual_packages=VirtualPackage.detect())
    await install(records, a.prefix, cache_dir=packages, show_progress=False)
    (pathlib.Path(a.prefix) / "conda-meta/history").write_text("==> made by the stand-in <==\n")


parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("verb", choices=["create"])
for flag in ("yes", "quiet", "copy", "no-default-packages", "override-channels", "offline"):
    parser.add_argument(f"--{flag}", action="store_true", required=flag in ("yes", "override-channels"))
parser.add_argument("--prefix", required=True)
parser.add_argument("--channel", action="append", required=True)
parser.add_argument("spec", nargs="+")
asyncio.run(create(parser.parse_args()))
sys.stdout.flush()
os._exit(0)
