"""`python -I -S healthy.py`: exit code 0 when this container's service says that it is ready.

Only sockets: a container asks every few seconds, and importing an HTTP client costs more than the
question.
"""

import os
import socket
import sys

READY = {
    "ingest": (8010, "/health/ready"),
    "preprocess": (8011, "/health/ready"),
    "trainer": (8012, "/health/ready"),
    "registry": (8013, "/health/ready"),
    "scheduler": (8014, "/health/ready"),
    "inference": (8000, "/v2/health/ready"),
    "collector": (4318, "/health/ready"),
    "edge": (8016, "/health/ready"),
}
TIMEOUT_S = 2.0


def is_ready(service: str) -> bool:
    port, path = READY[service]
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {service}\r\n\r\n".encode())
            return b" 200 " in connection.recv(200).split(b"\r\n")[0]
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(0 if is_ready(os.environ["SERVICE"]) else 1)
