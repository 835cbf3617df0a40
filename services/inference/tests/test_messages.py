"""The protocol's messages as JSON: numbers stay numbers, defaults are said, the schema is true."""

import json
from typing import Any

import jsonschema

from libs.contracts.protos import model_config_pb2 as config
from libs.contracts.protos import open_inference_pb2 as oip
from services.inference.messages import plain, schema_of

STATISTICS = oip.ModelStatisticsResponse(
    model_stats=[
        oip.ModelStatistics(
            name="7",
            version="3",
            inference_count=1 << 60,
            inference_stats=oip.InferStatistics(success=oip.StatisticDuration(count=2, ns=9)),
            response_stats={"0": oip.InferResponseStatistics()},
        )
    ]
)
CONFIG = config.ModelConfig(
    name="m",
    max_batch_size=8,
    input=[config.ModelInput(name="x", data_type=config.TYPE_FP32, dims=[-1, 4])],
    dynamic_batching=config.ModelDynamicBatching(preferred_batch_size=[4, 8]),
    parameters={"key": config.ModelParameter(string_value="value")},
)


def test_numbers_are_numbers_and_text_is_text() -> None:
    (model,) = plain(STATISTICS)["model_stats"]
    assert (model["name"], model["version"], model["inference_count"]) == ("7", "3", 1 << 60)
    assert model["inference_stats"]["success"] == {"count": 2, "ns": 9}
    assert model["execution_count"] == 0, "a default is said"
    assert "fail" not in model["inference_stats"], "a message that is not set is not"
    assert model["batch_stats"] == []


def test_enums_maps_and_choices() -> None:
    known = plain(CONFIG)
    assert known["input"][0]["data_type"] == "TYPE_FP32"
    assert known["input"][0]["dims"] == [-1, 4]
    assert known["parameters"] == {"key": {"string_value": "value"}}
    assert known["dynamic_batching"]["preferred_batch_size"] == [4, 8]
    assert "sequence_batching" not in known, "the choice that was not taken"


def test_the_schema_is_that_of_the_json() -> None:
    for message in (STATISTICS, CONFIG, config.ModelConfig(), oip.ServerMetadataResponse()):
        known: dict[str, Any] = {}
        reference = schema_of(message.DESCRIPTOR, known)
        document = {**reference, "components": {"schemas": known}}
        jsonschema.validate(json.loads(json.dumps(plain(message))), document)
        assert known[message.DESCRIPTOR.name]["required"]
