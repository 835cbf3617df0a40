"""Publish and predict with nothing of ours: `ten_lines.py [NATS_URL] [GRPC_ADDRESS]`."""

import asyncio, json, sys, nats, numpy, tritonclient.grpc as triton  # noqa: E401, I001 - ten lines


async def publish(url, record):
    client = await nats.connect(url)
    await client.jetstream().publish("records.default.digits", json.dumps(record).encode())
    await client.close()


bus, doors = sys.argv[1:] or ("nats://127.0.0.1:4222", "127.0.0.1:8001")
asyncio.run(publish(bus, {"pixels": [0.0] * 64, "label": 0}))
pixels = triton.InferInput("pixels", [1, 64], "FP32")
pixels.set_data_from_numpy(numpy.zeros((1, 64), numpy.float32))
print(triton.InferenceServerClient(doors).infer("digits", [pixels]).as_numpy("label"))
