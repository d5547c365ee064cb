from __future__ import annotations

import http.client
import signal
import socket
import ssl
import urllib.error
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.decide.classify import classify, signal_name
from supervisor.decide.symptoms import kind_of_exception, lost_a_process
from supervisor.model import AttemptEvidence, Failure, FailureKind, Hang, HangKind, HungRank, Raised, RankEnd

#: as torch 2.13's gloo says it to the ranks that are left when one is killed, and when one leaves
CLOSED = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2454. "
    "This is typically caused by a remote worker crashing. Check the logs of the remote worker before reporting an error."
)
RESET = CLOSED.replace("Connection closed by peer", "Read error [127.0.0.1]:2454: Connection reset by peer")
#: torchrun 2.13's summary
SUMMARY = """
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
sh FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-23_01:49:02
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 8520)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 8520
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_01:49:02
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 8519)  {signal}
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""


def exception(kind: type[BaseException], message: str = "") -> Raised:
    bases = tuple(base.__name__ for base in kind.__mro__)
    return Raised(type=kind.__name__, message=message, traceback="", bases=bases)


def raised(name: str, message: str = "") -> Raised:
    bases = (name.rpartition(".")[2], "RuntimeError", "Exception", "BaseException", "object")
    return Raised(type=name, message=message, traceback="", bases=bases)


def end(rank: int, at: float = 1.0, *, step: int | None = 41, **fields: Any) -> RankEnd:
    return replace(RankEnd(rank=rank, pid=1000 + rank, monotonic=at, step=step), **fields)


def died(rank: int, number: int, at: float = 1.0, **fields: Any) -> RankEnd:
    return end(rank, at, signal=number, **fields)


def threw(rank: int, what: Raised, at: float = 1.0, **fields: Any) -> RankEnd:
    return end(rank, at, exit_code=1, raised=what, **fields)


def lost_peer(rank: int, at: float = 1.0) -> RankEnd:
    return threw(rank, exception(RuntimeError, CLOSED), at)


def evidence(
    *ends: RankEnd, world_size: int | None = 2, step: int | None = 41, **fields: Any
) -> AttemptEvidence:
    made = AttemptEvidence(attempt=3, world_size=world_size, step=step, ends=ends, has_session=True)
    return replace(made, **fields)


def failure(given: AttemptEvidence) -> Failure:
    found = classify(given, 99.0)
    assert found is not None
    assert (found.attempt, found.time) == (3, 99.0)
    assert "\n" not in found.reason
    return found


class TestFinished:
    def test_every_rank_left_with_code_0(self) -> None:
        assert classify(evidence(end(0, exit_code=0, closed=True), end(1, exit_code=0)), 0) is None

    def test_a_program_that_never_registered_left_with_code_0(self) -> None:
        assert classify(evidence(world_size=None, step=None, launcher_exit_code=0), 0) is None

    def test_destructors_do_not_undo_a_finished_script(self) -> None:
        late = died(1, signal.SIGABRT, told_exit_code=0, closed=True)
        assert classify(evidence(end(0, exit_code=0, closed=True), late), 0) is None


class TestRootCause:
    @pytest.mark.parametrize("message", [CLOSED, RESET])
    def test_a_rank_that_lost_its_peer_is_not_the_cause_even_if_noticed_first(self, message: str) -> None:
        echo = threw(0, exception(RuntimeError, message), at=1.0)
        found = failure(evidence(echo, died(1, signal.SIGKILL, at=1.2)))
        assert (found.kind, found.rank, found.signal, found.step) == (FailureKind.CRASH, 1, 9, 41)
        assert found.reason == "rank 1 was killed by SIGKILL (after step 41)"

    def test_the_first_of_two_causes(self) -> None:
        found = failure(
            evidence(died(0, signal.SIGSEGV, at=2.0), threw(1, exception(ValueError, "bad"), at=1.0))
        )
        assert found.reason == "rank 1 raised ValueError: bad (after step 41)"

    def test_torchruns_tidying_up_is_no_cause(self) -> None:
        found = failure(
            evidence(died(0, signal.SIGTERM, at=1.0), end(1, 1.1, exit_code=3, last_lines=("bye",)))
        )
        assert (found.rank, found.exit_code) == (1, 3)
        assert found.reason == "rank 1 exited with code 3 (after step 41): bye"

    def test_nccls_watchdog_aborts_over_a_lost_peer(self) -> None:
        lines = (
            "[rank0]:[E1 ProcessGroupNCCL.cpp:1895] [PG ID 0] Process group watchdog thread terminated with exception: "
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)",
            "terminate called after throwing an instance of 'c10::DistBackendError'",
        )
        echo = died(0, signal.SIGABRT, at=1.0, last_lines=lines)
        assert failure(evidence(echo, died(1, signal.SIGBUS, at=2.0))).rank == 1
        assert failure(evidence(echo)).kind is FailureKind.COMMUNICATION

    def test_if_all_lost_their_peers_communication_is_the_cause(self) -> None:
        found = failure(evidence(lost_peer(0, at=2), lost_peer(1, at=1)))
        assert (found.kind, found.rank) == (FailureKind.COMMUNICATION, 1)
        assert "could not reach its peers" in found.reason

    def test_sigterm_alone_is_a_cause(self) -> None:
        assert (
            failure(evidence(died(1, signal.SIGTERM))).reason
            == "rank 1 was killed by SIGTERM (after step 41)"
        )

    def test_the_kernel_killed_it_for_memory(self) -> None:
        found = failure(evidence(died(1, signal.SIGKILL, oom_killed=True)))
        assert (found.kind, found.signal) == (FailureKind.HOST_OOM, 9)
        assert "ran out of memory" in found.reason

    def test_a_shells_word_for_a_signal(self) -> None:
        found = failure(evidence(end(0, exit_code=139)))
        assert (found.kind, found.signal, found.exit_code) == (FailureKind.CRASH, 11, None)


class TestEarlyExit:
    def test_a_rank_that_left_its_training_with_code_0(self) -> None:
        found = failure(evidence(end(1, 1.0, exit_code=0), lost_peer(0, at=1.1)))
        assert (found.kind, found.rank, found.exit_code) == (FailureKind.EARLY_EXIT, 1, 0)
        assert found.reason == "rank 1 exited with code 0 while other ranks went on (after step 41)"

    def test_even_if_its_destructors_aborted_it(self) -> None:
        left = died(1, signal.SIGABRT, told_exit_code=0)
        assert failure(evidence(left, lost_peer(0, at=1.1))).kind is FailureKind.EARLY_EXIT

    def test_while_the_others_hung_until_we_killed_them(self) -> None:
        assert failure(evidence(end(1, exit_code=0))).kind is FailureKind.EARLY_EXIT

    def test_without_a_session_only_if_a_peer_was_lost_by_it(self) -> None:
        left = end(1, 1.0, exit_code=0)
        assert failure(evidence(left, lost_peer(0, at=2), has_session=False)).kind is FailureKind.EARLY_EXIT
        assert (
            failure(evidence(left, lost_peer(0, at=0.5), has_session=False)).kind is FailureKind.COMMUNICATION
        )
        broke = threw(0, exception(ValueError), at=2)
        assert failure(evidence(left, broke, has_session=False)).rank == 0

    def test_a_rank_that_broke_out_of_its_loop_alone(self) -> None:
        left = end(1, 1.0, exit_code=0, closed=True, completed=False)
        found = failure(evidence(left, lost_peer(0, at=1.1)))
        assert (found.kind, found.rank) == (FailureKind.EARLY_EXIT, 1)
        late = replace(left, monotonic=2.0)  # its connections were closed before its process ended
        assert failure(evidence(late, lost_peer(0, at=1.1))).kind is FailureKind.EARLY_EXIT
        done = replace(left, completed=True)
        assert failure(evidence(done, lost_peer(0, at=1.1))).kind is FailureKind.COMMUNICATION
        assert failure(evidence(left, threw(0, exception(KeyError, "x"), at=2))).rank == 0

    def test_all_ranks_may_break_out_of_their_loops(self) -> None:
        ends = (end(rank, exit_code=0, closed=True, completed=False) for rank in range(2))
        assert classify(evidence(*ends), 0) is None

    def test_a_rank_whose_loop_was_over_is_not_to_blame(self) -> None:
        left = end(1, 1.0, exit_code=0, closed=True)
        assert failure(evidence(left, threw(0, exception(KeyError, "x"), at=2))).rank == 0


class TestLauncher:
    def test_torchrun_was_killed(self) -> None:
        found = failure(evidence(launcher_signal=9))
        assert (found.kind, found.signal) == (FailureKind.LAUNCHER, 9)
        assert found.reason == "the launcher was killed by SIGKILL (after step 41)"

    def test_its_workers_die_of_its_death(self) -> None:
        assert failure(evidence(died(0, 9), lost_peer(1), launcher_signal=9)).kind is FailureKind.LAUNCHER
        timed = evidence(died(0, 9, at=5.0), launcher_signal=9, launcher_monotonic=5.1)
        assert failure(timed).kind is FailureKind.CRASH

    def test_without_torchrun_the_program_is_its_own_launcher(self) -> None:
        plain = evidence(died(0, 9), world_size=1, launcher_signal=9, launcher_pid=1000)
        assert (failure(plain).kind, failure(plain).rank) == (FailureKind.CRASH, 0)

    def test_torchrun_refuses_its_arguments(self) -> None:
        lines = ("usage: torchrun [-h]", "torchrun: error: unrecognized arguments: --bogus")
        found = failure(evidence(world_size=None, step=None, launcher_exit_code=2, launcher_lines=lines))
        assert found.kind is FailureKind.STARTUP
        assert found.reason == (
            "the launcher exited with code 2 (before any worker registered): "
            "torchrun: error: unrecognized arguments: --bogus"
        )

    def test_torchrun_raises(self) -> None:
        lines = (
            "Traceback (most recent call last):",
            '  File "run.py"',
            "FileNotFoundError: [Errno 2]: '/nonexistent'",
        )
        found = failure(evidence(world_size=None, step=None, launcher_exit_code=1, launcher_lines=lines))
        assert (found.kind, found.exception) == (
            FailureKind.LAUNCHER,
            "FileNotFoundError: [Errno 2]: '/nonexistent'",
        )

    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            ("-9", FailureKind.CRASH),
            ("3", FailureKind.EXCEPTION),
            ("2", FailureKind.STARTUP),
            ("127", FailureKind.STARTUP),
        ],
    )
    def test_its_summary_speaks_for_workers_that_never_registered(self, code: str, kind: FailureKind) -> None:
        lines = tuple(SUMMARY.format(code=code, signal="").splitlines())
        found = failure(evidence(world_size=None, step=None, launcher_exit_code=1, launcher_lines=lines))
        assert (found.kind, found.rank) == (kind, 1)

    def test_no_trace_at_all(self) -> None:
        assert "no trace" in failure(evidence(world_size=None, step=None)).reason


class TestKinds:
    @pytest.mark.parametrize(
        ("what", "kind"),
        [
            (exception(ValueError, "bad"), FailureKind.EXCEPTION),
            (exception(ModuleNotFoundError, "No module named 'x'"), FailureKind.EXCEPTION),  # after the first step
            (raised("supervisor.errors.StateMismatchError", "fc.weight"), FailureKind.STATE_MISMATCH),
            (raised("supervisor.errors.CheckpointError", "damaged"), FailureKind.STORAGE),
            (raised("torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB"), FailureKind.CUDA_OOM),
            (raised("torch.AcceleratorError", "CUDA error: out of memory"), FailureKind.CUDA_OOM),
            (raised("torch.distributed.DistBackendError", "NCCL error: Cuda failure 2 'out of memory'"), FailureKind.CUDA_OOM),
            (raised("torch.AcceleratorError", "CUDA error: an illegal memory access"), FailureKind.DEVICE),
            (raised("torch.AcceleratorError", "CUDA error: uncorrectable ECC error encountered"), FailureKind.DEVICE),
            (raised("torch.AcceleratorError", "CUDA error: device-side assert triggered"), FailureKind.EXCEPTION),
            (raised("RuntimeError", "NVRM: Xid (PCI:0000:1b:00): 79, GPU has fallen off the bus"), FailureKind.DEVICE),
            (raised("torch.distributed.DistBackendError", "ncclRemoteError: A call failed"), FailureKind.COMMUNICATION),
            (raised("torch.distributed.DistNetworkError", "The client socket has timed out"), FailureKind.COMMUNICATION),
            (exception(ConnectionRefusedError, "[Errno 111] Connection refused"), FailureKind.COMMUNICATION),
            (exception(RuntimeError, "Gloo connectFullMesh failed with: no route"), FailureKind.COMMUNICATION),
            (exception(RuntimeError, "Timed out waiting 1800000ms for recv operation"), FailureKind.COMMUNICATION),
            (exception(RuntimeError, "Failed to recv, got 0 bytes. Connection was likely closed."), FailureKind.COMMUNICATION),
            (exception(FloatingPointError, "loss is nan at step 3"), FailureKind.NUMERIC),
            (exception(RuntimeError, "The total norm of order 2.0 is non-finite, so it cannot be clipped"), FailureKind.NUMERIC),
            (exception(OSError, "[Errno 28] No space left on device"), FailureKind.STORAGE),
            (exception(MemoryError), FailureKind.HOST_OOM),
            (exception(RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried"), FailureKind.HOST_OOM),
            (exception(RuntimeError, "DataLoader worker (pid 7) is killed by signal: Killed."), FailureKind.CRASH),
        ],
    )  # fmt: skip
    def test_of_an_exception_after_steps(self, what: Raised, kind: FailureKind) -> None:
        assert kind_of_exception(what, before_first_step=False) is kind
        assert failure(evidence(threw(0, what))).kind is kind

    @pytest.mark.parametrize(
        "what", [exception(ModuleNotFoundError, "No module named 'x'"), exception(ImportError), exception(IndentationError)]
    )  # fmt: skip
    def test_a_program_that_cannot_start(self, what: Raised) -> None:
        found = failure(evidence(threw(0, what, step=None), step=None))
        assert found.kind is FailureKind.STARTUP
        assert found.reason.startswith(f"rank 0 raised {what.type}")
        assert "before its first step" in found.reason

    @pytest.mark.parametrize(
        "what",
        [
            exception(socket.gaierror, "[Errno -3] Temporary failure in name resolution"),
            exception(TimeoutError, "[Errno 110] Connection timed out"),
            exception(urllib.error.URLError, "<urlopen error [Errno -3] Temporary failure in name resolution>"),
            exception(urllib.error.URLError, "<urlopen error timed out>"),
            exception(urllib.error.HTTPError, "HTTP Error 503: Service Unavailable"),
            exception(http.client.IncompleteRead, "IncompleteRead(7 bytes read)"),
            exception(http.client.RemoteDisconnected, "Remote end closed connection without response"),
            exception(ssl.SSLError, "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"),
            raised("requests.exceptions.ConnectionError", "Max retries exceeded with url: /x"),
            raised("requests.exceptions.ReadTimeout", "Read timed out. (read timeout=10)"),
            raised("requests.exceptions.HTTPError", "502 Server Error: Bad Gateway for url: https://h/x"),
            raised("huggingface_hub.errors.HfHubHTTPError", "504 Server Error: Gateway Time-out for url: x"),
            raised("requests.exceptions.HTTPError", "429 Client Error: Too Many Requests for url: https://h/x"),
            raised("botocore.exceptions.EndpointConnectionError", "Could not connect to the endpoint URL"),
            raised("aiohttp.client_exceptions.ClientConnectorError", "Cannot connect to host h:443"),
        ],
    )  # fmt: skip
    def test_a_network_that_fails_is_no_fault_of_the_programs(self, what: Raised) -> None:
        for step in (None, 41):
            found = failure(evidence(threw(0, what, step=step), step=step))
            assert found.kind is FailureKind.COMMUNICATION

    @pytest.mark.parametrize(
        "what",
        [
            exception(urllib.error.HTTPError, "HTTP Error 404: Not Found"),
            raised("requests.exceptions.HTTPError", "403 Client Error: Forbidden for url: https://h/502 Server Error"),
            exception(ssl.SSLCertVerificationError, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
            exception(RuntimeError, "a timeout of 5 s is too short"),
        ],
    )  # fmt: skip
    def test_a_refusal_over_the_network_is_an_exception(self, what: Raised) -> None:
        assert failure(evidence(threw(0, what))).kind is FailureKind.EXCEPTION

    def test_a_lost_network_is_no_echo_of_a_rank_that_broke(self) -> None:
        """At the start every rank may fail like this: the first is named, whatever the others say."""
        what = exception(socket.gaierror, "[Errno -3] Temporary failure in name resolution")
        found = failure(evidence(threw(0, what, at=1, step=None), lost_peer(1, at=1.2), step=None))
        assert found.rank == 0
        assert "gaierror" in found.reason

    def test_wrong_arguments_to_the_script(self) -> None:
        lines = ("usage: train.py [-h]", "train.py: error: unrecognized arguments: --lrr")
        found = failure(evidence(end(0, step=None, exit_code=2, last_lines=lines), step=None))
        assert found.kind is FailureKind.STARTUP
        assert found.reason.endswith("train.py: error: unrecognized arguments: --lrr")
        assert failure(evidence(end(0, exit_code=2))).kind is FailureKind.EXCEPTION

    def test_an_exception_that_only_the_log_tells(self) -> None:
        lines = (
            "step 40",
            "[rank1]: Traceback (most recent call last):",
            '[rank1]:   File "train.py", line 3',
            "[rank1]: ConnectionResetError: [Errno 104] peer",
            "shutting down",
        )
        found = failure(evidence(end(1, exit_code=1, last_lines=lines)))
        assert (found.kind, found.exception) == (
            FailureKind.COMMUNICATION,
            "ConnectionResetError: [Errno 104] peer",
        )

    def test_a_long_message_is_one_short_line(self) -> None:
        found = failure(evidence(threw(0, exception(ValueError, "\n\nfirst " + "x" * 5000 + "\nsecond"))))
        assert len(found.reason) < 400
        assert found.exception is not None
        assert found.exception.startswith("ValueError: first xxx")

    def test_signals_without_a_name(self) -> None:
        assert (signal_name(9), signal_name(99)) == ("SIGKILL", "signal 99")


def _ends(rank: int) -> st.SearchStrategy[RankEnd]:
    at, step = st.floats(0, 10), st.none() | st.integers(0, 50)
    messages = st.sampled_from(["", "bad", CLOSED, "CUDA error: x"])
    return st.one_of(
        st.builds(lambda t, s, n: died(rank, n, t, step=s), at, step, st.sampled_from([6, 9, 11, 15])),
        st.builds(lambda t, s, m: threw(rank, exception(RuntimeError, m), t, step=s), at, step, messages),
        st.builds(lambda t, s, c, x: end(rank, t, step=s, exit_code=c, closed=x), at, step, st.sampled_from([0, 1, 2, 137]), st.booleans()),
    )  # fmt: skip


@given(st.tuples(*map(_ends, range(4))), st.permutations(range(4)), st.integers(0, 4), st.booleans())
def test_the_verdict_does_not_hang_on_the_order_of_the_evidence(
    ends: tuple[RankEnd, ...], order: list[int], kept: int, session: bool
) -> None:
    ends = tuple(replace(end, monotonic=end.monotonic + rank * 1e-3) for rank, end in enumerate(ends))[:kept]
    shuffled = tuple(ends[index] for index in order if index < kept)
    first = classify(evidence(*ends, world_size=4, has_session=session), 0)
    assert first == classify(evidence(*shuffled, world_size=4, has_session=session), 0)
    if first is None:
        assert [end.exit_code for end in ends] == [0] * 4
    elif ends:
        assert first.rank in range(kept)


# --------------------------------------------------------------------------- hangs, lost loader processes


def hung(**rank: Any) -> Hang:
    usual: dict[str, Any] = {"step": 5, "stage": "step", "quiet": 11.0, "suspect": True}
    return Hang(
        kind=HangKind.MAIN_THREAD, monotonic=100.0, limit=10.0, ranks=(HungRank(rank=1, **(usual | rank)),)
    )


def test_a_hang_is_the_cause_of_what_comes_after_it() -> None:
    end = RankEnd(rank=0, pid=1, monotonic=101.0, signal=signal.SIGSEGV, step=5)
    evidence = AttemptEvidence(attempt=0, world_size=2, step=6, ends=(), hang=hung())
    for ends in ((), (end,)):
        failure = classify(replace(evidence, ends=ends), 1.0)
        assert failure is not None
        assert (failure.kind, failure.rank, failure.step) == (FailureKind.HANG, 1, 5)
        assert "no sign of life" in failure.reason


def test_a_death_before_the_hang_was_noticed_is_the_cause() -> None:
    end = RankEnd(rank=0, pid=1, monotonic=99.0, signal=signal.SIGSEGV, step=5)
    failure = classify(AttemptEvidence(attempt=0, world_size=2, step=6, ends=(end,), hang=hung()), 1.0)
    assert failure is not None
    assert failure.kind is FailureKind.CRASH


def test_a_hang_of_nobody_in_particular_names_no_rank() -> None:
    failure = classify(
        AttemptEvidence(attempt=0, world_size=2, step=6, ends=(), hang=hung(suspect=False)), 1.0
    )
    assert failure is not None
    assert (failure.rank, failure.step) == (None, 6)


def test_a_loader_process_killed_for_memory() -> None:
    message = "DataLoader worker (pid 4711) is killed by signal: Killed. "
    raised = Raised(type="RuntimeError", message=message, traceback="")
    assert lost_a_process(raised)
    assert not lost_a_process(None)
    end = RankEnd(rank=0, pid=1, monotonic=1.0, exit_code=1, raised=raised, step=5, oom_killed=True)
    failure = classify(AttemptEvidence(attempt=0, world_size=1, step=5, ends=(end,)), 1.0)
    assert failure is not None
    assert failure.kind is FailureKind.HOST_OOM
    assert "lost a data loader process" in failure.reason
