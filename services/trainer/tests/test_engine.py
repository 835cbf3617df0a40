"""Real Ray, real object storage: the same bits whatever happens on the way."""

import asyncio
import os
import signal
from typing import Any

import msgspec
import pytest

from libs.contracts.artifacts import ModelManifest, TrainResult
from libs.objectstore import ObjectStore
from services.trainer.domain import Champion, Outcome, TrainSpec, Unusable
from services.trainer.tests.conftest import assignment_of, spec_of, store_digits

OWN = "services.trainer.tests.raising"
NO_CHAMPION = Outcome(None, 0.0, 0)


async def trained(
    engine: Any, job: str, spec: TrainSpec, outcome: Outcome = NO_CHAMPION, kill_in: int = 0
) -> tuple[TrainResult, list[int]]:
    """The result, and every epoch that was told; `kill_in`: SIGKILL a worker in that epoch."""
    told = []
    async with engine.run(assignment_of(job, spec)) as run:
        async for progress in run.fit():
            told.append(progress.epoch)
            if kill_in and progress.epoch == kill_in - 1:
                os.kill(run.members[-1].pid, signal.SIGKILL)
                kill_in = 0
        return await run.finish(outcome), told


async def manifest_of(objects: ObjectStore, result: TrainResult) -> ModelManifest:
    payload = await objects.get_blob(result.manifest.digest)
    return msgspec.json.decode(payload, type=ModelManifest)


async def test_the_same_lineage_trained_twice_is_the_same_version(
    pool: Any, shared: ObjectStore
) -> None:
    spec = spec_of(await store_digits(shared), workers=2, params={"epochs": 8, "dropout": 0.1})
    first, told = await trained(pool, "twice-1", spec)
    second, _ = await trained(pool, "twice-2", spec)
    assert told == list(range(9))
    assert first.manifest.digest == second.manifest.digest
    manifest = await manifest_of(shared, first)
    assert manifest.metrics["accuracy"] > 0.85
    assert manifest.lineage.workers == 2
    assert {"torch", "python", "onnxruntime"} <= set(manifest.lineage.libraries)
    for blob in (manifest.weights, manifest.graph, manifest.transform):
        await shared.get_blob(blob.digest)


async def test_a_killed_worker_costs_an_epoch_and_no_bit(pool: Any, shared: ObjectStore) -> None:
    long_epochs = {"epochs": 3, "hidden": [512, 512], "batch_size": 8, "dropout": 0.1}
    spec = spec_of(await store_digits(shared), workers=2, params=long_epochs)
    undisturbed, _ = await trained(pool, "undisturbed", spec)
    killed, told = await trained(pool, "killed", spec, kill_in=2)
    assert told == [0, 1, 1, 2, 3], "it resumed where the checkpoint was"
    assert killed.manifest.digest == undisturbed.manifest.digest


async def test_only_the_last_two_checkpoints_are_kept(pool: Any, shared: ObjectStore) -> None:
    spec = spec_of(await store_digits(shared), params={"epochs": 4})
    await trained(pool, "kept", spec)
    assert await shared.list("checkpoints/default/kept/") == [
        "checkpoints/default/kept/epoch-0003.safetensors",
        "checkpoints/default/kept/epoch-0004.safetensors",
    ]


async def test_a_recipe_that_raises_in_its_third_epoch_is_the_users_to_change(
    pool: Any, shared: ObjectStore
) -> None:
    recipe = f"{OWN}:RaisesInThirdEpoch"
    spec = spec_of(await store_digits(shared), workers=2, recipe=recipe, params={"epochs": 5})
    with pytest.raises(Unusable) as raised:
        await trained(pool, "raises", spec)
    assert "ZeroDivisionError: the temperature is 0, in epoch 3" in str(raised.value)
    result, _ = await trained(pool, "after", spec_of(spec.dataset_digest))
    assert result.evaluation.metrics["accuracy"] > 0.5, "and the next job finds a whole pool"


async def test_the_champion_is_measured_on_the_candidates_rows(
    pool: Any, shared: ObjectStore
) -> None:
    spec = spec_of(await store_digits(shared, rows=600), params={"epochs": 1})
    weak, _ = await trained(pool, "champion", spec)
    champion = Champion(1, (await manifest_of(shared, weak)).graph.digest)
    better = spec_of(await store_digits(shared), params={"epochs": 10})
    result, _ = await trained(pool, "challenger", better, Outcome(champion, 1.5, 0))
    measured = result.evaluation
    assert (measured.champion, result.seconds) == (1, 1.5)
    assert measured.champion_metrics["accuracy"] < measured.metrics["accuracy"]
    assert measured.champion_metrics != weak.evaluation.metrics


async def test_a_gate_on_what_the_recipe_does_not_measure_is_refused(
    pool: Any, shared: ObjectStore
) -> None:
    digest = await store_digits(shared)
    recipe = "examples.custom_recipe:Residual"
    result, _ = await trained(pool, "own", spec_of(digest, ("top_two",), recipe=recipe))
    assert result.evaluation.metrics["top_two"] > result.evaluation.metrics["accuracy"]
    with pytest.raises(Unusable, match=r"\$.gates: 'top_three' is not measured"):
        await trained(pool, "gate", spec_of(digest, ("top_three",)))


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"params": {"epochs": 2, "hiden": [3]}}, r"train.params.*hiden.*known: batch_size"),
        ({"params": {"epochs": 0}}, r"\$.train.params.epochs: .*>= 1"),
        ({"recipe": "cnn"}, r"cnn needs images"),
    ],
)
async def test_what_a_user_got_wrong_is_named_and_costs_no_worker(
    pool: Any, shared: ObjectStore, train: dict[str, Any], reason: str
) -> None:
    spec = spec_of(await store_digits(shared), **train)
    before = {member.pid for member in pool.pool.idle}
    with pytest.raises(Unusable, match=reason):
        await trained(pool, f"wrong-{abs(hash(reason))}", spec)
    assert {member.pid for member in pool.pool.idle} == before


async def test_what_is_wrong_with_a_users_own_recipe_is_named(
    pool: Any, shared: ObjectStore
) -> None:
    """In one test, because each of them costs a worker: no later job meets the user's code."""
    digest = await store_digits(shared)
    first = {member.pid for member in pool.pool.idle}
    for recipe, reason in {
        "nowhere.to_be:Found": r"\$.train.recipe: cannot import 'nowhere.to_be'",
        f"{OWN}:Moody": r"has no class 'Moody' that is a Recipe",
        f"{OWN}:Branches": r"exported graph gives",
    }.items():
        spec = spec_of(digest, recipe=recipe, params={"epochs": 1})
        with pytest.raises(Unusable, match=reason):
            await trained(pool, recipe.lower(), spec)
    assert first.isdisjoint(member.pid for member in pool.pool.idle)


@pytest.mark.slow
async def test_ray_train_gives_the_weights_of_the_pool(pool: Any, shared: ObjectStore) -> None:
    """Both of its jobs at once: what takes time is Ray Train's own start."""
    digest = await store_digits(shared)
    warm, told = await trained(pool, "pool", spec_of(digest, workers=2))
    recipe = f"{OWN}:RaisesInThirdEpoch"
    raising = spec_of(digest, engine="ray_train", recipe=recipe, params={"epochs": 5})
    ray_train, raised = await asyncio.gather(
        trained(pool, "ray_train", spec_of(digest, workers=2, engine="ray_train")),
        trained(pool, "raises-long", raising),
        return_exceptions=True,
    )
    assert isinstance(raised, Unusable)
    assert "the temperature is 0, in epoch 3" in str(raised)
    assert not isinstance(ray_train, BaseException), ray_train
    long, told_long = ray_train
    assert told == told_long == [0, 1, 2, 3]
    first, second = await manifest_of(shared, warm), await manifest_of(shared, long)
    assert first.weights == second.weights
