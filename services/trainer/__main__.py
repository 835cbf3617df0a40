import os

import uvloop

from libs.settings import load
from services.trainer.app import Settings, main

uvloop.run(main(load(Settings, "trainer", os.environ)))
