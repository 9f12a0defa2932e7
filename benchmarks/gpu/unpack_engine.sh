#!/usr/bin/env bash
# Unpack what pack_engine.sh made, on a machine that has torch and cannot fetch.
#
#     benchmarks/gpu/unpack_engine.sh PARTS ENVIRONMENT SITE-PACKAGES
#
# ENVIRONMENT is the path that was packed, since baked caches hold it. It gets this machine's Python, and links into
# SITE-PACKAGES, which has this machine's own packages, for what was left out. Nothing else of that folder is linked:
# transformers imports what it finds, and the engine's own environment does not have it.
set -euo pipefail
parts=$1 environment=$2 host=$3
python=$(python3 -c 'import sys; print(sys._base_executable)')
"$python" -m venv --without-pip "$environment"
cat "$parts"/engine.part-* | xz -dc | tar -C "$environment" -x
site=$(cd "$environment"/lib/python3.*/site-packages && pwd)

link() { # FROM INTO PATTERN: what FROM has of that name, unless INTO has something of it
    local path
    for path in "$1"/$3; do
        if [ -e "$path" ] && ! compgen -G "$2/$3" >/dev/null; then ln -s "$path" "$2"; fi
    done
}
while read -r name; do
    link "$host" "$site" "${name/%-*.dist-info/-*.dist-info}" # in this machine's version
done <"$parts/engine.names"
for folder in nvidia nvidia/cu13; do
    for path in "$host/$folder"/*; do link "$host/$folder" "$site/$folder" "${path##*/}"; done
done
"$environment/bin/python" -m compileall -q -j 0 "$site" >"$parts/compileall.log" 2>&1 || true # some files are no Python 3
