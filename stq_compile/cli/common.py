"""What all verbs share: their parameters, their errors, and how they print."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax

from stq_compile.cli.flags import FLAGS, options_from
from stq_compile.errors import InternalError, InvalidTargetError, StqError
from stq_compile.printable import printable

if TYPE_CHECKING:
    from stq_compile.inspection import Inspection

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

TARGET_HELP = (
    "A class (AdamW, torch.optim.Muon, lion_pytorch.Lion), or module:callable or "
    "file.py:callable that returns an optimizer."
)
MODEL_HELP = (
    "Parameters of a class: gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-8b, llama-70b, vit-b, "
    "vit-l or vit-h, without memory. One 128 x 64 matrix if neither this nor --shapes is given."
)
Target = Annotated[str, typer.Argument(help=TARGET_HELP, show_default=False)]
MACHINES = "cpu, cuda:80, cuda:90, cuda:100, hip:gfx942"

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_WHERE = {
    "model": Annotated[str | None, typer.Option(help=MODEL_HELP, show_default=False)],
    "shapes": Annotated[
        Path | None,
        typer.Option(
            help='Parameters of a class: a JSON file, {"name": [128, 64], ...}.', show_default=False
        ),
    ],
    "arg": Annotated[
        list[str] | None,
        typer.Option(
            help="A keyword argument of a class, as momentum=0.9; may be repeated.",
            metavar="NAME=VALUE",
            show_default=False,
        ),
    ],
}
_ALWAYS = {
    "as_json": Annotated[bool, typer.Option("--json", help="Machine-readable output.")],
    "traceback": Annotated[bool, typer.Option("--traceback", help="Show the stack of an error.")],
}


def verb(function: Callable[..., Any]) -> Callable[..., None]:
    """A command of ``stq``: adds ``--json`` and ``--traceback``, and turns errors into one line.

    A parameter ``as_json`` of ``function`` is given if it has one; a parameter ``subject`` gets a
    `Subject` and adds the flags that say which optimizer and which compile options.
    """
    signature = inspect.signature(function, eval_str=True)
    parameters = dict(signature.parameters)
    has_subject = parameters.pop("subject", None) is not None
    wants_json = parameters.pop("as_json", None) is not None
    extra = {**_WHERE, **FLAGS} if has_subject else {}
    added = {**extra, **(_ALWAYS if wants_json else {"traceback": _ALWAYS["traceback"]})}

    @functools.wraps(function)
    def run(**given: Any) -> None:
        with one_line_errors(given.pop("traceback")):
            if has_subject:
                picked = {name: given.pop(name) for name in extra}
                given["subject"] = Subject(given.pop("target"), picked)
            function(**given)

    run.__doc__ = _paragraphs(inspect.getdoc(function) or "")
    first = [
        inspect.Parameter("target", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Target)
    ]
    defaults = {"as_json": False, "traceback": False}
    shown = signature.replace(
        parameters=[
            *(first if has_subject else []),
            *parameters.values(),
            *(
                inspect.Parameter(n, _KEYWORD, default=defaults.get(n), annotation=a)
                for n, a in added.items()
            ),
        ],
        return_annotation=None,
    )
    run.__signature__ = shown  # type: ignore[attr-defined]  # inspect and typer read it
    run.__annotations__ = {p.name: p.annotation for p in shown.parameters.values()}
    return run


def _paragraphs(text: str) -> str:
    """Without the line breaks of the source: typer keeps them, and wraps besides."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


class Subject:
    """The optimizer that a verb is about, and the options to compile it with."""

    def __init__(self, target: str, given: Mapping[str, Any]) -> None:
        self.target = target
        self.given = given

    @property
    def title(self) -> str:
        """``AdamW on gpt2``."""
        on = self.given["model"] or self.given["shapes"]
        return f"{self.target} on {on}" if on else self.target

    def inspect(self, *, whole: bool = True) -> Inspection:
        """The optimizer's step, taken through the compiler; see `inspect_optimizer`."""
        from stq_compile import inspection, targets
        from stq_compile.options import Options

        options = Options.from_dict(options_from(self.given))
        shapes = targets.read_shapes(self.given["model"], self.given["shapes"])
        arguments = _arguments(self.given["arg"] or [])
        with progress(f"making {self.target}"):
            optimizer = targets.make_optimizer(self.target, shapes, arguments)
        return inspection.inspect_optimizer(optimizer, options, whole=whole, progress=progress)


def _arguments(given: list[str]) -> dict[str, Any]:
    """``["momentum=0.9"]`` as keyword arguments; a value that is no Python literal is text."""
    found: dict[str, Any] = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidTargetError(target=f"--arg {entry}", reason="write NAME=VALUE")
        found[name] = literal(text)
    return found


def literal(text: str) -> Any:
    """A Python literal, or else the text itself."""
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@contextmanager
def one_line_errors(traceback: bool) -> Iterator[None]:
    """Errors as one line on standard error. Exit code 2 for what the user can mend, else 1."""
    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:  # as in `stq trace AdamW | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except Exception as error:
        if traceback:
            tracebacks.print_exc()
        known = isinstance(error, StqError)
        text = str(error) if known else f"{type(error).__name__}: {error} (--traceback shows where)"
        typer.echo(f"stq: {one_line(text)}", err=True)
        defect = isinstance(error, InternalError) or not known
        raise typer.Exit(1 if defect else 2) from None


def one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def print_json(value: Any) -> None:
    """One JSON document on standard output, whatever the width of the terminal."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def print_code(text: str, language: str) -> None:
    """Highlighted where the output is a terminal; lines are not cut, so that they can be copied."""
    if console.is_terminal:
        console.print(Syntax(text, language, word_wrap=True, background_color="default"))
    else:
        sys.stdout.write(text + "\n")


KINDS = {
    "orthogonal": "orthonormal columns or rows (format orthogonal)",
    "semidefinite": "symmetric and positive semidefinite (format cholesky)",
}


def print_regions(found: Inspection) -> None:
    """What runs operator by operator, and why: of what is not cut nothing is proved."""
    for region in found.regions():
        states = ", ".join(region["states"]) or "no state"
        many = "" if region["tensors"] == 1 else "s"
        console.print(
            f"{region['template']} ({region['tensors']} tensor{many}; {states}) runs operator by "
            f"operator {'between kernels' if region['cut'] else 'on decoded states'}: "
            f"{region['reason']}",
            markup=False,
        )
        for state, kind in region["matrices"].items():
            console.print(f"  {state}: {KINDS[kind]}", markup=False)
        for state in region["mixed"]:
            console.print(f"  {state}: errors mixed by products; 8 bits at least", markup=False)


def progress(what: str) -> AbstractContextManager[Any]:
    """A bar on standard error for as long as the context is open, on a terminal only."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    bar.add_task(what, total=None)
    return bar
