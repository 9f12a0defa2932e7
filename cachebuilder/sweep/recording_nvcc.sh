#!/bin/sh
# Stands in for nvcc while DeepGEMM is swept: answers --version with the real compiler's text, and for a compilation
# writes a placeholder cubin with the command line beside it. DeepGEMM moves both into the cache entry.
# Only the shell's own commands: it runs once a kernel, in the sweep's way. A real GPU loads the placeholder, so there
# it is a cubin with one empty kernel.
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
echo "recording nvcc: no output file in: $command" >&2
exit 1
