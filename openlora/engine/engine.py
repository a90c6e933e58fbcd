"""The engine: requests of any mix of adapters in, tokens out, one step at a time.

One thread owns it: all methods are called from that thread. A step is

    schedule (scheduler.py)  →  launch (runner.py)  →  postprocess (here)

and may be launched before the one before it was read (``EngineParts.steps_ahead``): a request
that turns out to have ended then had one token too many computed, which is dropped unseen.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as Items
from pathlib import Path

from openlora.adapters.adapter_source import Source
from openlora.engine.adapter_files import AdapterFiles, disk_cache
from openlora.engine.adapter_manager import AdapterManager
from openlora.engine.adapter_names import AdapterNames
from openlora.engine.batch_pace import BatchPace
from openlora.engine.build import EngineParts, build_parts
from openlora.engine.config import EngineConfig
from openlora.engine.generation import generate, load_tokenizer
from openlora.engine.kv_blocks import BlockManager
from openlora.engine.launch_hold import LaunchHold
from openlora.engine.request import Completion, Request, TokenOutput
from openlora.engine.scheduler import Scheduler
from openlora.engine.sequence import Sequence, Status
from openlora.engine.stats import EngineStats, ModelInfo
from openlora.engine.step_budget import LaunchedStep, ScheduledRow
from openlora.engine.step_rows import step_row
from openlora.engine.unfinished import UnfinishedRequests
from openlora.engine.validation import check_request
from openlora.errors import OpenLoRAError

_PRELOAD = 0
"""Stands for ``load_adapter`` among the users of an adapter; requests count from 1."""
_PRELOAD_WAIT_S = 1.0


class Engine:
    """Continuous batching over one base model and many adapters.

    Args:
        config: its settings.
        parts: what executes the steps; built from ``config`` where it is not given.
        adapter_source: what fills ``adapter_disk_dir`` instead of ``adapter_store``.
        progress: called with (bytes loaded, bytes in all) while weights are read.

    Raises:
        SetupError, UnknownModel: the model cannot be loaded or does not fit.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        parts: EngineParts | None = None,
        adapter_source: Source | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = config
        parts = parts if parts is not None else build_parts(config, progress)
        self.model_info: ModelInfo = parts.model_info
        self._runner, self._steps_ahead = parts.runner, parts.steps_ahead
        self._blocks = BlockManager(
            parts.num_blocks,
            config.block_size,
            root=f"{config.model} {self.model_info.dtype}",
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self._files = AdapterFiles(disk_cache(config, adapter_source), parts.is_in_memory)
        self._host_stats = parts.host_stats
        self._adapters = AdapterManager(
            parts.pool,
            self._files.loading(parts.load_adapter),
            parts.write_adapter,
            num_threads=parts.num_load_threads,
            cached=parts.cached_adapter,
            max_staged=parts.max_staged,
            is_missing=self._files.is_missing,
            fetch=self._files.fetch,
            page_bytes=parts.page_bytes,
            vocab_size=parts.model_info.vocab_size,
        )
        self._names = AdapterNames(self._adapters, config.merge_dir)
        self._scheduler = Scheduler(
            self._blocks,
            self._adapters,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            step_sizes=parts.step_sizes,
        )
        self._requests = UnfinishedRequests(self._scheduler, self._adapters, self.model_info)
        self._in_flight: deque[LaunchedStep] = deque()
        self._pace = BatchPace()
        self._hold = LaunchHold(self._pace)
        self._num_added = self._num_steps = 0

    def add(self, request: Request) -> int:
        """Queue a request; its tokens come from ``step`` under the ID returned.

        ``params.stop`` is the caller's to check, with a ``StopChecker``, for that needs text; EOS
        and the number of tokens are checked here.

        Raises:
            InvalidRequest: empty prompt, token ID out of range, weight that is not finite, …
            PromptTooLong: the prompt leaves no room for one new token.
            UnknownAdapter: an adapter is not registered.
            AdapterFailed: its adapters are known not to fit the page pool together.
        """
        check_request(request, self.model_info)
        request_id = self._num_added + 1
        adapters = self._adapters.retain(
            request_id, self._names.resolve(request.adapters, request.merge)
        )
        self._num_added = request_id
        sequence = Sequence.of_request(request_id, request, adapters, self.model_info.max_model_len)
        misfit = self._adapters.misfit(sequence)
        if misfit is not None:
            self._adapters.drop(request_id, adapters)
            raise misfit
        self._requests.add(sequence)
        return request_id

    def step(self) -> list[TokenOutput]:
        """Run one step and return the new tokens, at most one for each request.

        Returns at once, with an empty list, where nothing can run yet.
        """
        prepared_from_s = time.monotonic()
        self._take_loads()
        rows = self._scheduler.schedule(self._num_steps + 1, self._pace.tokens, self._pace.step_s)
        if rows:
            before = self._in_flight[-1] if self._in_flight else None
            self._launch(rows)
            self._hold.launched(time.monotonic() - prepared_from_s, before)
        else:
            self._pace.skip()
        if self._in_flight and (len(self._in_flight) > self._steps_ahead or not rows):
            self._postprocess(self._in_flight.popleft())
        return self._requests.drain()

    def launch_wait_s(self) -> float:
        """For how long ``step`` may be put off, so that who comes meanwhile is in it."""
        has_interactive = self._requests.has_interactive
        return self._hold.wait_s(self._in_flight, has_interactive, time.monotonic())

    def abort(self, request_id: int) -> None:
        """Drop a request; nothing more comes of it. One that has ended already is ignored."""
        sequence = self._requests.get(request_id)
        if sequence is not None:
            self._requests.drop(sequence)

    def has_work(self) -> bool:
        """Whether ``step`` has or will have something to do."""
        return bool(self._requests or self._in_flight)

    def generate(
        self, requests: Items[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Completion]:
        """Run requests to their ends; completions come in the order of the requests.

        A request that fails on its way has ``error`` set, and the others are not touched by it.
        Texts are given where the model's directory has a tokenizer. ``progress`` is called with
        (requests done, requests in all).

        Raises:
            InvalidRequest, PromptTooLong, UnknownAdapter, AdapterFailed: as in ``add``; no
                request has run then.
        """
        tokenizer = load_tokenizer(self.config.model)
        completions, others = generate(self, requests, tokenizer, progress)
        self._requests.put_back(others)
        return completions

    def register_adapter(self, name: str, path: str | Path) -> None:
        """Make ``name`` usable in requests; it is loaded in the background when first wanted."""
        self._names.register(name, Path(path))

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Register an adapter, load it and wait until it is resident.

        Where running requests use all pages, it is checked and takes its pages with its first
        request.

        Raises:
            AdapterFailed: its files are unusable, or it does not fit the page pool.
        """
        self._names.register(name, Path(path))
        key = self._adapters.load_now(_PRELOAD, name)
        failure = self._take_loads().get(key)
        while failure is None and self._adapters.is_loading(key):
            failure = self._take_loads(_PRELOAD_WAIT_S).get(key)
        if failure is None:
            self._adapters.make_resident(key)
        self._adapters.drop(_PRELOAD, ((key, 1.0),))
        if failure is not None:
            self._names.unregister(name)
            raise failure

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests added with it before still run with it.

        Raises:
            UnknownAdapter: no adapter of this name.
        """
        self._names.unregister(name)

    def pin_adapters(self, names: Collection[str]) -> None:
        """Load these and keep them in pages until they are left out of a later call.

        They may take half of the pages: what is more stays unpinned, with a warning. Names that
        are not registered are left out.
        """
        self._adapters.set_pins(names)

    def take_loads(self) -> bool:
        """Where no ``step`` does: go on with what is loaded ahead; whether any of it is left."""
        self._take_loads()
        return self._adapters.has_pins_under_way()

    def only_waits_for_adapters(self) -> bool:
        """Whether ``step`` has nothing to do before an adapter is loaded.

        A step that returns no token is no sign of it: it may have computed a part of a prompt.
        """
        can_run = self._scheduler.num_running or self._scheduler.num_waiting or self._in_flight
        return not can_run and not self._requests.has_outputs and self._scheduler.num_parked > 0

    def wait_for_adapters(self, timeout_s: float) -> None:
        """Where ``only_waits_for_adapters``, wait until one is loaded, at most ``timeout_s``."""
        if self.only_waits_for_adapters():
            self._take_loads(timeout_s)

    def stats(self) -> EngineStats:
        """A snapshot of queues, pools and counters."""
        host = () if self._host_stats is None else (self._host_stats(self._adapters.names()),)
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            waiting_batch=self._scheduler.num_waiting_batch,
            waiting_for_adapter=self._scheduler.num_parked,
            num_blocks=self._blocks.num_blocks,
            free_blocks=self._blocks.num_free_blocks,
            resident_adapters=self._adapters.resident,
            steps=self._num_steps,
            prompt_tokens=self._blocks.queried_tokens,
            cached_tokens=self._blocks.hit_tokens,
            output_tokens=self._requests.num_output_tokens,
            preemptions=self._scheduler.num_preemptions,
            tiers=(self._adapters.device_stats(), *host, *self._files.stats()),
        )

    def close(self) -> None:
        """End the loading threads. The engine is not used afterwards."""
        self._adapters.close()
        self._names.close()

    def check_integrity(self) -> None:
        """Assert that blocks, pages, queues and states agree; for tests, between two steps."""
        self._scheduler.check_integrity()
        self._adapters.check_integrity()

    def _take_loads(self, timeout_s: float = 0) -> dict[str, OpenLoRAError]:
        failures: dict[str, OpenLoRAError] = {}
        for key, error in self._adapters.poll(timeout_s):
            if error is not None:
                failures[key] = error
            for request_id in self._adapters.users_of(key):
                sequence = self._requests.get(request_id)
                if sequence is None:
                    continue
                failure = error or self._adapters.misfit(sequence)
                if failure is not None:
                    self._requests.fail(sequence, failure)
            self._scheduler.unpark_loaded(key)
        return failures

    def _launch(self, rows: list[ScheduledRow]) -> None:
        self._num_steps += 1
        began_s = time.monotonic()
        pending = self._runner.launch([step_row(row, self._blocks.block_size) for row in rows])
        for row in rows:
            row.sequence.last_step = self._num_steps
            row.sequence.num_pending_tokens += row.samples
        self._in_flight.append(LaunchedStep(self._num_steps, rows, pending, began_s))

    def _postprocess(self, launched: LaunchedStep) -> None:
        tokens = launched.pending.wait()
        self._pace.take(launched.rows, launched.began_s, time.monotonic())
        self._adapters.complete(launched.number)
        for row, token in zip(launched.rows, tokens, strict=True):
            sequence = row.sequence
            if sequence.status is Status.FINISHED:
                continue  # ended or aborted after this step was launched
            sequence.num_pending_tokens -= row.samples
            is_lost = token is not None and token.token_id < 0
            if sequence.status is Status.RUNNING and not is_lost:
                num_done = min(row.start + row.num_tokens, sequence.num_computed_tokens)
                self._blocks.cache_full_blocks(sequence, num_done)
            if token is not None:
                self._requests.take(sequence, token)
