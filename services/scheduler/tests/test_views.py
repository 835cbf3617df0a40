"""Queues, nodes and explanations through the real service: what is said, what is refused, and that
following the advice over the same doors places the job.
"""

from typing import Any

import httpx

from libs.contracts.events import Resources
from services.scheduler.stimuli import Heartbeat
from services.scheduler.tests.test_service import Agent, Service, beating, service
from stack.testing import eventually

__all__ = ["service"]
TEAM = """
queue: team
cohort: all
nominal: {gpu_milli: 1000}
lending_limit: {gpu_milli: 0}
"""
WHOLE = {"cpu_milli": 100, "memory_mib": 10, "gpu_milli": 1000}


def gpu_node(one: Service) -> Agent:
    agent = Agent(one.bus, "g")
    capacity = Resources(8000, 4096, 1000, 4)
    agent.heartbeat = Heartbeat("g", "1", ["train"], capacity, gpu_model="A", labels={"zone": "x"})
    return agent


async def got(one: Service, path: str) -> Any:
    response = await one.http.get(path)
    assert response.status_code == 200, response.text
    return response.json()


async def apply(one: Service, text: str) -> httpx.Response:
    return await one.http.post("/v1/queues", json={"yaml": text})


async def has_node(one: Service) -> bool:
    return bool((await got(one, "/v1/nodes"))["nodes"])


async def test_advice_taken_over_the_doors_places_the_job(service: Service) -> None:
    async with beating(gpu_node(service)):
        await eventually(lambda: has_node(service))
        assert (await apply(service, TEAM)).status_code == 200
        await service.submit("first", queue="team", resources=WHOLE)
        await service.placed("first")
        await service.submit("second", queue="team", resources={**WHOLE, "gpus": 2})
        told = await got(service, "/v1/projects/p/jobs/second/why")
        assert (told["constraint"], told["resource"]) == ("quota", "gpu_milli")
        assert (told["position"], told["waiting"]) == (1, 1)
        assert told["price"] == 1.0, told
        raised = next(one for one in told["advices"] if "raise" in one["says"])
        (change,) = raised["changes"]
        assert (change["kind"], change["queue"], change["by"]) == ("quota", "team", "2000")
        short = TEAM.replace("1000", "2999")
        assert (await apply(service, short)).status_code == 200
        assert await service.state("second") == "waiting"
        assert (await apply(service, TEAM.replace("1000", "3000"))).status_code == 200
        await service.placed("second")
        told = await got(service, "/v1/projects/p/jobs/second/why")
        assert (told["state"], told["constraint"], told["advices"]) == ("placed", "", [])
    assert (await service.http.get("/v1/projects/p/jobs/none/why")).status_code == 404


async def test_queues_say_what_is_borrowed_and_lent(service: Service) -> None:
    async with beating(gpu_node(service)):
        await eventually(lambda: has_node(service))
        for name in ("left", "right"):
            text = f"{{queue: {name}, cohort: both, nominal: {{gpu_milli: 2000}}, weight: 500}}"
            assert (await apply(service, text)).status_code == 200
        await service.submit("j", queue="left", resources={**WHOLE, "gpus": 3})
        await service.placed("j")
        left, right = (await got(service, "/v1/queues"))["queues"]
        (use,) = left["quotas"]
        figures = {name: int(use[name]) for name in ("nominal", "used", "borrowed", "lent", "left")}
        assert figures == {"nominal": 2000, "used": 3000, "borrowed": 1000, "lent": 0, "left": 1000}
        assert (right["quotas"][0]["lent"], right["quotas"][0]["left"]) == ("1000", "1000")
        assert (left["cohort"], left["weight"], left["share"]) == ("both", "500", "500000")
        assert (await service.http.delete("/v1/queues/right")).status_code == 200
        names = [one["queue"] for one in (await got(service, "/v1/queues"))["queues"]]
        assert names == ["left"]
        assert (await service.http.delete("/v1/queues/right")).status_code == 404


async def test_nodes_say_what_is_free_of_each_gpu(service: Service) -> None:
    async with beating(gpu_node(service)):
        await eventually(lambda: has_node(service))
        await service.submit("part", resources={**WHOLE, "gpu_milli": 700})
        await service.placed("part")
        (node,) = (answer := await got(service, "/v1/nodes"))["nodes"]
        assert sorted(node["gpu_milli_free"]) == [300, 1000, 1000, 1000]
        assert (node["gpu_model"], node["labels"]) == ("A", {"zone": "x"})
        assert node["gpu_milli_fragmented"] == "300", "what comes needs 700"
        assert answer["gpu_milli_bound"] == "2800"


async def test_what_a_job_asks_for_arrives_and_what_is_wrong_is_named(service: Service) -> None:
    async with beating(gpu_node(service)):
        await eventually(lambda: has_node(service))
        wanted = {"gpu_models": ["A"], "labels": {"zone": "x"}, "topology": "any", "workers": 2}
        more = {"duration_s": 60, "preemptible": False, "attempts_max": 1}
        answer = await service.submit("j", resources={**WHOLE, "gpus": 2}, **wanted, **more)
        assert answer.status_code == 200
        assert len((await service.placed("j")).gpus) == 2
        await service.submit("other", resources=WHOLE, gpu_models=["B"])
        told = await got(service, "/v1/projects/p/jobs/other/why")
        assert told["constraint"] == "nodes"
        (advice,) = told["advices"]
        assert advice["changes"][0]["machine"]["gpu_model"] == "B"
    refused = await service.submit("x", topology="ring")
    assert (refused.status_code, refused.json()["field"]) == (400, "topology")
    wrong = {
        "queue: a b": "$.queue",
        "{queue: a, colour: red}": "$.colour",
        "{queue: a, reclaim: maybe}": "$.reclaim",
        "{queue: a, nominal: {gpus: 1}}": "$.nominal",
        "queue: [": "$",
    }
    for text, field in wrong.items():
        response = await apply(service, text)
        assert (response.status_code, response.json()["field"]) == (400, field), response.text
