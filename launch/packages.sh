#!/usr/bin/env bash
# Installs Debian packages, as root.
#
#   launch/packages.sh run    what training wants: make for the two commands, and a C compiler for
#                             the kernels that Triton builds at run time (Dockerfile)
#   launch/packages.sh test   what tests on real systems want (.ci/run)
set -euo pipefail

case ${1:-} in
run) packages=(gcc g++ make) ;;
test) packages=(iproute2 munge nginx-light openssh-client openssh-server pdsh slurm-wlm) ;;
*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2 && exit 2 ;;
esac
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install --yes --no-install-recommends "${packages[@]}" >/dev/null
