"""A queue as a user writes it: YAML with the fields of `QueueSpec`."""

import msgspec
import yaml

from libs.contracts import pipeline
from libs.doors import Invalid
from services.scheduler import jobs, quota
from services.scheduler.stimuli import QueueSpec


def parse(text: str) -> QueueSpec:
    """Raises `Invalid`, which names the field."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise Invalid(f"not YAML: {error}", "$") from error
    try:
        pipeline.check_plain(document)
        spec = converted(document)
    except pipeline.Invalid as error:
        raise Invalid(error.problem, error.field) from error
    if not jobs.NAME.fullmatch(spec.queue):
        raise Invalid(f"1 to 200 of A-Z a-z 0-9 _ . : @ -, got {spec.queue[:80]!r}", "$.queue")
    field, colon, problem = quota.problem_of(spec).partition(": ")
    if colon:
        raise Invalid(problem, f"$.{field}")
    return spec


def converted(document: object) -> QueueSpec:
    try:
        return msgspec.convert(document, QueueSpec)
    except msgspec.ValidationError as error:
        raise pipeline.located(document, str(error)) from error
