import os

import uvloop

from libs.settings import load
from services.scheduler.app import Settings, main

uvloop.run(main(load(Settings, "scheduler", os.environ)))
