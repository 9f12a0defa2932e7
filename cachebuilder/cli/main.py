"""The command line: one file for each verb. Only the modules of this folder print or exit."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from cachebuilder.cli import console, table
from cachebuilder.common.files import is_full
from cachebuilder.common.version import __version__
from cachebuilder.errors import EXIT_CODES, CacheBuilderError, InstallationError

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items())

#: What a user is doing → the verbs for it, each with one line of help. A verb is the command of the same name in the
#: module of the same name; a hyphen becomes an underscore there.
GROUPS: dict[str, dict[str, str]] = {
    "Write a manifest": {
        "observe": "Write one from an engine that runs on a virtual GPU.",
        "manifest": "Write one from a model's config.json.",
        "record": "Write one from the kernels that a program asks for.",
        "gpus": "List the GPUs that a manifest can name.",
    },
    "Build": {
        "plan": "Print every kernel that DeepGEMM will ask for.",
        "build": "Compile every kernel into one artifact.",
        "fleet": "Build for many models, GPUs and engines.",
        "cache": "Show or shrink the cache folder of builds.",
    },
    "Ship": {
        "keygen": "Make a key pair to sign artifacts with.",
        "sign": "Sign an artifact.",
        "verify-signature": "Check who signed an artifact.",
        "push": "Push artifacts to a registry or an object store.",
        "pull": "Fetch an artifact.",
        "sync": "Keep a folder up to date with a tag.",
    },
    "Serve": {
        "restore": "Unpack an artifact where DeepGEMM reads it.",
        "env": "Print the variables that a serving process needs.",
        "run": "Restore an artifact and run a program with it.",
        "bake": "Fill an engine's other compilers' caches there.",
        "misses": "Explain a log of missing kernels.",
    },
    "Prove": {
        "verify": "Replay every call, and list the missing kernels.",
        "doctor": "Check this machine, and list what is wrong.",
    },
    "Look": {
        "inspect": "Print what is in an artifact.",
        "diff": "Compare two artifacts or folders.",
        "explain": "Describe a kernel in words.",
        "report": "Write an HTML page about an artifact or a plan.",
        "schema": "Print the JSON schema of a file.",
    },
}
VERBS = tuple(verb for verbs in GROUPS.values() for verb in verbs)


class _Verbs(click.Group):
    """Imports the module of a verb only when the verb is used, so that `restore` does not load what `build` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = name.replace("-", "_")
        command: click.Command = getattr(import_module(f"cachebuilder.cli.{module}"), module)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, VERBS))  # the help lines of all groups start in the same column
        for title, verbs in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{verb:<{width}}", line) for verb, line in verbs.items()])


@click.group(cls=_Verbs, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Build DeepGEMM's kernel cache ahead of time, on a machine with no GPU."""
    table.follow_no_color(context)


def main() -> None:
    """Run the command line. An expected failure prints a message and perhaps a hint, and has its own exit code."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except CacheBuilderError as error:
        console.echo(f"error: {error}", err=True)
        if error.hint:
            console.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        console.echo("interrupted: compiled kernels are kept for the next build", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has closed it, as `| head` does
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if not is_full(error):
            raise
        console.echo(f"error: {error.filename or 'the output'}: cannot be written: {error.strerror}", err=True)
        console.echo("hint: make room", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left of the output goes there when Python ends
        sys.exit(InstallationError.exit_code)
