"""The command line: one file a verb. The only code that prints or exits."""

from __future__ import annotations

import sys

import click

from cachebuilder import __version__
from cachebuilder.cli.build import build
from cachebuilder.cli.diff import diff
from cachebuilder.cli.doctor import doctor
from cachebuilder.cli.inspect import inspect
from cachebuilder.cli.misses import misses
from cachebuilder.cli.plan import plan
from cachebuilder.cli.verify import verify
from cachebuilder.errors import EXIT_CODES, CacheBuilderError

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items())


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Build DeepGEMM's kernel cache ahead of time, on a machine with no GPU."""


for verb in (build, plan, inspect, verify, diff, doctor, misses):
    cli.add_command(verb)


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
        click.echo("interrupted: what was compiled is kept, the next build goes on from there", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        sys.exit(0)
