"""`python -m services.scheduler.ray_agent`: runs jobs of kind `ray` on a running Ray cluster.

The cluster is one node of the scheduler's. A share is a Ray job, whose driver (`ray_share.py`) has
a placement group and an actor for each worker; the job's metadata tells everything about it, so
that it is found again by whatever agent of this node comes next. Machines come and go as the
cluster's autoscaler wants: an agent offers what its settings say, or else what lives at the moment.

It speaks Ray's HTTP doors and imports no Ray: the cluster may have another version, and nothing
of it hangs in this process.
"""

import asyncio
import json
import math
import os
import signal
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import urllib3
import uvloop

from libs import telemetry
from libs.contracts.events import Resources
from libs.settings import load
from services.scheduler.agent import Offer
from services.scheduler.agents import Settings, serve
from services.scheduler.workers import TAIL_BYTES_MAX, Refused, Seen, Spec, Unusable, Worker

DRIVER = Path(__file__).with_name("ray_share.py").read_text()
ENTRYPOINT = "exec python -c 'import os; exec(os.environ[\"LEPTONIC_DRIVER\"])'"
SAYS = "the share has ended: "
"""Before the driver's report, in its last line."""
PREFIX = "leptonic-"
NODE, SHARE = "ai.leptonic.node", "ai.leptonic.share"
"""Of a job's metadata."""
TIMEOUT_S = 10.0
NODES_MAX = 10_000
"""Of which Ray's door tells, its own bound."""
TASK_BYTES_MAX = 64 << 10
"""It goes through an environment variable, of which Linux takes 128 KiB."""
STOP_S = 10
"""For the driver to end, after its workers had their grace."""
LEAST_CPU = 0.001
"""A bundle cannot be empty."""
ABSENT = ("does not exist", "non-terminal state None")
"""What Ray says of a job that went while it was asked, as an error of its own."""


class Report(msgspec.Struct, frozen=True):
    """The worker that decided, and how."""

    local: int
    code: int | None
    problem: str
    tail: str
    lost: bool


class RayEngine:
    kind = "ray"

    def __init__(self, settings: Settings) -> None:
        self.node = settings.placed_on
        self.settings = settings
        token = settings.ray_token
        self.http = urllib3.PoolManager(
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=TIMEOUT_S,
            retries=False,
        )

    async def offer(self) -> Offer:
        return await asyncio.to_thread(self.measure)

    async def workers(self) -> list[Seen]:
        return await asyncio.to_thread(self.look)

    async def start(self, share: Sequence[Worker], spec: Spec) -> None:
        if spec.image:
            raise Unusable(f"spec.image: {spec.image!r}, and this node runs no containers")
        await asyncio.to_thread(self.submit, share, spec)

    async def stop(self, share: Sequence[Worker]) -> None:
        await asyncio.to_thread(self.ask, "POST", f"/api/jobs/{name_of(share)}/stop")

    async def remove(self, share: Sequence[Worker]) -> None:
        await asyncio.to_thread(self.ask, "DELETE", f"/api/jobs/{name_of(share)}")

    # --- in a thread, each

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON, None for what is not there. Raises `OSError`."""
        status, text = self.exchange(method, path, body)
        if status == HTTPStatus.OK:
            return json.loads(text)
        if status == HTTPStatus.NOT_FOUND or any(said in text for said in ABSENT):
            return None
        raise ConnectionError(f"{method} {path}: {status}: {last_line(text)}")

    def listed(self, path: str) -> Any:
        answer = self.ask("GET", path)
        if answer is None:
            raise ConnectionError(f"{self.settings.ray_address}{path}: no Ray dashboard is there")
        return answer

    def exchange(self, method: str, path: str, body: Any) -> tuple[int, str]:
        url = self.settings.ray_address.rstrip("/") + path
        try:
            response = self.http.request(method, url, json=body)
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(f"{url}: {error}") from error
        return response.status, response.data.decode(errors="replace")

    def measure(self) -> Offer:
        """What the settings leave open is the cluster's."""
        said, has = self.settings, self.totals()
        gpus = said.gpus or int(has("GPU"))
        capacity = Resources(
            cpu_milli=said.cpu_milli or int(has("CPU") * 1000),
            memory_mib=said.memory_mib or int(has("memory")) >> 20,
            gpu_milli=1000 if gpus else 0,
            gpus=max(1, gpus),
        )
        return Offer(capacity, said.gpu_model)

    def totals(self) -> Any:
        """Of a resource: what all living machines have of it."""
        told = self.listed(f"/api/v0/nodes?limit={NODES_MAX}")
        nodes = [node for node in told["data"]["result"]["result"] if node["state"] == "ALIVE"]
        return lambda name: sum(node["resources_total"].get(name, 0) for node in nodes)

    def look(self) -> list[Seen]:
        jobs = self.listed("/api/jobs/")
        for job in filter(is_ghost, jobs):
            self.ask("DELETE", f"/api/jobs/{job['submission_id']}")
        mine = [job for job in jobs if (job["metadata"] or {}).get(NODE) == self.node]
        return [seen for job in mine for seen in self.seen_of(job)]

    def seen_of(self, job: dict[str, Any]) -> Iterator[Seen]:
        """Nothing of one that was removed while we looked."""
        share = msgspec.json.decode(job["metadata"][SHARE], type=list[Worker])
        status, report = job["status"], None
        if status in ("SUCCEEDED", "FAILED"):
            said = self.ask("GET", f"/api/jobs/{job['submission_id']}/logs")
            if said is None:
                return
            report = report_in(said["logs"])
        for worker in share:
            yield seen_as(worker, status, report, job["message"] or "")

    def submit(self, share: Sequence[Worker], spec: Spec) -> None:
        name = name_of(share)
        if self.ask("GET", f"/api/jobs/{name}") is not None:
            return
        job = job_of(share, spec)
        status, text = self.exchange("POST", "/api/jobs/", {"submission_id": name, **job})
        if status != HTTPStatus.OK:
            raise Refused(f"Ray: {status}: {last_line(text)}")


def name_of(share: Sequence[Worker]) -> str:
    """One of a name at a time, says Ray: so an attempt cannot be started twice."""
    return f"{PREFIX}{share[0].key}"


def is_ghost(job: dict[str, Any]) -> bool:
    """Ray's own watch of a job writes it anew, as failed and without metadata, where it was deleted
    in the second before that notices the job's end."""
    return (job["submission_id"] or "").startswith(PREFIX) and not job["metadata"]


def job_of(share: Sequence[Worker], spec: Spec) -> dict[str, Any]:
    """The driver and its task are variables, which Ray's dashboard shows to no browser."""
    task = json.dumps(task_of(share, spec))
    if len(task) > TASK_BYTES_MAX:
        raise Unusable(f"spec: argv and env take {len(task)} bytes, at most {TASK_BYTES_MAX}")
    variables = {
        "LEPTONIC_DRIVER": DRIVER,
        "LEPTONIC_SHARE": task,
        # Read by the driver's supervisor: 3 s otherwise, then SIGKILL.
        "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(spec.grace_s) + STOP_S),
    }
    return {
        "entrypoint": ENTRYPOINT,
        "runtime_env": {"env_vars": variables},
        "metadata": {
            NODE: share[0].node,
            "ai.leptonic.job": share[0].job,
            "ai.leptonic.attempt": str(share[0].attempt),
            SHARE: msgspec.json.encode(share).decode(),
        },
    }


def task_of(share: Sequence[Worker], spec: Spec) -> dict[str, Any]:
    needs = share[0].resources
    return {
        "argv": spec.argv,
        "env": spec.env,
        "cwd": spec.cwd,
        "grace_s": spec.grace_s,
        "told": [told(worker) for worker in share],
        "bundle": bundle_of(needs),
        "says": SAYS,
        "memory_bytes": needs.memory_mib << 20,
        "tail_bytes": TAIL_BYTES_MAX,
    }


def told(worker: Worker) -> dict[str, str]:
    environment = worker.environment()
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # which ones, says Ray
    return environment


def bundle_of(needs: Resources) -> dict[str, float]:
    """As Ray counts: whole CPUs and GPUs, bytes."""
    bundle = {
        "CPU": needs.cpu_milli / 1000,
        "memory": needs.memory_mib << 20,
        "GPU": needs.gpus * needs.gpu_milli / 1000,
    }
    return {name: amount for name, amount in bundle.items() if amount} or {"CPU": LEAST_CPU}


def report_in(log: str) -> Report | None:
    """None where the driver did not come to it."""
    lines = [line for line in log.splitlines() if line.startswith(SAYS)]
    return msgspec.json.decode(lines[-1].removeprefix(SAYS), type=Report) if lines else None


def seen_as(worker: Worker, status: str, report: Report | None, message: str) -> Seen:
    if status in ("PENDING", "RUNNING"):
        return Seen(worker, running=True)
    if status == "STOPPED":
        return Seen(worker, running=False, exit_code=-signal.SIGTERM)
    if report is None:
        problem = f"its driver is gone: {last_line(message)}"
        return Seen(worker, running=False, problem=problem, lost=True)
    if report.local != worker.local:  # through, or ended for the other's sake: it says nothing
        return Seen(worker, running=False, exit_code=0)
    return Seen(worker, False, report.code, report.problem, report.lost, report.tail)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


async def main(settings: Settings) -> None:
    await serve(settings, RayEngine(settings))


if __name__ == "__main__":
    telemetry.log_everything("agent")
    uvloop.run(main(load(Settings, "agent", os.environ)))
