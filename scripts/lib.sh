# shellcheck shell=sh
# Sourced by the commands in this folder: puts the caller at the root of the checkout and makes
# its Python environment. Nothing here knows about the deployment.
set -eu
KIT_ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
export KIT_ROOT
cd "$KIT_ROOT"
export PATH="$KIT_ROOT/.venv/bin:$PATH" PYTHONPATH="$KIT_ROOT/scripts" LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# need_packages NAME...: installs those of the distribution's packages that are missing.
need_packages() {
  missing=
  for name in "$@"; do
    dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || missing="$missing $name"
  done
  [ -n "$missing" ] || return 0
  echo "installing$missing" >&2
  # shellcheck disable=SC2086
  { as_root apt-get update -q && as_root apt-get install -yq --no-install-recommends $missing; } >"$(log_file apt)" 2>&1 ||
    { tail -20 "$(log_file apt)" >&2; return 1; }
}

log_file() {
  mkdir -p "$KIT_ROOT/.cache/log"
  echo "$KIT_ROOT/.cache/log/$1.log"
}

# need_python SET: the virtual environment holds what requirements/SET.txt locks.
need_python() {
  need_packages python3 python3-venv ca-certificates
  [ -x .venv/bin/python ] || /usr/bin/python3 -m venv .venv
  stamp=.venv/.$1-$(cat requirements/tools.txt "requirements/$1.txt" | sha256sum | cut -c1-16)
  [ -e "$stamp" ] && return 0
  echo "installing the Python packages of requirements/$1.txt" >&2
  {
    .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes --only-binary :all: -r requirements/tools.txt &&
      uv_like_pip pip install --python .venv/bin/python --require-hashes -r "requirements/$1.txt"
  } >"$(log_file python)" 2>&1 || { tail -20 "$(log_file python)" >&2; return 1; }
  .venv/bin/ansible-galaxy collection install -r requirements.yml >"$(log_file galaxy)" 2>&1 ||
    { tail -20 "$(log_file galaxy)" >&2; return 1; }
  : >"$stamp"
}

# uv does not read pip's configuration: hand over the index that the host is set up for.
uv_like_pip() {
  index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}}
  if [ -n "$index" ]; then
    UV_DEFAULT_INDEX=$index UV_SYSTEM_CERTS=1 .venv/bin/uv "$@"
  else
    UV_SYSTEM_CERTS=1 .venv/bin/uv "$@"
  fi
}

# need_engine: podman with what systemd containers on a bridge with names need.
need_engine() {
  need_packages podman netavark aardvark-dns runc iptables mmdebstrap debian-archive-keyring openssh-client
}

# need_promtool: the distribution's promtool is in PATH. Unpacked only: its package would start a Prometheus here.
need_promtool() {
  PATH="$KIT_ROOT/.cache/promtool/usr/bin:$PATH"
  command -v promtool >/dev/null && return 0
  mkdir -p .cache/promtool
  (
    cd .cache/promtool
    as_root apt-get update -q
    # Debian 13 has it in a package of its own.
    apt-get download -q promtool || apt-get download -q prometheus
    dpkg-deb --fsys-tarfile ./*.deb | tar -x ./usr/bin/promtool
  ) >"$(log_file promtool)" 2>&1 || { tail -20 "$(log_file promtool)" >&2; return 1; }
}
