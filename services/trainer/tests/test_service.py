"""The service on a real bus, Postgres and object storage; the scheduler's part is played here."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest_asyncio
import yaml
from pathlib import Path

from libs import database
from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    DatasetVersionCreated,
    Event,
    JobProgressed,
    JobRequested,
    JobSucceeded,
    PipelineApplied,
    decode,
    encode,
    subject_of,
)
from libs.objectstore import ObjectStore
from services.trainer import app, store
from services.trainer.agent import Agent
from services.trainer.tests.conftest import PROJECT, store_digits
from stack import ports
from stack.testing import ACCESS_KEY, PASSWORD, eventually
