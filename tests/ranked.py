"""Calls of a function in several processes that work together, as under torchrun but without its
start-up time."""

import multiprocessing
import os
import socket
import sys
import traceback

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["distill", "finetune", "kd", "pretrain_target", "tests.ranked"])


def _one(rank, count, port, folder, function, args):
    os.environ |= dict(
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    sys.stdout = open(folder / f"out{rank}", "w", buffering=1)  # noqa: SIM115
    sys.stderr = open(folder / f"err{rank}", "w", buffering=1)  # noqa: SIM115
    try:
        torch.save(function(*args), folder / f"result{rank}")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def ranked(count, folder, function, *args):
    """`function(*args)`, of a module's own, in `count` processes: their results by rank (None of
    one that has ended otherwise) and their exit codes. What they print is in `folder`: out0, err0,
    out1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SERVER.Process(target=_one, args=(rank, count, port, folder, function, args))
        for rank in range(count)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    results = [folder / f"result{rank}" for rank in range(count)]
    return [torch.load(path) if path.is_file() else None for path in results], [
        each.exitcode for each in processes
    ]
