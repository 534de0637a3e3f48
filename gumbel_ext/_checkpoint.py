"""Generators under activation checkpointing.

:mod:`torch.utils.checkpoint` runs a function again in the backward, with the default generators
restored and all others as they are by then. A call that reads such a generator would draw other
noise than the forward did, and the gradient would be that of neither.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType

import torch

__all__ = ["check_not_recomputed", "replay_generators"]


class _Replayed(threading.local):
    """Generators that hold, on this thread and for now, the state of their forward."""

    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []


_replayed = _Replayed()


def replay_generators(
    *generators: torch.Generator,
) -> Callable[
    [], tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]
]:
    """Has activation checkpointing recompute with the noise that these generators gave at first::

        y = checkpoint(
            block, x, use_reentrant=False, context_fn=gumbel_ext.replay_generators(generator)
        )

    Their states are kept where the block begins, put back for its recomputation, and left after it
    as they were before. This holds for all that the block draws from them, ``torch.rand`` included.

    Args:
        generators: the generators that the checkpointed function reads, of any device.

    Returns:
        The ``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`, which has one for
        ``use_reentrant=False`` alone. Otherwise, and under ``torch.compile``, which takes no
        generators, draw states outside the function and pass them to it:
        :func:`gumbel_ext.draw_rng_state`.

    Raises:
        TypeError: one of ``generators`` is not a torch.Generator.
    """
    for generator in generators:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                "replay_generators: generators must be torch.Generators, got "
                f"{type(generator).__name__}"
            )

    def context_fn() -> tuple[_Record, _Replay]:
        record = _Record(generators)
        return record, _Replay(record)

    return context_fn


class _Record(contextlib.AbstractContextManager[None]):
    def __init__(self, generators: tuple[torch.Generator, ...]) -> None:
        self.generators = generators
        self.states: list[torch.Tensor] = []

    def __enter__(self) -> None:
        self.states = [generator.get_state() for generator in self.generators]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


class _Replay(contextlib.AbstractContextManager[None]):
    """May be entered again, as by a second backward of a retained graph."""

    def __init__(self, record: _Record) -> None:
        self.record = record
        self.interrupted: list[list[torch.Tensor]] = []

    def __enter__(self) -> None:
        generators = self.record.generators
        self.interrupted.append([generator.get_state() for generator in generators])
        for generator, state in zip(generators, self.record.states, strict=True):
            generator.set_state(state)
        _replayed.generators.extend(generators)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        generators = self.record.generators
        del _replayed.generators[len(_replayed.generators) - len(generators) :]
        for generator, state in zip(generators, self.interrupted.pop(), strict=True):
            generator.set_state(state)


def check_not_recomputed(function: str, generator: torch.Generator) -> None:
    """Raises where a generator would silently give other noise than in the forward.

    A forward that runs inside a backward, and is recorded for autograd, is a recomputation.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return
    # Checkpointing itself restores the default generators, also where they are passed by name.
    restored = (*_replayed.generators, torch.default_generator, *torch.cuda.default_generators)
    if torch.is_grad_enabled() and not any(g is generator for g in restored):
        raise RuntimeError(
            f"{function}: generator is read again by a backward that recomputes its forward "
            "(activation checkpointing) and would give other noise than then; pass "
            "context_fn=gumbel_ext.replay_generators(generator) to checkpoint, or rng_state from "
            "gumbel_ext.draw_rng_state(generator), drawn outside of the checkpointed function"
        )
