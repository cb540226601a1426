#!/usr/bin/env python3
"""Fails if a dependency has a licence that is not allowed here.

Reads `cargo metadata` for the platforms Kersey is built for. A licence text is an SPDX expression; the old form "A/B"
means "A OR B".
"""

import json
import re
import subprocess
import sys

ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
}
# Licences allowed for single packages; NOTICE names them.
EXCEPTIONS = {"tun": {"WTFPL"}}
PLATFORMS = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "armv7-unknown-linux-gnueabihf"]


def permits(expression, allowed):
    """Whether an SPDX expression can be met with the allowed licences. AND binds tighter than OR."""
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def either():
        met = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            met = both() or met
        return met

    def both():
        met = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            met = one() and met
        return met

    def one():
        token = tokens.pop(0)
        if token == "(":
            met = either()
            tokens.pop(0)
            return met
        if tokens and tokens[0] == "WITH":
            token += " " + tokens.pop(0) + " " + tokens.pop(0)
        return token in allowed

    return either()


def main():
    command = ["cargo", "metadata", "--format-version", "1", "--locked"]
    for platform in PLATFORMS:
        command += ["--filter-platform", platform]
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    used = {node["id"] for node in metadata["resolve"]["nodes"]}
    packages = [package for package in metadata["packages"] if package["id"] in used]
    refused = []
    for package in packages:
        licence = package["license"] or ""
        if not licence or not permits(licence, ALLOWED | EXCEPTIONS.get(package["name"], set())):
            refused.append(f"  {package['name']} {package['version']}: {licence or 'no licence given'}")
    if refused:
        print("these dependencies have a licence that is not allowed (.ci/licences.py):", *refused, sep="\n")
        return 1
    print(f"licences: {len(packages)} packages, all allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
