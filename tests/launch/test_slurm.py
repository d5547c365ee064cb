"""SLURM's environment, its answers, and what follows from them: tables of what real clusters (22.05) have said."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from launch.slurm import environment, hostlist, scheduler, shown
from launch.slurm.environment import Allocation
from launch.slurm.scheduler import Slurm
from supervisor.config import Options
from supervisor.engine import Alone
from supervisor.errors import ConfigError, UsageError

# --------------------------------------------------------------------------- lists of hosts


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1 n2"),
        ("gpu[001-003,7],login1", "gpu001 gpu002 gpu003 gpu7 login1"),
        ("r[1-2]n[08-10]", "r1n08 r1n09 r1n10 r2n08 r2n09 r2n10"),
        ("a-b-1.example.org,c", "a-b-1.example.org c"),
        ("n[9-11]-ib", "n9-ib n10-ib n11-ib"),
    ],
)
def test_a_list_of_hosts_is_written_out(text: str, hosts: str) -> None:
    assert hostlist.expand(text) == tuple(hosts.split())


@pytest.mark.parametrize("text", ["", "n[1-2", "n1]", "n[a]", "n[3-1]", "n[1-999999]", "a,,b", "n[[1]]"])
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        hostlist.expand(text)


# --------------------------------------------------------------------------- the environment

#: as they were in real jobs; what nobody reads is left out
BATCH = {
    "SLURMD_NODENAME": "n1", "SLURM_CLUSTER_NAME": "lab", "SLURM_CPUS_ON_NODE": "1", "SLURM_JOBID": "1",
    "SLURM_JOB_CPUS_PER_NODE": "1(x2)", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "env.sh", "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_LOCALID": "0", "SLURM_NNODES": "2", "SLURM_NODEID": "0",
    "SLURM_NODELIST": "n[1-2]", "SLURM_NPROCS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
STEP = {
    **BATCH, "SLURMD_NODENAME": "n2", "SLURM_GTIDS": "1", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_NODEID": "1",
    "SLURM_PROCID": "1", "SLURM_STEPID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
ARRAY = {
    "SLURMD_NODENAME": "n1", "SLURM_ARRAY_JOB_ID": "2", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_RESTART_COUNT": "3",
}  # fmt: skip
HET = {
    "SLURMD_NODENAME": "n2", "SLURM_HET_SIZE": "2", "SLURM_JOB_ID": "4", "SLURM_JOB_ID_HET_GROUP_0": "3",
    "SLURM_JOB_ID_HET_GROUP_1": "4", "SLURM_JOB_NODELIST": "n2", "SLURM_JOB_NODELIST_HET_GROUP_0": "n1",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "n2", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n2",
    "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "found", "label", "requeued"),
    [
        (BATCH, Allocation(job_id=1, job_name="env.sh", nodes=("n1", "n2"), node_name="n1"), "1", 1),
        (
            STEP,
            Allocation(
                job_id=1,
                job_name="env.sh",
                step_id="0",
                nodes=("n1", "n2"),
                node_rank=1,
                node_name="n2",
                tasks=2,
            ),
            "1",
            1,
        ),
        (ARRAY, Allocation(job_id=5, nodes=("n1",), node_name="n1", array=(2, 1), restarts=3), "2_1", 5),
        (HET, Allocation(job_id=4, step_id="0", nodes=("n2",), node_name="n2", het_leader=3), "4", 3),
        (
            {"SLURM_JOBID": "7", "SLURM_JOB_END_TIME": "1764"},
            Allocation(job_id=7, nodes=("localhost",), end_time=1764),
            "7",
            7,
        ),
    ],
)
def test_an_environment_is_understood(
    environ: Mapping[str, str], found: Allocation, label: str, requeued: int
) -> None:
    assert environment.parse(environ) == found
    assert (found.label, found.requeue_id) == (label, requeued)
    assert found.address == found.nodes[0]


def test_outside_of_slurm_there_is_no_place_in_a_job() -> None:
    assert environment.parse({"PATH": "/bin", "SLURM_JOB_ID": ""}) is None
    assert isinstance(scheduler.engine(Options(), {}, print), Alone)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SLURM_JOB_ID", "x1", "SLURM_JOB_ID=x1"),
        ("SLURM_NODEID", "2", "SLURM_NODEID=2, but there are 2 nodes"),
        ("SLURM_STEP_NODELIST", "n[", "no list of hosts"),
        ("SLURM_RESTART_COUNT", "-1", "SLURM_RESTART_COUNT=-1"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        environment.parse({**STEP, name: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "refused"),
    [
        (STEP, None),
        ({**HET, "SLURM_STEP_NUM_TASKS": "8"}, "srun started everstep 8 times on 1 node"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "16"}, "srun --ntasks-per-node=1"),
        (BATCH, None),
        (ARRAY, None),
        (HET, None),
    ],
)
def test_one_supervisor_a_node(environ: Mapping[str, str], refused: str | None) -> None:
    said: list[str] = []
    if refused is not None:
        with pytest.raises(UsageError, match=refused):
            scheduler.engine(Options(), environ, said.append)
        return
    assert isinstance(scheduler.engine(Options(), environ, said.append), Slurm)
    assert said == (
        ["the job has 2 nodes, of which only n1 is used (srun everstep run … uses all)"]
        if environ is BATCH
        else []
    )


# --------------------------------------------------------------------------- what scontrol shows

SHOWN = (
    "JobId=1 JobName=env.sh UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901759 Nice=0 Account=(null) "
    "QOS=(null) JobState={state} Reason={reason} Dependency=(null) Requeue={requeue} Restarts={restarts} "
    "BatchFlag={batch} Reboot=0 ExitCode=0:0 RunTime=00:00:00 TimeLimit=00:05:00 TimeMin=N/A SubmitTime=1764063000 "
    "StartTime=1764063001 EndTime={end} Deadline=N/A PreemptEligibleTime=1764063001 PreemptTime={preempt} "
    "SuspendTime=None Partition=low\n"
)


def show(
    state: str = "RUNNING", *, reason: str = "None", requeue: int = 1, restarts: int = 0, batch: int = 1,
    end: str = "1764063301", preempt: str = "None",
) -> str:  # fmt: skip
    return SHOWN.format(
        state=state, reason=reason, requeue=requeue, restarts=restarts, batch=batch, end=end, preempt=preempt
    )


def test_a_job_is_read() -> None:
    assert shown.parse_job(show(preempt="1764063100")) == shown.ShownJob(
        state="RUNNING", reason="None", restarts=0, requeue=True, batch=True, end_time=1764063301.0,
        preempt_time=1764063100.0,
    )  # fmt: skip
    unlimited = shown.parse_job(show(end="Unknown"))
    assert unlimited is not None
    assert unlimited.end_time is None
    assert shown.parse_job("slurm_load_jobs error: Invalid job id specified") is None


def test_settings_are_read() -> None:
    config = shown.parse_config(
        "Configuration data as of 1\nKillWait                = 20 sec\nEpilog = (null)\n"
    )
    assert config["Epilog"] == "(null)"
    assert shown.seconds(config, "KillWait") == 20
    assert shown.seconds(config, "GraceTime") is None


@pytest.mark.parametrize(
    ("text", "restarts", "asks", "why"),
    [
        (
            show(),
            0,
            True,
            None,
        ),  # told by a signal to it alone, in the grace of a preemption, or early by itself
        (show("COMPLETING", reason="TimeLimit"), 0, True, None),
        (show("COMPLETING"), 0, False, "cancelled"),
        (show("CANCELLED"), 0, False, "cancelled"),
        (show("COMPLETING", restarts=1), 0, False, "SLURM has requeued"),
        (show("COMPLETING", restarts=1), 1, False, "cancelled"),
        (show("COMPLETING", reason="TimeLimit", restarts=2), 1, False, "SLURM has requeued"),
        (show("PENDING", restarts=1), 0, False, "SLURM has requeued"),
        (show(batch=0), 0, False, "interactive"),
        (show(requeue=0), 0, False, "may not be requeued"),
        (show(restarts=4), 4, True, None),
    ],
)
def test_whether_it_is_ours_to_requeue(text: str, restarts: int, asks: bool, why: str | None) -> None:
    job = shown.parse_job(text)
    assert job is not None
    again = shown.again(job, restarts)
    assert again.ask == asks
    assert (again.why is None) == (why is None)
    assert (why or "") in (again.why or "")


# --------------------------------------------------------------------------- the engine


class Controller:
    """Answers in order; the last answer stands. ``refusals``: what each requeue is answered. The partition has 8 nodes."""

    def __init__(self, *jobs: str | None, refusals: tuple[str | None, ...] = (None,)) -> None:
        self.jobs, self.refusals = list(jobs), list(refusals)
        self.requeued: list[int] = []
        self.excluded: list[tuple[int, list[str]]] = []
        self.nodes = 8

    def show(self, *what: str) -> str | None:
        if what == ("config",):
            return "KillWait                = 20 sec\n"
        if what == ("partition", "low"):
            return f"PartitionName=low TotalCPUs=64 TotalNodes={self.nodes}\n"
        return self.jobs.pop(0) if len(self.jobs) > 1 else self.jobs[0]

    def requeue(self, job: int) -> str | None:
        self.requeued.append(job)
        return self.refusals.pop(0) if len(self.refusals) > 1 else self.refusals[0]

    def exclude(self, job: int, nodes: Sequence[str]) -> str | None:
        self.excluded.append((job, list(nodes)))
        return None


def slurm(client: Controller | None, environ: Mapping[str, str] = HET, now: float = 1764063100) -> Slurm:
    allocation = environment.parse(environ)
    assert allocation is not None
    return Slurm(allocation, client, now=lambda: now)


@pytest.mark.parametrize(
    ("text", "source", "end", "kill"),
    [
        (show(), "SLURM's time limit", 1764063301, 1764063321),
        (show(preempt="1764063090", end="1764063110"), "a preemption by SLURM", 1764063110, 1764063130),
        (show("COMPLETING"), "the end of the SLURM job", 1764063100, 1764063120),
        (show("COMPLETING", restarts=1), "the end of the SLURM job", 1764063100, 1764063120),
    ],
)
def test_the_deadline_by_what_slurm_says(text: str, source: str, end: float, kill: float) -> None:
    deadline = asyncio.run(slurm(Controller(text)).deadline())
    assert deadline is not None
    assert (deadline.source, deadline.end, deadline.kill) == (source, end, kill)


def test_the_deadline_where_nobody_says() -> None:
    assert asyncio.run(slurm(Controller(show(end="Unknown"))).deadline()) is None
    assert asyncio.run(slurm(Controller(None)).deadline()) is None
    assert asyncio.run(slurm(None).deadline()) is None
    told = asyncio.run(slurm(None, {**HET, "SLURM_JOB_END_TIME": "1764063301"}).deadline())
    assert told is not None
    assert (told.end, told.kill) == (1764063301, 1764063331)


def test_a_controller_that_answers_no_more_has_not_taken_back_what_it_said() -> None:
    one = slurm(Controller(show(end="1764063200"), None), {**HET, "SLURM_JOB_END_TIME": "1764063301"})
    first, then = (asyncio.run(one.deadline()) for _ in range(2))
    assert first is not None
    assert first.end == 1764063200
    assert then is None, "which is no news"


@pytest.mark.parametrize("code", [0, 1, 64, 70, 78, 130])
def test_only_a_job_that_is_to_be_run_again_is_requeued(code: int) -> None:
    client = Controller(show())
    assert slurm(client).leave(code) is None
    assert client.requeued == []


def test_a_heterogeneous_job_is_requeued_by_its_leader_and_an_arrays_task_by_its_own_number() -> None:
    for environ, number, label in ((HET, 3, "4"), (ARRAY, 5, "2_1")):
        client = Controller(show(restarts=(environ is ARRAY and 3) or 0))
        assert slurm(client, environ).leave(75) == f"SLURM job {label} requeued"
        assert client.requeued == [number]


def test_a_requeue_whose_answer_was_lost_is_not_repeated() -> None:
    """It ends the job, and with it the very command that asked for it."""
    client = Controller(show(), show("COMPLETING", restarts=1), refusals=("scontrol ended with -15",))
    assert slurm(client).leave(75) == "SLURM job 4 requeued"
    assert client.requeued == [3]


def test_a_requeue_that_slurm_does_not_take_is_tried_again_and_said() -> None:
    client = Controller(None, show(), refusals=("Unable to contact slurm controller",))
    said = slurm(client).leave(75)
    assert said is not None
    assert "could not be requeued (Unable to contact slurm controller)" in said
    assert len(client.requeued) == 2


@pytest.mark.parametrize(
    ("listed", "bad", "nodes", "excluded", "said"),
    [
        ("(null)", {"n2"}, 8, ["n2"], "SLURM job 1 requeued; without n2"),
        ("n[6-7]", {"n2", "n1"}, 8, ["n6", "n7", "n1", "n2"], "requeued; without n1, n2"),
        ("n[6-7]", {"n2"}, 4, None, "it may get n2 again: the partition has too few other nodes"),
        ("n2", {"n2"}, 8, None, "requeued"),
        ("(null)", {"elsewhere"}, 8, None, "requeued"),
        ("(null) ReqNodeList=n2", {"n2"}, 8, None, "requeued"),
        ("n[", {"n2"}, 8, None, "requeued; 'n[' is no list of hosts"),
        ("(null)", set(), 8, None, "requeued"),
    ],
)
def test_bad_nodes_are_left_out_once_the_job_is_requeued(
    listed: str, bad: set[str], nodes: int, excluded: list[str] | None, said: str
) -> None:
    more = f" NumNodes=2-2 ExcNodeList={listed}"
    client = Controller(show(), show("COMPLETING", restarts=1) + more)
    client.nodes = nodes
    answer = slurm(client, STEP).leave(75, bad)
    assert answer is not None
    assert answer.endswith(said)
    assert client.excluded == ([] if excluded is None else [(1, excluded)])


def test_of_a_job_that_is_not_requeued_no_node_is_left_out() -> None:
    for code, text in ((0, show()), (1, show(restarts=1)), (75, show("COMPLETING"))):
        client = Controller(text)
        slurm(client, STEP).leave(code, {"n2"})
        assert client.excluded == []


def test_without_scontrol_it_is_the_batch_scripts_to_do() -> None:
    said = slurm(None).leave(75)
    assert said is not None
    assert "the batch script has to requeue" in said


def test_requeueing_can_be_left_to_others() -> None:
    one = scheduler.engine(Options(requeue="off"), HET, print)
    assert isinstance(one, Slurm)
    assert one.leave(75) is None
