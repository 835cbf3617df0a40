"""The pipelines and records the tests publish."""

import json
from typing import Any

from libs.contracts.events import PipelineApplied

SCHEMAS: dict[str, dict[str, Any]] = {
    "digits": {
        "pixels": {"type": "float64", "shape": [64]},
        "label": {"type": "int64", "role": "label"},
    },
    "flat": {
        "amount": {"type": "float32"},
        "label": {"type": "int32", "role": "label"},
        "note": {"type": "string", "nullable": True},
    },
}


def applied(
    dataset: str, revision: int = 1, schema: dict[str, Any] | None = None
) -> PipelineApplied:
    return PipelineApplied(
        project="default",
        pipeline=dataset,
        revision=revision,
        spec={
            "pipeline": dataset,
            "dataset": {"name": dataset, "schema": schema or SCHEMAS[dataset]},
            "preprocess": [],
            "train": {"recipe": "mlp"},
            "deployment": {"model": dataset},
        },
    )


def digit(label: int) -> dict[str, Any]:
    return {"pixels": [float(label)] * 64, "label": label}


def message(*records: Any) -> bytes:
    return json.dumps(records).encode()
