"""The client of Leptonic: `leptonic.connect()` finds a running stack and speaks to its HTTP doors.

client = leptonic.connect()
client.apply("examples/digits.yaml")
client.publish("digits", [{"pixels": [0.0] * 64, "label": 3}])
client.predict("digits", {"pixels": [[0.0] * 64]})
"""

from leptonic.client import Client, connect
from leptonic.errors import Error

__all__ = ["Client", "Error", "connect"]
