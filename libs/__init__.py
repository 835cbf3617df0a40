"""What several services need."""

import os

# gRPC reads it when it is imported. Left alone, its C core says at every fork, in a line of its
# own between the JSON ones, that it does nothing about it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
