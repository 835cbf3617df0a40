"""Configuration: read once, typed, and unknown variables are errors."""

from pathlib import Path
from typing import Annotated

import pytest
from msgspec import Meta

from libs.settings import Common, Unknown, load, variables


class Settings(Common, frozen=True, kw_only=True):
    http_port: Annotated[int, Meta(description="port")] = 8010


def test_shared_and_own_fields_come_from_their_variables() -> None:
    environment = {"LEPTONIC_HOST": "::1", "LEPTONIC_INGEST_HTTP_PORT": "9999", "PATH": "/bin"}
    loaded = load(Settings, "ingest", environment)
    assert (loaded.host, loaded.http_port, loaded.s3_bucket) == ("::1", 9999, "leptonic")


@pytest.mark.parametrize("name", ["LEPTONIC_INGEST_HTP_PORT", "LEPTONIC_HOSTS"])
def test_an_unknown_variable_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(Unknown, match=name):
        load(Settings, "ingest", {name: "1"})


def test_another_services_variables_are_not_ours() -> None:
    others = {"LEPTONIC_TRAINER_HTTP_PORT": "1", "LEPTONIC_AGENT_NODE": "n"}
    assert load(Settings, "ingest", others).http_port == 8010


def test_a_value_of_the_wrong_type_names_its_field() -> None:
    with pytest.raises(Unknown, match="http_port"):
        load(Settings, "ingest", {"LEPTONIC_INGEST_HTTP_PORT": "many"})


def test_every_field_has_a_variable() -> None:
    names = variables(Settings, "ingest")
    assert len(names) == len(Settings.__struct_fields__)
    assert {"LEPTONIC_NATS_URL", "LEPTONIC_INGEST_HTTP_PORT"} <= names.keys()


def test_a_secret_may_be_a_file_and_the_environment_wins(tmp_path: Path) -> None:
    (tmp_path / "LEPTONIC_NATS_TOKEN").write_text("from a file\n")
    (tmp_path / "LEPTONIC_S3_SECRET_KEY").write_text("from a file")
    (tmp_path / "password").write_text("not ours")
    environment = {"LEPTONIC_SECRETS_DIR": str(tmp_path), "LEPTONIC_S3_SECRET_KEY": "set"}
    loaded = load(Settings, "ingest", environment)
    assert (loaded.nats_token, loaded.s3_secret_key) == ("from a file", "set")


def test_a_folder_without_secrets_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unknown, match="LEPTONIC_SECRETS_DIR"):
        load(Settings, "ingest", {"LEPTONIC_SECRETS_DIR": str(tmp_path)})


def test_a_file_that_is_no_setting_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "LEPTONIC_NATS_TOKENS").write_text("x")
    with pytest.raises(Unknown, match="LEPTONIC_NATS_TOKENS"):
        load(Settings, "ingest", {"LEPTONIC_SECRETS_DIR": str(tmp_path)})
