"""DistributedDataParallel's buckets: part of the state of a run on three or more ranks.

DDP adds gradients up bucket by bucket. It starts with one order of buckets and, at the second iteration, rebuilds them in
the order in which gradients came in the first. Which gradients share a bucket decides the order of additions in the ring,
so a run that resumes with fresh buckets differs in the last bits (two ranks do not: a + b = b + a). Therefore the order is
saved, and on resume the reducer is built with it from the start.

Between the first iteration and the rebuild the order is not known yet; a save point there is *unclean* and moves on to the
next step. This is private territory of torch: where a name is missing, that is said once and the run goes on without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from supervisor.training.world import say

Order = list[list[int]]
_torch_dist: Any = dist  # its private names
_PATIENCE = 3  # save points that a module may put off; one that never trains must not put them off for ever


class Buckets:
    """The bucket orders of every DDP module in the Session's modules, by name."""

    def __init__(self, given: Mapping[str, nn.Module]) -> None:
        self._modules = dict(_find(given))
        self._preset: dict[str, Order] = {}
        self._put_off: dict[str, int] = {}
        self._given_up = False

    def is_settled(self) -> bool:
        """False while a module has trained but not yet rebuilt its buckets."""
        for name, module in self._modules.items():
            if name in self._preset or not _matters(module) or self._put_off.get(name, 0) >= _PATIENCE:
                continue
            try:
                waits = _will_rebuild(module)
            except (AttributeError, KeyError, RuntimeError) as error:
                self._give_up(error)
                return True
            if waits:
                self._put_off[name] = self._put_off.get(name, 0) + 1
                return False
        return True

    def capture(self) -> dict[str, Order]:
        """The order of each module that has rebuilt its buckets, or will rebuild them to what they were preset to."""
        orders = dict(self._preset)
        for name, module in self._modules.items():
            if not _matters(module):
                continue
            try:
                if order := _order(module):
                    orders[name] = order
            except (AttributeError, KeyError, RuntimeError, ValueError) as error:
                self._give_up(error)
        return orders

    def restore(self, orders: Mapping[str, Order]) -> None:
        """Rebuild the reducers with the saved orders. Call it before the first forward, with no gradients pending."""
        for name, order in orders.items():
            module = self._modules.get(name)
            if module is None or not _matters(module):
                continue
            try:
                _rebuild(module, order)
            except (AttributeError, TypeError, RuntimeError, ValueError) as error:
                self._give_up(error)
            else:
                self._preset[name] = order

    def _give_up(self, error: Exception) -> None:
        if not self._given_up:
            self._given_up = True
            say(
                "this torch does not let the bucket order of DistributedDataParallel be kept "
                f"({type(error).__name__}: {error}); a resumed run may differ in the last bits"
            )


def _find(given: Mapping[str, nn.Module]) -> Iterator[tuple[str, DistributedDataParallel]]:
    for keyword, module in given.items():
        for name, child in module.named_modules():
            if isinstance(child, DistributedDataParallel):
                yield f"{keyword}.{name}".rstrip("."), child


def _matters(module: DistributedDataParallel) -> bool:
    rebuilds = bool(module.static_graph) or not module.find_unused_parameters
    return rebuilds and (dist.get_world_size(module.process_group) > 2 or bool(module._comm_hooks))


def _logged(module: Any) -> dict[str, Any]:
    """DDP's own log. It takes note of the buckets only at its next forward, so have it do that now."""
    module.logger.set_runtime_stats_and_log()
    logged: dict[str, Any] = module._get_ddp_logging_data()
    return logged


def _will_rebuild(module: Any) -> bool:
    logged = _logged(module)
    rebuilt = bool(module._has_rebuilt_buckets) or bool(logged.get("has_rebuilt_buckets"))
    return not rebuilt and int(logged.get("iteration", 0)) > 0


def _order(module: Any) -> Order:
    text = str(_logged(module).get("rebuilt_per_bucket_param_indices", ""))
    order = [[int(index) for index in bucket.split()] for bucket in text.split(",") if bucket.strip()]
    if order or not module._has_rebuilt_buckets:
        return order
    parameters, _ = module._build_params_for_reducer()  # rebuilt later than the log looks: ask the buckets
    index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
    buckets: Iterable[Any] = module.reducer._get_zeros_like_grad_buckets()
    return [[index_of[id(parameter)] for parameter in bucket.parameters()] for bucket in buckets]


def _rebuild(module: Any, order: Order) -> None:
    parameters, sparse = module._build_params_for_reducer()
    if sorted(index for bucket in order for index in bucket) != list(range(len(parameters))):
        raise ValueError("the saved bucket order is that of other parameters")
    # DDP reverses what it is given, here as in its constructor
    assignment = list(reversed(order)), list(reversed([0] * len(order)))
    module._remove_autograd_hooks()
    names = module._build_debug_param_to_name_mapping(parameters)
    with _assigning(assignment):
        module._ddp_init_helper(parameters, sparse, names, module.static_graph)
    for hook, state in module._comm_hooks:
        _torch_dist._register_comm_hook(module.reducer, state, hook)
    if module.static_graph:
        module._static_graph_delay_allreduce_enqueued = False
        module.reducer._set_static_graph()
        module.logger._set_static_graph()
    module._has_rebuilt_buckets = False


@contextmanager
def _assigning(assignment: tuple[Order, list[int]]) -> Iterator[None]:
    """Within the block, torch's assignment of parameters to buckets is this one."""
    original = _torch_dist._compute_bucket_assignment_by_size
    _torch_dist._compute_bucket_assignment_by_size = lambda *_, **__: assignment
    try:
        yield
    finally:
        _torch_dist._compute_bucket_assignment_by_size = original
