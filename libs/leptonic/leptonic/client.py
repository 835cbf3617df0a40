"""The verbs of the platform over its HTTP doors."""

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from leptonic import stackfile, tensors, wire
from leptonic.errors import Error
from leptonic.records import chunks_of

TIMEOUT_S = 60.0
READY_TIMEOUT_S = 2.0
DOORS = ("ingest", "preprocess", "trainer", "registry", "scheduler", "inference_api", "traces")
MODEL_SCHEME = "models:/"
QUEUE_KEY, PIPELINE_KEY = re.compile(r"^queue:", re.M), re.compile(r"^pipeline:", re.M)


class Client:
    """One stack, one project. Use as a context manager, or `close` it.

    Every verb raises `leptonic.Error` with the server's message when it is refused.
    """

    def __init__(self, stack: stackfile.Stack, project: str | None = None) -> None:
        self.stack = stack
        self.project = project or stack.project
        headers = stackfile.authorization()
        self.http = httpx.Client(timeout=TIMEOUT_S, trust_env=False, headers=headers)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def call(self, door: str, method: str, path: str, **request: Any) -> Any:
        """One request to a service's HTTP door -> its JSON answer."""
        url = self.stack.endpoint(door).rstrip("/") + path
        try:
            answer = self.http.request(method, url, **request)
        except httpx.TransportError as error:
            problem = f"{door} at {url} does not answer: {error or type(error).__name__}"
            raise Error(f"{problem}; see `leptonic status`", code="UNREACHABLE") from error
        if answer.is_error:
            raise refusal(door, answer)
        return wire.decoded(answer.content)

    def get(self, door: str, path: str, **query: Any) -> Any:
        return self.call(door, "GET", path, params=query)

    def path(self, *parts: object) -> str:
        """`/v1/projects/<project>/...`, with every part escaped."""
        return "/v1/projects/" + "/".join(
            quote(str(one), safe="@") for one in (self.project, *parts)
        )

    def apply(self, file: str | Path) -> dict[str, Any]:
        """Applies a pipeline, or a queue: a file's path, or the YAML itself where it has several
        lines. A queue's has `queue:` where a pipeline's has `pipeline:`.
        """
        text = str(file)
        if "\n" not in text:
            try:
                text = Path(file).read_text()
            except OSError as error:
                raise Error(f"{file}: {error.strerror}", field="file") from error
        is_queue = QUEUE_KEY.search(text) and not PIPELINE_KEY.search(text)
        door, path = (
            ("scheduler", "/v1/queues") if is_queue else ("registry", self.path("pipelines"))
        )
        applied: dict[str, Any] = self.call(door, "POST", path, json={"yaml": text})
        return applied

    def publish(
        self, dataset: str, records: str | Path | Iterable[Mapping[str, Any]], id: str = ""
    ) -> dict[str, Any]:
        """Records -> `{"accepted": n, "refused": n, "refusals": [{"index", "field", "reason"}]}`.

        `records` are dicts, or a file: .ndjson, .jsonl, .json, .csv, .parquet, .arrow. The same
        records with the same `id` are stored once.
        """
        identity = id or uuid.uuid4().hex
        total: dict[str, Any] = {"accepted": 0, "refused": 0, "refusals": []}
        path = self.path("datasets", dataset, "records")
        for number, (before, kind, payload) in enumerate(chunks_of(records)):
            headers = {"content-type": kind, "idempotency-key": f"{identity}-{number}"}
            receipt = self.call("ingest", "POST", path, content=payload, headers=headers)
            total["accepted"] += receipt["accepted"]
            total["refused"] += receipt["refused"]
            total["refusals"] += [
                {**one, "index": one["index"] + before} for one in receipt["refusals"]
            ]
        return total

    def datasets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("ingest", self.path("datasets"))["datasets"]
        return found

    def dataset(self, name: str) -> dict[str, Any]:
        """One dataset, with its versions and the drift measured against the last of them."""
        described: dict[str, Any] = self.get("ingest", self.path("datasets", name))
        described["versions"] = self.dataset_versions(name)
        if described["versions"]:
            described["drift"] = self.get("preprocess", self.path("datasets", name, "drift"))
        return described

    def dataset_versions(self, name: str) -> list[dict[str, Any]]:
        answer = self.get("preprocess", self.path("datasets", name, "versions"))
        found: list[dict[str, Any]] = answer["versions"]
        return found

    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("scheduler", self.path("jobs"))["jobs"]
        return found

    def job(self, name: str) -> dict[str, Any]:
        """One job; a training job has its `run` with the metrics of every epoch."""
        described: dict[str, Any] = self.get("scheduler", self.path("jobs", name))
        if described["kind"] == "train":
            try:
                described["run"] = self.get("trainer", self.path("runs", name))
            except Error as error:
                if error.code != "NOT_FOUND":  # it has not started yet
                    raise
        return described

    def why(self, job: str) -> dict[str, Any]:
        """What binds a job that waits, and the cheapest changes that would place it next."""
        told: dict[str, Any] = self.get("scheduler", self.path("jobs", job, "why"))
        return told

    def models(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("registry", self.path("models"))["models"]
        return found

    def model_versions(self, model: str) -> list[dict[str, Any]]:
        answer = self.get("registry", self.path("models", model, "versions"))
        found: list[dict[str, Any]] = answer["versions"]
        return found

    def model_version(self, model: str, version: str | int) -> dict[str, Any]:
        """`version` is a number or an alias with its sign, as `@champion`."""
        path = self.path("models", model, "versions", version)
        found: dict[str, Any] = self.get("registry", path)
        return found

    def endpoints(self) -> list[dict[str, Any]]:
        """What is deployed (desired), joined with what serves and what it counted."""
        path = self.path("deployments")
        deployments: list[dict[str, Any]] = self.get("registry", path)["deployments"]
        serving = self.get("inference_api", self.path("endpoints"))["endpoints"]
        by_model = {one["model"]: one for one in serving}
        for one in deployments:
            one["serving"] = by_model.get(one["model"], {"generation": 0, "targets": []})
        return deployments

    def predict(
        self, model: str, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], id: str = ""
    ) -> dict[str, Any]:
        """Rows of features -> `{"id", "model_name", "model_version", "outputs": {name: rows}}`.

        `inputs` maps a feature to its values of all rows, or is one mapping a row.
        """
        described = self.get("inference_http", f"/v2/models/{quote(model)}")
        request: dict[str, Any] = {"inputs": tensors.encode(inputs, described["inputs"])}
        request["id"] = id or uuid.uuid4().hex
        path = f"/v2/models/{quote(model)}/infer"
        answer: dict[str, Any] = self.call("inference_http", "POST", path, json=request)
        answer["outputs"] = {one["name"]: tensors.rows(one) for one in answer["outputs"]}
        return answer

    def prediction(self, request_id: str) -> dict[str, Any]:
        """A logged request: which version answered, with what, under which trace."""
        found: dict[str, Any] = self.get("inference_api", self.path("predictions", request_id))
        return found

    def feedback(self, model: str, request_id: str, label: Any) -> None:
        """The true label of a prediction; of one with several rows, a list of their labels."""
        body = {"project": self.project, "model": model, "request_id": request_id, "label": label}
        self.call("inference_api", "POST", "/v1/feedback", json=body)

    def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("scheduler", "/v1/nodes")["nodes"]
        return found

    def fleet(self) -> dict[str, Any]:
        """The nodes, and the planner's bound."""
        found: dict[str, Any] = self.get("scheduler", "/v1/nodes")
        return found

    def delete_queue(self, queue: str) -> None:
        """Its jobs stay, without quota and by priority."""
        self.call("scheduler", "DELETE", f"/v1/queues/{quote(queue, safe='')}")

    def queues(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("scheduler", "/v1/queues")["queues"]
        return found

    def events(self, after: int = 0, limit: int = 100) -> tuple[list[dict[str, Any]], int]:
        """Events of the project after a sequence, and the sequence to go on from.

        A negative `after` looks at so many messages before the end.
        """
        answer = self.get("registry", "/v1/events", project=self.project, after=after, limit=limit)
        return answer["events"], answer["last"]

    def dead_letters(self, after: int = 0, limit: int = 100) -> tuple[list[dict[str, Any]], int]:
        """What could not be handled, each with its reason; and the sequence to go on from."""
        answer = self.get("registry", "/v1/dead-letters", after=after, limit=limit)
        return answer["dead_letters"], answer["last"]

    def trace(self, reference: str) -> dict[str, Any]:
        """The story of a prediction's request id, a trace id, or a model version's reference."""
        story: dict[str, Any] = self.get("traces", f"/v1/story/{self.trace_id(reference)}")
        return story

    def trace_id(self, reference: str) -> str:
        """`models:/name/3`, `models:/name@champion`, a trace id or a request id -> a trace id."""
        if reference.startswith(MODEL_SCHEME):
            model, version = model_reference(reference)
            place = self.model_version(model, version)["traceparent"]
            if not place:
                raise Error(f"{reference} was registered outside any trace", code="NOT_FOUND")
            return str(place.split("-")[1])
        try:
            return str(self.prediction(reference)["trace_id"])
        except Error as error:
            if error.code == "NOT_FOUND" and is_trace_id(reference):
                return reference.lower()
            raise

    def status(self) -> dict[str, Any]:
        """The stack file's words, and whether each service says that it is ready."""
        doors = {name: self.is_ready(name) for name in DOORS if name in self.stack.endpoints}
        return {
            "source": self.stack.source,
            "project": self.project,
            "pid": self.stack.pid,
            "started_at": self.stack.started_at,
            "ready": all(doors.values()),
            "doors": doors,
            "endpoints": dict(self.stack.endpoints),
            "processes": {name: dict(one) for name, one in self.stack.processes.items()},
        }

    def is_ready(self, door: str) -> bool:
        url = self.stack.endpoint(door).rstrip("/") + "/health/ready"
        try:
            return self.http.get(url, timeout=READY_TIMEOUT_S).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


def connect(
    data_dir: str | Path | None = None,
    *,
    endpoints: Mapping[str, str] | None = None,
    project: str | None = None,
) -> Client:
    """The stack on a data folder (default: `LEPTONIC_ENDPOINTS`, then `.leptonic`), or one whose
    endpoints are given by name. Raises `leptonic.Error` when there is none."""
    if endpoints is not None:
        return Client(stackfile.Stack(source="endpoints", endpoints=endpoints), project)
    return Client(stackfile.locate(data_dir), project)


def refusal(door: str, answer: httpx.Response) -> Error:
    """What the server said, whatever form it said it in."""
    try:
        body = json.loads(answer.content)
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    said = body.get("error") or answer.text.strip()[:500] or answer.reason_phrase
    problem = said if isinstance(said, str) else json.dumps(said)
    code = body.get("code") or ("NOT_FOUND" if answer.status_code == httpx.codes.NOT_FOUND else "")
    return Error(f"{door}: {problem}", field=body.get("field", ""), code=code)


def model_reference(reference: str) -> tuple[str, str]:
    """`models:/name/3` -> (name, "3"); `models:/name@champion` -> (name, "@champion")."""
    model, slash, number = reference.removeprefix(MODEL_SCHEME).partition("/")
    if slash and model and number.isdigit():
        return model, number
    model, sign, alias = reference.removeprefix(MODEL_SCHEME).partition("@")
    if sign and model and alias and "/" not in alias:
        return model, sign + alias
    wanted = "models:/name/3 or models:/name@champion"
    raise Error(f"{reference!r} is no model reference: write {wanted}", field="reference")


def is_trace_id(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdefABCDEF" for c in text)


__all__ = ["Client", "connect", "is_trace_id", "model_reference"]
