import os

import uvloop

from libs import telemetry
from libs.settings import load
from services.trainer.app import Settings, main

telemetry.log_everything("trainer")
uvloop.run(main(load(Settings, "trainer", os.environ)))
