#!/usr/bin/env bash
# Unpack what pack_engine.sh made, on a machine that has torch and cannot fetch.
#
#     benchmarks/gpu/unpack_engine.sh PARTS ENVIRONMENT SITE-PACKAGES
#
# ENVIRONMENT is the path that was packed, since baked caches hold it. It gets this machine's Python and links to what was
# left out in SITE-PACKAGES, this machine's own. A package that the packed environment has not is not linked: transformers
# imports what it finds (SciPy, scikit-learn, pandas), and a start would pay for it.
set -euo pipefail
parts=$1 environment=$2 host=$3
python=$(python3 -c 'import sys; print(sys._base_executable)')
"$python" -m venv --without-pip "$environment"
cat "$parts"/engine.part-* | xz -dc | tar -C "$environment" -x
site=$(cd "$environment"/lib/python3.*/site-packages && pwd)

link() { # everything that the first folder has and the second has not, of the names on stdin
    while read -r name; do
        if [ -e "$1/$name" ] && [ ! -e "$2/$name" ]; then ln -s "$1/$name" "$2/$name"; fi
    done
}
link "$host" "$site" <"$parts/engine.names"
# The same packages in this machine's versions.
sed -n 's/-[^-]*\.dist-info$//p' "$parts/engine.names" | while read -r name; do
    ls -d "$site/$name"-*.dist-info >/dev/null 2>&1 || (cd "$host" && ls -d "$name"-*.dist-info 2>/dev/null || true)
done | link "$host" "$site"
for folder in nvidia nvidia/cu13; do (cd "$host/$folder" && ls) | link "$host/$folder" "$site/$folder"; done
"$environment/bin/python" -m compileall -q -j 0 "$site" >"$parts/compileall.log" 2>&1 || true # some are Python 2's
