import os

import uvloop

from libs.settings import load
from services.inference.app import Settings, main

uvloop.run(main(load(Settings, "inference", os.environ)))
