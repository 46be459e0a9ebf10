#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# Runs the command blocks of a page of documentation, in order: each fenced block marked "sh" that no
# "<!-- not run: WHY -->" line stands before. A block that fails ends it; so does a page without blocks, and
# a block that is neither run nor excused.
#
# howto-doc.sh PAGE
set -euo pipefail

blocks=$(mktemp -d)
awk -v dir="$blocks" '
    /^<!-- not run: ..* -->$/ { excused = 1; next }
    !inside && /^```/ {
        inside = 1
        if (excused)
            file = ""
        else if ($0 == "```sh")
            file = sprintf("%s/%03d-line-%d", dir, ++count, NR)
        else {
            printf "line %d: a block that is not marked sh\n", NR
            exit 1
        }
        excused = 0
        next
    }
    inside && /^```/ { inside = 0; if (file) close(file); next }
    inside && file { print >file }
    END { if (inside) { print "the last block has no end"; exit 1 } }
' "$1"

count=0
for block in "$blocks"/*; do
    echo "== ${block##*/}"
    cd /
    bash -euxo pipefail "$block"
    count=$((count + 1))
done
rm -r "$blocks"
echo "blocks run: $count"
