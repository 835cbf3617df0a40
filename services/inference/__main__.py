import os

import uvloop

from libs import telemetry
from libs.settings import load
from services.inference.app import Settings, main

telemetry.log_everything("inference")
uvloop.run(main(load(Settings, "inference", os.environ)))
