"""The command `steer`: every job of the library from a shell, each a thin call."""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

import steer
from steer.cli.directions.direction import direction_
from steer.cli.directions.recipe import recipe_
from steer.cli.directions.show import show_
from steer.cli.latents.sae import app as sae
from steer.cli.methods.demo import demo_
from steer.cli.methods.organism import donors_, organism_, train_reasoner_
from steer.cli.methods.rice import rice_
from steer.cli.methods.thinkedit import thinkedit_
from steer.cli.refusals import is_expected, sentence
from steer.cli.report.report import report_
from steer.cli.report.view import view_
from steer.cli.run.compare import compare_
from steer.cli.run.evaluate import evaluate_
from steer.cli.run.generate import generate_
from steer.cli.run.parity import parity_
from steer.cli.run.record import experts_, record_
from steer.cli.run.select import select_
from steer.cli.run.serve import serve_
from steer.cli.run.sweep import sweep_
from steer.cli.weights.diff import diff_
from steer.cli.weights.exchange import export_, import_
from steer.cli.weights.vector import app as vector

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_,
    "thinkedit": thinkedit_,
    "generate": generate_,
    "evaluate": evaluate_,
    "compare": compare_,
    "select": select_,
    "sweep": sweep_,
    "serve": serve_,
    "parity": parity_,
    "record": record_,
    "experts": experts_,
    "rice": rice_,
    "direction": direction_,
    "recipe": recipe_,
    "show": show_,
    "diff": diff_,
    "export": export_,
    "import": import_,
    "report": report_,
    "view": view_,
    "organism": organism_,
    "donors": donors_,
    "train-reasoner": train_reasoner_,
}


def application() -> typer.Typer:
    """The command with all its commands: one function of a folder here each, and its line in `COMMANDS`."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(steer_)
    for name, command in COMMANDS.items():
        app.command(name)(command)
    app.add_typer(vector, name="vector")
    app.add_typer(sae, name="sae")
    return app


def _version(asked: bool) -> bool:
    if asked:
        Console().print(f"thinksteer {steer.__version__}", highlight=False)
        raise typer.Exit
    return asked


def steer_(
    version: Annotated[  # noqa: ARG001  # handled by its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look inside reasoning language models, and steer how they think."""


app = application()


def main() -> None:
    """Run the command; what a user can mend is told in a sentence, and a traceback is for faults of the code.

    With the variable THINKSTEER_TRACEBACK set, the sentence comes with its traceback.
    """
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if os.environ.get("THINKSTEER_TRACEBACK") or not is_expected(error):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # `steer` alone
            sys.stderr.write(f"{error}\n")
        else:
            _say("error", sentence(error))
        sys.exit(2)
    if code == 130:
        _say("stopped", "the same command goes on, where completions are kept.")
    sys.exit(code if isinstance(code, int) else 0)


def _say(kind: str, text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{kind}: ", "bold red"), text))


if __name__ == "__main__":
    main()
