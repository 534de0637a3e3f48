"""Processes that talk over Gloo, started once and given one function after another."""

import os
import queue
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 4
_TIMEOUT = 120  # seconds for one function


def _serve(rank, world, folder, tasks, results):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)  # noqa: PTH118
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        while (task := tasks.get()) is not None:
            function, args = task
            torch.manual_seed(20260)
            torch.compiler.reset()
            try:
                results.put((rank, None, function(rank, world, *args)))
            except BaseException:
                results.put((rank, traceback.format_exc(), None))
    finally:
        dist.destroy_process_group()


class Processes:
    """``run(function, *args)`` calls ``function(rank, world, *args)`` in each and waits for all.

    The function must be importable.  It checks what it computes itself; what it returns comes back
    as a list.  After a failure the processes are started anew: they may wait for each other.
    """

    def __init__(self, world=WORLD):
        self.world = world
        self.workers = self.tasks = []

    def start(self):
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.tasks = [context.Queue() for _ in range(self.world)]
        self.results = context.Queue()
        self.workers = [
            context.Process(
                target=_serve,
                args=(rank, self.world, self.folder.name, self.tasks[rank], self.results),
                daemon=True,
            )
            for rank in range(self.world)
        ]
        for worker in self.workers:
            worker.start()

    def stop(self, politely=True):
        for worker, tasks in zip(self.workers, self.tasks, strict=True):
            if politely:
                tasks.put(None)
                worker.join(10)
            worker.kill()
            worker.join()
        self.workers = self.tasks = []

    def run(self, function, *args):
        if not self.workers:
            self.start()
        for tasks in self.tasks:
            tasks.put((function, args))
        out = [None] * self.world
        for _ in range(self.world):
            try:
                rank, error, value = self.results.get(timeout=_TIMEOUT)
            except queue.Empty:
                self.stop(politely=False)
                raise TimeoutError(f"{function.__name__}: no answer in {_TIMEOUT} s") from None
            if error is not None:
                self.stop(politely=False)
                raise AssertionError(f"process {rank}:\n{error}")
            out[rank] = value
        return out
