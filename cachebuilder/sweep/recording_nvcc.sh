#!/bin/sh
# Stands in for nvcc during a sweep. It answers --version with the real compiler's text. For a compilation it writes a
# placeholder cubin, and the command line beside it; DeepGEMM moves both into the cache entry.
# It uses the shell's own commands only: it runs once for each kernel, and the sweep waits for it. A real GPU loads the
# placeholder, so placeholder.cubin, a cubin with one empty kernel, is taken where it exists.
if [ "$1" = --version ]; then
    exec cat "${0%/*}/version.txt"
fi
command="$*"
while [ $# -gt 1 ]; do
    case $1 in
    -o | --output-file)
        printf '%s\n' "$command" >"${2%/*}/command.txt" || exit
        [ -f "${0%/*}/placeholder.cubin" ] && exec cat "${0%/*}/placeholder.cubin" >"$2"
        echo "to be compiled" >"$2"
        exit
        ;;
    esac
    shift
done
echo "recording nvcc: wanted an output file (-o), found none in: $command" >&2
exit 1
