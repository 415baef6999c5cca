#!/usr/bin/env bash
# Installs the browser that tests/cli/test_plan_report.py drives, where that can be done without asking: as root, by apt.
# Elsewhere, or without a network, those tests are skipped and say so.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" > /dev/null && exit 0
done
[ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || exit 0
export DEBIAN_FRONTEND=noninteractive
{ timeout 120 apt-get update -qq && timeout 600 apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 ||
    echo "Chromium cannot be installed: tests of --report are skipped" >&2
