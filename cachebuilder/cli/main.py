"""The command line: one file a verb. The only code that prints or exits."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from cachebuilder.cli import table
from cachebuilder.common.version import __version__
from cachebuilder.errors import EXIT_CODES, CacheBuilderError

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items())

#: What a person is doing → the verbs for it, each with one line of help. Each verb is the command of that name in the
#: module of that name; a hyphen is an underscore there.
GROUPS: dict[str, dict[str, str]] = {
    "Write a manifest": {
        "manifest": "From a model's config.json, by an engine's rules.",
        "record": "From a program that runs, kernel by kernel.",
        "gpus": "List the GPUs that a manifest can name.",
    },
    "Build": {
        "plan": "Print every kernel that DeepGEMM will ask for.",
        "build": "Compile every kernel into one artifact.",
        "cache": "Show or shrink the cache folder of builds.",
    },
    "Ship": {
        "keygen": "Make a key pair to sign artifacts with.",
        "sign": "Sign an artifact.",
        "verify-signature": "Check who signed an artifact.",
        "push": "Push artifacts to a registry or an object store.",
        "pull": "Fetch an artifact.",
        "sync": "Keep a folder at what a tag stands for.",
    },
    "Serve": {
        "restore": "Put an artifact where DeepGEMM reads it.",
        "env": "Print the variables of a serving process.",
        "run": "Run a program from an artifact.",
        "misses": "Explain a log of missing kernels.",
    },
    "Prove": {
        "verify": "Replay every call: which kernels are missing?",
        "doctor": "Say what is on this machine, and what is wrong.",
    },
    "Look": {
        "inspect": "Print what is in an artifact.",
        "diff": "Compare two artifacts or folders.",
        "explain": "Say in words what a kernel is.",
        "report": "Write one HTML page on an artifact or a plan.",
        "schema": "Print the JSON schema of a file.",
    },
}
VERBS = tuple(verb for verbs in GROUPS.values() for verb in verbs)


class _Verbs(click.Group):
    """Imports a verb when it is asked for: a restore does not wait for what a build needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = name.replace("-", "_")
        command: click.Command = getattr(import_module(f"cachebuilder.cli.{module}"), module)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, VERBS))  # one column for all groups
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
    """Run the command line; every expected failure is one message, a hint and its own exit code."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except CacheBuilderError as error:
        click.echo(f"error: {error}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: what was compiled is kept, and the next build goes on from there", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone away, as `| head` does
        sys.stderr.close()
        sys.exit(0)
