"""``stq trace``: the captured step."""

from __future__ import annotations

import typer

from stq_compile.cli.common import Subject, errors, one_line, print_code, print_json, verb

app = typer.Typer()


@app.command()
@verb
def trace(subject: Subject, as_json: bool) -> None:
    """Print the captured step graph, every input with its role and source.

    Examples: [bold]stq trace AdamW[/bold]; [bold]stq trace torch.optim.Muon --model gpt2[/bold];
    [bold]stq trace my_module.py:make_optimizer[/bold]
    """
    found = subject.inspect()
    (unit,) = found.captured.program.units
    refused = None if found.refused is None else one_line(str(found.refused))
    if as_json:
        inputs = [
            {
                "name": o.name,
                "role": str(o.role),
                "param": o.source.name,
                "key": o.source.key,
                "shape": list(o.shape),
                "dtype": o.dtype_name,
            }
            for o in unit.operands
        ]
        print_json(
            {
                "optimizer": found.name,
                "inputs": inputs,
                "nodes": len(unit.calls),
                "graph": str(unit),
                "refused": refused,
            }
        )
        return
    print_code(str(unit), "python")
    if refused is not None:
        errors.print(f"stq: not compiled: {refused}", markup=False, style="yellow", soft_wrap=True)
