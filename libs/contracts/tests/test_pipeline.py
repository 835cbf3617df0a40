"""The pipeline file: what it says survives, and every refusal names its field."""

from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from libs.contracts.pipeline import (
    METRICS,
    RECIPES,
    TYPES,
    Batching,
    Canary,
    Dataset,
    Deployment,
    DriftTrigger,
    Field,
    Gate,
    Invalid,
    Pipeline,
    Train,
    Triggers,
    convert,
    is_name,
    parse,
)

MINIMAL = """
pipeline: digits
dataset:
  name: digits
  schema:
    pixels: {type: float32, shape: [64]}
    label: {type: int64, role: label}
preprocess: []
train: {recipe: mlp}
deployment: {model: digits}
"""


def document(**changes: Any) -> dict[str, Any]:
    """The minimal file with `a__b=value` written over `a.b`."""
    built: dict[str, Any] = yaml.safe_load(MINIMAL)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = built
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return built


def refusal(**changes: Any) -> Invalid:
    with pytest.raises(Invalid) as refused:
        parse(yaml.safe_dump(document(**changes)))
    return refused.value


def test_the_least_one_can_write() -> None:
    pipeline = parse(MINIMAL)
    assert (pipeline.label, pipeline.features) == ("label", ["pixels"])
    assert pipeline.deployment.canary.traffic_percent == 20
    assert pipeline.triggers == Triggers()


def test_features_keep_the_order_of_the_schema() -> None:
    schema = {
        "b": {"type": "float32"},
        "id": {"type": "string", "role": "ignore"},
        "y": {"type": "float32", "role": "label"},
        "a": {"type": "float32"},
    }
    assert convert(document(dataset__schema=schema)).features == ["b", "a"]


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"pipelin": 1}, "$.pipelin", "unknown key"),
        ({"train__epoch": 1}, "$.train.epoch", "unknown key"),
        ({"deployment__canary": {"percent": 1}}, "$.deployment.canary.percent", "unknown key"),
        ({"deployment__canary": {"traffic_percent": 1}}, ".traffic_percent", "unknown key"),
        ({"gates": [{"metric": "loss", "most": 1}]}, "$.gates[0].most", "unknown key"),
        ({"triggers": {"drift": {"psy": 1}}}, "$.triggers.drift.psy", "unknown key"),
        (
            {"dataset__schema__label": {"type": "int64", "rol": "label"}},
            "$.dataset.schema.label.rol",
            "unknown key",
        ),
        ({"dataset__schema__pixels__shape": [8, "a"]}, "$.dataset.schema.pixels.shape[1]", "int"),
        ({"train": {"workers": 2}}, "$.train.recipe", "is required"),
        ({"dataset__schema__pixels": {"shape": [1]}}, "$.dataset.schema.pixels.type", "required"),
        ({"train__workers": "two"}, "$.train.workers", "Expected `int`, got `str`"),
        ({"deployment": None}, "$.deployment", "Expected `object`, got `null`"),
    ],
)
def test_keys_and_types(changes: dict[str, Any], field: str, problem: str) -> None:
    error = refusal(**changes)
    assert error.field.endswith(field)
    assert problem in error.problem
    assert str(error) == f"{error.field}: {error.problem}"


@pytest.mark.parametrize(
    ("steps", "field", "problem"),
    [
        ([{"standardise": {}}], "[0].standardise", "unknown step 'standardise': one of cast, clip"),
        ([{"drop_nulls": {}, "cast": {}}], "[0]", "one step an item, got ['cast', 'drop_nulls']"),
        ([{}], "[0]", "one step an item"),
        ([{"drop_nulls": None}], "[0].drop_nulls", "Expected `object`, got `null`"),
        ([{"clip": {"low": 0}}], "[0].clip.low", "unknown option: one of columns, max, min"),
        ([{"clip": {}}, {"clip": {"columns": ["x"]}}], "[1].clip.columns", "no column 'x'"),
        ([{"clip": {"columns": "pixels"}}], "[0].clip.columns", "a list of columns, got 'pixels'"),
        ([{"clip": {"columns": 3}}], "[0].clip.columns", "a list of columns, got 3"),
        ([{"clip": {"columns": []}}], "[0].clip.columns", "a list of columns, got []"),
        ([{"clip": {"columns": [["pixels"]]}}], "[0].clip.columns", "no column ['pixels']"),
        ([{"clip": {"min": "0"}}], "[0].clip.min", "a number, got '0'"),
        ([{"clip": {"min": 2, "max": 1}}], "[0].clip.min", "2 is more than max, 1"),
        ([{"cast": {"to": "float16"}}], "[0].cast.to", "unknown type 'float16'"),
        ([{"split": {"test": 1}}], "[0].split.test", "less than 1, got 1"),
        ([{"split": {"test": True}}], "[0].split.test", "less than 1, got True"),
        ([{"split": {"seed": 0.5}}], "[0].split.seed", "a whole number, got 0.5"),
        ([{"image_scale": {"mean": ["a"]}}], "[0].image_scale.mean", "a number"),
        ([{"image_scale": {"std": [0.2, 0]}}], "[0].image_scale.std", "more than 0"),
    ],
)
def test_steps(steps: list[Any], field: str, problem: str) -> None:
    error = refusal(preprocess=steps)
    assert error.field == f"$.preprocess{field}"
    assert problem in error.problem


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a/b", "é", "x" * 64, "*", ">"])
@pytest.mark.parametrize("field", ["pipeline", "dataset__name", "deployment__model"])
def test_names(field: str, name: str) -> None:
    assert not is_name(name)
    assert refusal(**{field: name}).field == "$." + field.replace("__", ".")


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"dataset__schema__pixels__type": "float"}, "$.dataset.schema.pixels.type", "unknown"),
        ({"dataset__schema__pixels__role": "target"}, "$.dataset.schema.pixels.role", "unknown"),
        ({"dataset__schema__pixels__shape": [8, 0]}, "$.dataset.schema.pixels.shape", "at least 1"),
        ({"dataset__schema__pixels__role": "label"}, "$.dataset.schema", "exactly one field"),
        ({"dataset__schema__label__role": "ignore"}, "$.dataset.schema", "exactly one field"),
        ({"dataset__schema__pixels__role": "ignore"}, "$.dataset.schema", "no field has role"),
        ({"dataset__schema___x": {"type": "bool"}}, "$.dataset.schema._x", "the platform's own"),
        ({"train__recipe": "mpl"}, "$.train.recipe", "unknown recipe 'mpl': one of mlp, cnn"),
        ({"train__task": "ranking"}, "$.train.task", "unknown task"),
        ({"train__engine": "spark"}, "$.train.engine", "unknown engine"),
        ({"train__workers": 0}, "$.train.workers", "1 to 1024, got 0"),
        ({"train__seed": -1}, "$.train.seed", "got -1"),
        ({"train__cpu_milli": 0}, "$.train.cpu_milli", "got 0"),
        ({"train__memory_mib": -5}, "$.train.memory_mib", "got -5"),
        ({"train__queue": "a.b"}, "$.train.queue", "not a name"),
        ({"gates": [{"metric": "acuracy", "min": 0.9}]}, "$.gates[0].metric", "one of accuracy"),
        ({"gates": [{"metric": "mae", "max": 1}]}, "$.gates[0].metric", "no metric 'mae'"),
        ({"gates": [{"metric": "loss"}]}, "$.gates[0]", "a gate needs min, max or max_drop"),
        ({"deployment__replicas": -1}, "$.deployment.replicas", "got -1"),
        (
            {"deployment__autoscaling": {"min_replicas": 3, "max_replicas": 2}},
            "$.deployment.autoscaling.max_replicas",
            "3 to 1024, got 2",
        ),
        (
            {"deployment": {"model": "m", "replicas": 2, "autoscaling": {}}},
            "$.deployment.replicas",
            "deployment.autoscaling says how many there are",
        ),
        ({"deployment__autoscaling": {"idle_s": 0}}, "$.deployment.autoscaling.idle_s", "got 0"),
        ({"deployment__autoscaling": {"max": 0}}, "$.deployment.autoscaling.max", "unknown key"),
        ({"deployment__request_log_percent": 101}, "$.deployment.request_log_percent", "got 101"),
        ({"deployment__canary__trafficPercent": 100}, "$.deployment.canary.trafficPercent", "100"),
        ({"deployment__canary__min_requests": 0}, "$.deployment.canary.min_requests", "got 0"),
        ({"deployment__canary__max_error_rate": 2}, "$.deployment.canary.max_error_rate", "got 2"),
        ({"deployment__batching__max_batch_size": 0}, "$.deployment.batching.max_batch_size", "0"),
        ({"deployment__batching__max_queue_size": 0}, "$.deployment.batching.max_queue_size", "0"),
        ({"triggers__records": 0}, "$.triggers.records", "got 0"),
        ({"triggers__drift__psi": -1}, "$.triggers.drift.psi", "got -1"),
        ({"triggers__drift__min_records": 0}, "$.triggers.drift.min_records", "got 0"),
    ],
)
def test_values(changes: dict[str, Any], field: str, problem: str) -> None:
    error = refusal(**changes)
    assert error.field == field
    assert problem in error.problem


def test_a_recipe_of_ones_own_may_measure_what_it_likes() -> None:
    gates = [{"metric": "recall_at_10", "min": 0.5}]
    pipeline = convert(document(train__recipe="my.recipes:Ranker", gates=gates))
    assert pipeline.gates == [Gate("recall_at_10", min=0.5)]


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("", "$", "Expected `object`, got `null`"),
        ("- 1", "$", "Expected `object`, got `array`"),
        ("a: b: c", "$", "not YAML: mapping values are not allowed here"),
        ("\x00", "$", "not YAML"),
        ("a: !!python/object:os.system {}", "$", "not YAML"),
        ("[" * 20_000, "$", "nested deeper than 16"),
        ("a: &a [*a]", "$", "nested deeper than 16"),
        ("a: {b: {1: 2}}", "$.a.b", "keys are text, got 1"),
        ("a: [0, .nan]", "$.a[1]", "a finite number, got nan"),
        ("a: -.inf", "$.a", "a finite number, got -inf"),
        ("a: 99999999999999999999", "$.a", "a 64-bit integer, got one of 67 bits"),
        ("a: {since: 2026-11-21}", "$.a.since", "a date is no value here: quote it"),
        ("a: !!binary aGk=", "$.a", "a bytes is no value here"),
    ],
)
def test_text_that_says_nothing_we_can_keep(text: str, field: str, problem: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse(text)
    assert refused.value.field == field
    assert problem in refused.value.problem


def test_aliases_that_multiply_are_refused_before_they_do() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]"
        for p, n in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    with pytest.raises(Invalid, match="more than 10000 values"):
        parse("\n".join(lines))


NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,63}", fullmatch=True)
AMOUNTS = st.integers(1, 1000)
SHARES = st.floats(0, 1)
PARAMS = st.dictionaries(
    NAMES,
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 63) - 1)
        | st.text(max_size=5)
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)
FIELDS = st.builds(
    Field,
    type=st.sampled_from(TYPES),
    shape=st.lists(st.integers(1, 64), max_size=3),
    role=st.sampled_from(["feature", "ignore"]),
    nullable=st.booleans(),
)


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    columns_named = st.from_regex(r"[A-Za-z0-9-][A-Za-z0-9_-]{0,20}", fullmatch=True)
    schema = draw(st.dictionaries(columns_named, FIELDS, max_size=4))
    schema |= {"in": Field("float32"), "out": Field("int64", role="label")}
    columns = st.lists(st.sampled_from(sorted(schema)), min_size=1, max_size=3)
    step = st.one_of(
        st.fixed_dictionaries({"standardize": st.fixed_dictionaries({"columns": columns})}),
        st.fixed_dictionaries({"clip": st.fixed_dictionaries({"min": SHARES, "max": AMOUNTS})}),
        st.just({"cast": {"to": "float32"}}),
        st.just({"split": {"test": 0.25, "seed": 3}}),
    )
    task = draw(st.sampled_from(sorted(METRICS)))
    gate = st.builds(Gate, metric=st.sampled_from(METRICS[task]), min=SHARES, max_drop=SHARES)
    return Pipeline(
        pipeline=draw(NAMES),
        dataset=Dataset(draw(NAMES), schema),
        preprocess=draw(st.lists(step, max_size=3)),
        train=Train(
            draw(st.sampled_from(RECIPES) | st.just("module:Class")),
            task=task,
            params=draw(PARAMS),
            workers=draw(AMOUNTS),
            seed=draw(st.integers(0, 1 << 31)),
        ),
        deployment=Deployment(
            draw(NAMES),
            replicas=draw(st.integers(0, 9)),
            canary=Canary(draw(st.integers(1, 99)), draw(AMOUNTS), draw(SHARES), draw(SHARES)),
            batching=Batching(
                max_batch_size=draw(st.integers(8, 64)),
                preferred_batch_size=tuple(draw(st.lists(st.integers(1, 8), max_size=3))),
                max_queue_delay_microseconds=draw(AMOUNTS),
                max_queue_size=draw(AMOUNTS),
                priority_levels=draw(st.integers(3, 5)),
                default_priority_level=draw(st.integers(0, 3)),
                timeout_action=draw(st.sampled_from(("REJECT", "DELAY"))),
            ),
        ),
        gates=draw(st.lists(gate, max_size=3)),
        triggers=draw(st.just(Triggers()) | st.just(Triggers(500, DriftTrigger(0.1, 50)))),
    )


@given(pipelines())
@hypothesis_settings(max_examples=50)
def test_what_is_written_comes_back(pipeline: Pipeline) -> None:
    builtins = msgspec.to_builtins(pipeline)
    assert parse(yaml.safe_dump(builtins, sort_keys=False)) == pipeline
    assert convert(msgspec.json.decode(msgspec.json.encode(pipeline))) == pipeline


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["pipeline", "dataset", "train", "schema", "x"]), inner
            )
        ),
        max_leaves=20,
    )
)
def test_any_document_is_a_pipeline_or_a_refusal_that_names_a_field(rubbish: Any) -> None:
    """`Invalid` and nothing else, whatever a file says."""
    for broken in (rubbish, document(dataset__schema=rubbish), document(preprocess=rubbish)):
        error = refused(broken)
        assert error is None or (error.field.startswith("$") and error.problem)


def refused(document: Any) -> Invalid | None:
    try:
        convert(document)
    except Invalid as error:
        return error
    return None
