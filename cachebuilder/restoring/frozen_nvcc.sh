#!/bin/sh
# cachebuilder: the frozen nvcc. It answers --version with the text of the compiler that built the restored kernels, logs
# every request to compile, and then follows CACHEBUILDER_ON_MISS: refuse (default), compile or compile-and-warn.
# It uses the shell's own commands where it can: the answer must be fast, and PATH may be empty.
version_text=@VERSION_TEXT@
artifact=@ARTIFACT@
fingerprint=@FINGERPRINT@

case $1 in
--version | -V)
    printf '%s' "$version_text"
    exit
    ;;
esac

LC_ALL=C
export LC_ALL
given_path=$PATH
PATH=${PATH:+$PATH:}/usr/local/bin:/usr/bin:/bin
policy=${CACHEBUILDER_ON_MISS:-refuse}
case $0 in
*/*) here=${0%/*} ;;
*) here=. ;;
esac
here=$(cd "$here/.." && pwd)

is_frozen() { # whether a file is a frozen nvcc, of this folder or another one
    { read -r _ && read -r second; } <"$1" 2>/dev/null && case $second in '# cachebuilder: the frozen nvcc.'*) true ;; *) false ;; esac
}

find_real_nvcc() { # sets $real
    real=
    rest=${CACHEBUILDER_REAL_NVCC:+$CACHEBUILDER_REAL_NVCC:}
    if [ -z "$rest" ]; then
        list=$given_path:
        while [ -n "$list" ]; do
            folder=${list%%:*}
            list=${list#*:}
            [ -n "$folder" ] && rest=$rest$folder/nvcc:
        done
        rest=$rest/usr/local/cuda/bin/nvcc:
    fi
    while [ -n "$rest" ]; do
        candidate=${rest%%:*}
        rest=${rest#*:}
        if [ -f "$candidate" ] && [ -x "$candidate" ] && ! is_frozen "$candidate"; then
            real=$candidate
            return
        fi
    done
}

compile() { # "$@": the request
    find_real_nvcc
    if [ -z "$real" ]; then
        printf '%s\n' "frozen nvcc: CACHEBUILDER_ON_MISS=$policy wants a real nvcc, found none: name one in CACHEBUILDER_REAL_NVCC" >&2
        exit 1
    fi
    PATH=$given_path
    unset LC_ALL
    exec "$real" "$@"
}

json() { # sets $quoted: $1 as a JSON string; a character that is not printable ASCII becomes ?
    rest=$1
    quoted=
    special='[!] !#-[^-~]' # any character but those from space to ~; also " and \
    while :; do
        # shellcheck disable=SC2254 # a pattern
        case $rest in
        *$special*)
            # shellcheck disable=SC2295 # a pattern
            head=${rest%%$special*}
            rest=${rest#"$head"}
            case $rest in
            \"*) quoted=$quoted$head'\"' ;;
            \\*) quoted=$quoted$head'\\' ;;
            *) quoted=$quoted$head'?' ;;
            esac
            rest=${rest#?}
            ;;
        *) break ;;
        esac
    done
    quoted=\"$quoted$rest\"
}

source_file=
for argument; do
    case $argument in
    *.cu) source_file=$argument ;;
    esac
done
if [ -z "$source_file" ]; then # not a kernel, so no miss
    [ "$policy" = refuse ] || compile "$@"
    printf '%s\n' "frozen nvcc: wanted --version or a kernel to compile, found: $*" >&2
    exit 1
fi

# The source takes the kernel's address, and so has its name: &sm90_fp8_gemm_1d2d_impl<
kernel=
if [ -r "$source_file" ]; then
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in
        *'&'*'_impl<'*)
            kernel=${line#*'&'}
            kernel=${kernel%%'_impl<'*}
            break
            ;;
        *'&'*'<'*) # an instantiation of any other template
            [ -n "$kernel" ] || { kernel=${line#*'&'} && kernel=${kernel%%'<'*}; }
            ;;
        *'(&'[A-Za-z_]*')'*)
            [ -n "$kernel" ] || { kernel=${line#*'(&'} && kernel=${kernel%%')'*}; }
            ;;
        esac
    done <"$source_file"
fi
kernel=${kernel#deep_gemm::}
case $kernel in
*[!A-Za-z0-9_:]*) kernel= ;;
esac

if [ -n "$kernel" ]; then
    named=$kernel
else
    json "$source_file"
    named=$quoted
fi

# The process that runs DeepGEMM calls this script by `nvcc ... 2>&1` in a shell and reads its output: nobody sees a word of
# it if the compilation succeeds, and legacy DeepGEMM's error has none of it either. So write the line $1 to that process's
# own stderr as well. Its child is this script, or the shell between them, whose stderr may be the pipe that this script has.
# There is no line if this script's stderr is no pipe, or if that process's is a socket, another user's, or a file that is
# not open for appending: the process would write over the line.
tell_server() {
    own=/proc/$$/fd/2
    [ -p "$own" ] || return
    process=$PPID
    if [ "/proc/$process/fd/2" -ef "$own" ]; then
        while read -r name process && [ "$name" != PPid: ]; do :; done 2>/dev/null <"/proc/$PPID/status"
    fi
    server=/proc/$process/fd/2
    [ -w "$server" ] && [ ! "$server" -ef "$own" ] && write_to_server "$1"
}

write_to_server() (
    if [ -f "$server" ]; then
        while read -r name flags && [ "$name" != flags: ]; do :; done <"${server%/fd/2}/fdinfo/2"
        case $flags in
        *[2367]???) ;; # O_APPEND, in octal
        *) exit 1 ;;
        esac
    fi
    # To open a pipe that nobody reads would wait, and so would a write to a full one that is open for reading here.
    trap '' PIPE
    if [ -p "$server" ]; then exec 9<>"$server" || exit 1; fi
    exec 8>>"$server" 9<&- || exit 1
    printf '%s\n' "frozen nvcc: $1" >&8
) 2>/dev/null

absolute() { # sets $path: $1, from the root
    case $1 in
    /*) path=$1 ;;
    *) path=$PWD/$1 ;;
    esac
}
absolute "$source_file"
source_path=$path

# Write the miss into the log $1. Another user may be able to write into the log's folder, so the log must be a regular file
# and no link, and nobody else can write to what is made. With $2, the name of a folder, the log must be in that folder, and
# nobody else may be able to enter it.
log_miss() (
    umask go-w
    cd -P "${1%/*}/" || exit 1
    if [ -n "$2" ]; then # once inside, nobody can exchange the folder
        [ "${PWD##*/}" = "$2" ] && [ -O . ] || exit 1
        case $(ls -ld .) in
        drwx------*) ;;
        *) exit 1 ;;
        esac
    fi
    name=./${1##*/}
    [ ! -h "$name" ] && { [ -f "$name" ] || [ ! -e "$name" ]; } && : >>"$name" || exit 1

    # Keep a copy of the source: DeepGEMM removes its own, and `cachebuilder misses` reads the shape in it. It is written
    # under another name and renamed, so that no reader sees half of it. Without cp, mkdir, cksum or mv there is no copy.
    copy=
    if sum=$(cksum <"$source_path") && { [ -d "$name.d" ] || mkdir "$name.d" || [ -d "$name.d" ]; } &&
        [ ! -h "$name.d" ] && [ -O "$name.d" ]; then
        copy=${kernel:-kernel}-${sum%% *}.cu
        if [ ! -f "$name.d/$copy" ]; then
            { cp "$source_path" "$name.d/$copy.$$" && mv "$name.d/$copy.$$" "$name.d/$copy"; } || copy=
        fi
    fi
    copy=${copy:+$1.d/$copy}

    # One line is one write(2) to a file opened for appending, so the lines of many writers do not mix. It stays under
    # 4096 bytes, which every shell's printf writes at once.
    time=$(date +%s) || time=
    case $time in
    *[!0-9]* | '') time=null ;;
    esac
    json "$policy"; json_policy=$quoted
    json "$artifact"; json_artifact=$quoted
    if [ -n "$kernel" ]; then json "$kernel"; else quoted=null; fi
    json_kernel=$quoted
    if [ -n "$copy" ] && [ ${#copy} -lt 500 ]; then json "$copy"; else quoted=null; fi
    json_source=$quoted
    for length in 2000 1000; do # quoting may double it
        shown=$command
        if [ ${#command} -gt $length ]; then shown=$(printf "%.${length}s..." "$command"); fi
        json "$shown"
        [ ${#quoted} -gt 2100 ] || break
    done
    printf '%s\n' "{\"time\": $time, \"pid\": $$, \"kernel\": $json_kernel, \"policy\": $json_policy, \"artifact\": $json_artifact, \"fingerprint\": \"$fingerprint\", \"source\": $json_source, \"command\": $quoted}" >>"$name"
) 2>/dev/null

command="$0 $*"
absolute "${CACHEBUILDER_MISS_LOG:-$here/misses.jsonl}"
log=$path
if ! log_miss "$log"; then
    # A temporary folder is shared with other users: only a folder of this user's own in it will do.
    user=$(id -u 2>/dev/null) || user=
    private=cachebuilder-misses-$user
    absolute "${TMPDIR:-/tmp}/$private/misses.jsonl"
    mkdir -m 700 "${path%/*}" 2>/dev/null
    if [ -n "$user" ] && log_miss "$path" "$private"; then
        log=$path
    else
        no_log="the miss is in no log: wanted $log, or ${path%/*} as a folder that only this user can enter"
        printf '%s\n' "frozen nvcc: $no_log" >&2
        tell_server "$no_log"
        log=
    fi
fi

case $policy in
compile) compile "$@" ;;
compile-and-warn)
    warning="$named is not in the restored cache (artifact $artifact): compiling it now"
    printf '%s\n' "frozen nvcc: $warning" >&2
    tell_server "$warning"
    compile "$@"
    ;;
refuse) ;;
*) printf '%s\n' "frozen nvcc: CACHEBUILDER_ON_MISS: wanted refuse, compile or compile-and-warn, found $policy" >&2 ;;
esac
tell_server "$named is not in the restored cache (artifact $artifact), and nothing is compiled here"
printf '%s\n' \
    "frozen nvcc: $named is not in the restored cache (artifact $artifact), and nothing is compiled here." \
    "frozen nvcc: The manifest lacks its shape, or a variable, the headers or a path are not those of the build${log:+: cachebuilder misses $log says which, and what to do}." \
    "frozen nvcc: To compile it here, set CACHEBUILDER_ON_MISS=compile, with a real nvcc on PATH or in CACHEBUILDER_REAL_NVCC." >&2
exit 1
