"""Trains the demo GPT sharded by FSDP2, with packed states, and survives being killed.

    torchrun --nproc-per-node 4 examples/train_fsdp2.py
    torchrun --nproc-per-node 2 examples/train_fsdp2.py      # goes on from the last checkpoint

On GPUs, one for each process, through NCCL; without any on the CPU, through gloo.

Every process reads its part of the same global batch, so losses and widths do not depend on the
number of processes. Checkpoints go through torch.distributed.checkpoint into `--out`; a run that
finds one there continues from it, with as many processes as it was started with.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stq_compile as stq
from stq_compile.dcp import LoadPlanner
from tinygpt import GPTConfig, Text, TinyGPT, load_text

LATEST = "latest"  # a file with the name of the last complete checkpoint
LOSSES = "losses.jsonl"
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def own_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # which torchrun sets
    torch.cuda.set_device(device)
    return device


def build(
    config: GPTConfig, lr: float, interval: int, device: torch.device
) -> tuple[TinyGPT, torch.optim.AdamW]:
    """The model, each block sharded over all processes, and its compiled optimizer."""
    torch.manual_seed(0)
    model = TinyGPT(config).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=lr, betas=(0.9, 0.99))
    return model, stq.compile(optimizer, interval=interval)


def part_of_batch(text: Text, step: int, size: int, context: int) -> Tensor:
    """This process's windows of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    windows = text.batch(generator, size, context)
    return windows.chunk(dist.get_world_size())[dist.get_rank()]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint, and a note that it is complete."""
    name = f"step-{step}"
    state_dict_saver.save(state_of(model, optimizer), checkpoint_id=folder / name)
    if dist.get_rank() == 0:
        note = folder / f"{LATEST}.part"
        note.write_text(name)
        note.replace(folder / LATEST)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last complete checkpoint; the number of steps that it had made."""
    if not (folder / LATEST).exists():
        return 0
    name = (folder / LATEST).read_text()
    state = state_of(model, optimizer)
    state_dict_loader.load(state, checkpoint_id=folder / name, planner=LoadPlanner())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return int(name.removeprefix("step-"))


def train(
    text: Text,
    model: TinyGPT,
    optimizer: torch.optim.Optimizer,
    steps: range,
    batch: int,
    folder: Path,
    save_every: int,
) -> None:
    """Train, write the global loss of every step to a file, and save now and then."""
    first = dist.get_rank() == 0
    device = next(model.parameters()).device
    started = time.perf_counter()
    for step in steps:
        windows = part_of_batch(text, step, batch, model.config.context)
        loss = model.loss(windows.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        total = loss.detach() / dist.get_world_size()
        dist.all_reduce(total)
        if first:
            with (folder / LOSSES).open("a") as file:
                file.write(json.dumps({"step": step, "loss": float(total)}) + "\n")
        if (step + 1) % save_every == 0 or step + 1 == steps.stop:
            save(folder, step + 1, model, optimizer)
            if first:
                bits = stq.report(optimizer).bits_per_element
                seconds = time.perf_counter() - started
                print(
                    f"step {step + 1}: loss {float(total):.4f}, {bits:.2f} true bits per element, "
                    f"{seconds:.0f} s",
                    flush=True,
                )


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps in all.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Samples in the global batch.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    interval: Annotated[int, typer.Option(min=1, help="Steps between looks.")] = 50,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the model.")] = 4,
    width: Annotated[int, typer.Option(min=32, help="Of the model, a multiple of 4.")] = 160,
    context: Annotated[int, typer.Option(min=8, help="Bytes that the model sees.")] = 128,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = Path("out/fsdp2"),
) -> None:
    """Train a small GPT with FSDP2; run it under torchrun."""
    device = own_device()
    dist.init_process_group(BACKENDS[device.type])
    if batch % dist.get_world_size():
        raise typer.BadParameter(f"--batch {batch} is not divided by {dist.get_world_size()}")
    out.mkdir(parents=True, exist_ok=True)
    model, optimizer = build(GPTConfig(layers, width, context=context), lr, interval, device)
    done = load(out, model, optimizer)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, from step {done}", flush=True)
    train(load_text(), model, optimizer, range(done, steps), batch, out, save_every)
    if dist.get_rank() == 0:
        print(stq.report(optimizer))
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
