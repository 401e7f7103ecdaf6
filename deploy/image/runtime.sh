#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What an image needs besides Python: the library vLLM's CPU kernels are linked to, and a user of its own. With
# --no-pip the base's installer goes.
set -eu
apt-get update -qq
apt-get install -y -qq --no-install-recommends libnuma1
if [ "${1:-}" = --no-pip ]; then
    if dpkg -s python3-pip >/dev/null 2>&1; then
        apt-get purge -y -qq --auto-remove python3-pip # Debian's
    else
        python3 -m pip uninstall -q -y pip setuptools wheel # what Python's own image brings
    fi
fi
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
groupadd --gid 10001 vtprune
useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin vtprune
install -d -o 10001 -g 10001 /cache
