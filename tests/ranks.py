"""Run a function in several processes that communicate, as torchrun does but faster to start."""

import multiprocessing
import os
import socket
import sys
import traceback

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["distill", "finetune", "kd", "pretrain_target", "tests.ranks"])


def _run_rank(rank, count, port, folder, function, args):
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


def run_ranks(count, folder, function, *args):
    """Run `function(*args)` in `count` processes.

    The function must be defined at the top of a module. Returns the results by rank (None for a
    process that did not return one) and the exit codes. The output of rank k is in the files out<k>
    and err<k> in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SERVER.Process(target=_run_rank, args=(rank, count, port, folder, function, args))
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
